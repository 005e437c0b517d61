"""Prototype, on whole matrices, of the rounding of docs/design/envelope.md; not part of daq_jax."""
