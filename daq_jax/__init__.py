"""daq_jax: quantization that keeps what fine-tuning changed.

`quantize(base, tuned)` picks scales and roundings by what happens to `tuned - base`: its sign, its
direction, its size. Pure functions over pytrees. Letters used throughout: `R, C` rows (inputs) and columns
(outputs) of a weight, `T` tiles, `K` elements of a tile, `N` candidates; `d = tuned - base` the true change,
`q = dequantized - base` the kept change.
"""

import importlib
import typing

from daq_jax import recipes
from daq_jax.analysis.comparison import Comparison, Figures, compare
from daq_jax.density.adjustment import LeastSquares, SignSteps
from daq_jax.density.grams import Grams
from daq_jax.density.quantizer import quantize_density
from daq_jax.errors import DaqError
from daq_jax.formats import fp4_bnb, fp4_e2m1, fp8_e4m3fn, fp8_e5m2, int4, int8, nf4
from daq_jax.metrics import SignRate, cosine, neg_mse
from daq_jax.qtensor import QTensor
from daq_jax.recipes import DensityRecipe, Recipe
from daq_jax.roundings.feedback import UnbiasedFeedback
from daq_jax.roundings.gains import UnbiasedGain, UnbiasedSubspace
from daq_jax.roundings.nearest import Nearest, Stochastic
from daq_jax.rules import (
    DEFAULT_RULES,
    MAXTEXT_RULES,
    TUNIX_RULES,
    NarrowMatrixWarning,
    Rule,
    UnusedRuleWarning,
    keep,
    use,
)
from daq_jax.scales import AnyScale, PowerOfTwo
from daq_jax.searches.candidates import AbsMax, CoarseToFine, Grid, OffGrid, WithBaseScale
from daq_jax.tilings import Block, Channel, Group, PerTensor
from daq_jax.trees import dequantize, quantize
from daq_jax.version import __version__ as __version__

if typing.TYPE_CHECKING:  # the names of `_EDGES`, for editors and type checkers
    from daq_jax.analysis.inspection import Inspection, inspect
    from daq_jax.density.calibration import calibrate, calibrate_from
    from daq_jax.io.jobs.compare_folders import compare_folders
    from daq_jax.io.jobs.inspect_folders import inspect_folder
    from daq_jax.io.jobs.quantize_folders import quantize_folder
    from daq_jax.io.orbax.checkpoints import load, load_weights, save
    from daq_jax.models.flax import linen_apply, linen_variables, nnx_with
    from daq_jax.models.matmul import dot
    from daq_jax.models.qwix import from_qwix, to_qwix

# Names at the edges, by the module that holds them; loaded when first used: the core imports none of it.
_EDGES: dict[str, str] = {
    "Inspection": "daq_jax.analysis.inspection",
    "calibrate": "daq_jax.density.calibration",
    "calibrate_from": "daq_jax.density.calibration",
    "compare_folders": "daq_jax.io.jobs.compare_folders",
    "dot": "daq_jax.models.matmul",
    "from_qwix": "daq_jax.models.qwix",
    "inspect": "daq_jax.analysis.inspection",
    "inspect_folder": "daq_jax.io.jobs.inspect_folders",
    "linen_apply": "daq_jax.models.flax",
    "linen_variables": "daq_jax.models.flax",
    "load": "daq_jax.io.orbax.checkpoints",
    "load_weights": "daq_jax.io.orbax.checkpoints",
    "nnx_with": "daq_jax.models.flax",
    "quantize_folder": "daq_jax.io.jobs.quantize_folders",
    "save": "daq_jax.io.orbax.checkpoints",
    "to_qwix": "daq_jax.models.qwix",
}

__all__ = [
    "DEFAULT_RULES",
    "MAXTEXT_RULES",
    "TUNIX_RULES",
    "AbsMax",
    "AnyScale",
    "Block",
    "Channel",
    "CoarseToFine",
    "Comparison",
    "DaqError",
    "DensityRecipe",
    "Figures",
    "Grams",
    "Grid",
    "Group",
    "Inspection",
    "LeastSquares",
    "NarrowMatrixWarning",
    "Nearest",
    "OffGrid",
    "PerTensor",
    "PowerOfTwo",
    "QTensor",
    "Recipe",
    "Rule",
    "SignRate",
    "SignSteps",
    "Stochastic",
    "UnbiasedFeedback",
    "UnbiasedGain",
    "UnbiasedSubspace",
    "UnusedRuleWarning",
    "WithBaseScale",
    "calibrate",
    "calibrate_from",
    "compare",
    "compare_folders",
    "cosine",
    "dequantize",
    "dot",
    "fp4_bnb",
    "fp4_e2m1",
    "fp8_e4m3fn",
    "fp8_e5m2",
    "from_qwix",
    "inspect",
    "inspect_folder",
    "int4",
    "int8",
    "keep",
    "linen_apply",
    "linen_variables",
    "load",
    "load_weights",
    "neg_mse",
    "nf4",
    "nnx_with",
    "quantize",
    "quantize_density",
    "quantize_folder",
    "recipes",
    "save",
    "to_qwix",
    "use",
]


def __getattr__(name: str) -> object:
    if name not in _EDGES:
        raise AttributeError(f"module 'daq_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EDGES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EDGES})
