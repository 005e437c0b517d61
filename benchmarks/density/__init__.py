"""Density-aware 4-bit codes: what a model does on them, and what one large layer takes in time and memory."""
