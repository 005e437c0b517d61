"""How fast `quantize` is, on one device and on several, and how fast the released search is."""
