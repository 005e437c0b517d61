"""Searches: which scale each tile gets. The loop over candidates, and its GPU kernel beside it."""

from daq_jax.searches.candidates import AbsMax, CoarseToFine, Grid, OffGrid, WithBaseScale

__all__ = ["AbsMax", "CoarseToFine", "Grid", "OffGrid", "WithBaseScale"]
