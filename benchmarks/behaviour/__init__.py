"""What a model does after its tuned weights were quantized: on models trained here, and on a real pair."""
