"""Files: what reads and writes checkpoints. Nothing in the core imports it."""
