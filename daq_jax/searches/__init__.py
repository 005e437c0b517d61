"""Searches: which scale each tile gets. The loop over candidates, and its GPU kernel beside it."""

from daq_jax.searches.base_scale import BaseScale
from daq_jax.searches.candidates import AbsMax, CoarseToFine, Grid, OffGrid, WithBaseScale
from daq_jax.searches.search import Search
from daq_jax.searches.trials import Trial, Trials

__all__ = [
    "AbsMax",
    "BaseScale",
    "CoarseToFine",
    "Grid",
    "OffGrid",
    "Search",
    "Trial",
    "Trials",
    "WithBaseScale",
]
