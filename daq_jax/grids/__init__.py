"""The grid of a base: whether weights are codes times a scale, and which scale."""
