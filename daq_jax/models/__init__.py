"""Running a model on quantized weights, and other libraries' quantized arrays."""
