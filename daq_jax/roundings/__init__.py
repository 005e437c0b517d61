"""Roundings: which code stands for each element. Each GPU kernel is in the file beside its plain twin."""

from daq_jax.roundings.dithered import DitheredFeedback
from daq_jax.roundings.feedback import UnbiasedFeedback
from daq_jax.roundings.gains import UnbiasedGain
from daq_jax.roundings.nearest import Nearest, Stochastic
from daq_jax.roundings.rounding import Rounding
from daq_jax.roundings.subspace import UnbiasedSubspace

__all__ = [
    "DitheredFeedback",
    "Nearest",
    "Rounding",
    "Stochastic",
    "UnbiasedFeedback",
    "UnbiasedGain",
    "UnbiasedSubspace",
]
