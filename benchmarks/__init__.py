"""Measurements of daq_jax: `python -m benchmarks` lists them, `python -m benchmarks NAME` runs one.

A benchmark checks its answer before it times it. Results are JSON and Markdown files in `benchmarks/results`,
which are committed; `--quick` runs the smallest form of each and writes to `build/benchmarks` in their place.
"""
