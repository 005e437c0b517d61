"""Roundings: which code stands for each element. Each GPU kernel lies beside its plain twin."""

from daq_jax.roundings.feedback import UnbiasedFeedback
from daq_jax.roundings.gains import UnbiasedGain, UnbiasedSubspace
from daq_jax.roundings.nearest import Nearest, Stochastic

__all__ = ["Nearest", "Stochastic", "UnbiasedFeedback", "UnbiasedGain", "UnbiasedSubspace"]
