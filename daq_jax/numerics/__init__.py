"""Arithmetic, linear algebra and sharding. Nothing here knows of quantization."""
