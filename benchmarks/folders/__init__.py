"""Checkpoint folders larger than memory: peak memory, the time of a plan, and speed."""
