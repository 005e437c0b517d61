"""Tables, pictures and pages of what `daq_jax.analysis` found.

matplotlib and jinja2 are imported here alone. rich is imported here and by what reports on long work:
`io.jobs`, `demo`, the command line, and the bar of `density.calibration`.
"""
