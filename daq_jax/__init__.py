"""daq_jax: quantization that keeps what fine-tuning changed.

`quantize(base, tuned)` picks scales and roundings by what happens to `tuned - base`: its sign, its
direction, its size. Pure functions over pytrees. Letters used throughout: `R, C` rows (inputs) and columns
(outputs) of a weight, `T` tiles, `K` elements of a tile, `N` candidates; `d = tuned - base` the true change,
`q = dequantized - base` the kept change.
"""

import importlib
import typing

from daq_jax.display import interrupts as interrupts  # first: what Ctrl-C does while the command loads

# isort: split

from daq_jax import errors as errors
from daq_jax import formats as formats
from daq_jax import metrics as metrics
from daq_jax import recipes as recipes
from daq_jax import records as records  # tells `jax.export` how to write a QTensor
from daq_jax import roundings as roundings
from daq_jax import rules as rules
from daq_jax import scales as scales
from daq_jax import searches as searches
from daq_jax import tilings as tilings
from daq_jax.analysis.comparison import Comparison, Figures, compare
from daq_jax.analysis.plans import Plan, PlannedLeaf, plan
from daq_jax.analysis.relation import UnlikelyPairWarning
from daq_jax.errors import DaqError
from daq_jax.formats import (
    Codebook,
    Format,
    Integer,
    SmallFloat,
    fp4_bnb,
    fp4_e2m1,
    fp8_e4m3fn,
    fp8_e5m2,
    int4,
    int8,
    nf4,
)
from daq_jax.metrics import Additive, Metric, SignRate, cosine, neg_mse
from daq_jax.qtensor import QTensor
from daq_jax.quantization import dequantize, quantize
from daq_jax.recipe import Recipe
from daq_jax.roundings.dithered import DitheredFeedback
from daq_jax.roundings.feedback import UnbiasedFeedback
from daq_jax.roundings.gains import UnbiasedGain
from daq_jax.roundings.nearest import Nearest, Stochastic
from daq_jax.roundings.rounding import Rounding
from daq_jax.roundings.subspace import UnbiasedSubspace
from daq_jax.rules import (
    DEFAULT_RULES,
    GEMMA_RULES,
    HF_RULES,
    KERAS_RULES,
    MAXTEXT_RULES,
    TUNIX_RULES,
    AmbiguousMatrixWarning,
    NarrowMatrixWarning,
    Rule,
    UnreadMetricWarning,
    UnusedRuleWarning,
    keep,
    use,
)
from daq_jax.scales import AnyScale, PowerOfTwo, Scales
from daq_jax.searches.base_scale import BaseScale
from daq_jax.searches.candidates import AbsMax, CoarseToFine, Grid, OffGrid, WithBaseScale
from daq_jax.searches.search import Search
from daq_jax.searches.trials import Trial, Trials
from daq_jax.tiles import Tiles
from daq_jax.tilings import Block, Channel, Group, PerTensor, Tiling
from daq_jax.version import __version__ as __version__

if typing.TYPE_CHECKING:  # the names of `_EDGES`, for editors and type checkers
    from daq_jax.analysis.inspection import Inspection, inspect
    from daq_jax.analysis.predictions import Divergence, divergence
    from daq_jax.density.adjustment import Adjustment, LeastSquares, SignSteps
    from daq_jax.density.calibration import calibrate, calibrate_from
    from daq_jax.density.grams import Grams
    from daq_jax.density.quantizer import UncalibratedWarning, quantize_density
    from daq_jax.density.recipe import DensityRecipe
    from daq_jax.io.disk.compilation_cache import enable_compilation_cache
    from daq_jax.io.jobs.compare_folders import compare_folders
    from daq_jax.io.jobs.inspect_folders import inspect_folder
    from daq_jax.io.jobs.quantize_folders import quantize_folder
    from daq_jax.io.orbax.checkpoints import load, load_weights, save
    from daq_jax.models.adapters import merge
    from daq_jax.models.flax import linen_apply, linen_variables, nnx_with
    from daq_jax.models.matmul import dot
    from daq_jax.models.qwix import from_qwix, to_qwix
    from daq_jax.models.tracing import rules_for

# Names at the edges, by the module that holds them; loaded when first used: the core imports none of it.
_EDGES: dict[str, str] = {
    "Adjustment": "daq_jax.density.adjustment",
    "DensityRecipe": "daq_jax.density.recipe",
    "Divergence": "daq_jax.analysis.predictions",
    "Grams": "daq_jax.density.grams",
    "Inspection": "daq_jax.analysis.inspection",
    "LeastSquares": "daq_jax.density.adjustment",
    "SignSteps": "daq_jax.density.adjustment",
    "UncalibratedWarning": "daq_jax.density.quantizer",
    "calibrate": "daq_jax.density.calibration",
    "calibrate_from": "daq_jax.density.calibration",
    "compare_folders": "daq_jax.io.jobs.compare_folders",
    "divergence": "daq_jax.analysis.predictions",
    "dot": "daq_jax.models.matmul",
    "enable_compilation_cache": "daq_jax.io.disk.compilation_cache",
    "from_qwix": "daq_jax.models.qwix",
    "inspect": "daq_jax.analysis.inspection",
    "inspect_folder": "daq_jax.io.jobs.inspect_folders",
    "linen_apply": "daq_jax.models.flax",
    "linen_variables": "daq_jax.models.flax",
    "load": "daq_jax.io.orbax.checkpoints",
    "load_weights": "daq_jax.io.orbax.checkpoints",
    "merge": "daq_jax.models.adapters",
    "nnx_with": "daq_jax.models.flax",
    "quantize_density": "daq_jax.density.quantizer",
    "quantize_folder": "daq_jax.io.jobs.quantize_folders",
    "rules_for": "daq_jax.models.tracing",
    "save": "daq_jax.io.orbax.checkpoints",
    "to_qwix": "daq_jax.models.qwix",
}

# Modules whose public names may also be written as `daq.formats.int8`; all other modules are our own affair.
NAMESPACES = (
    "errors",
    "formats",
    "metrics",
    "recipes",
    "roundings",
    "rules",
    "scales",
    "searches",
    "tilings",
)

__all__ = [
    "DEFAULT_RULES",
    "GEMMA_RULES",
    "HF_RULES",
    "KERAS_RULES",
    "MAXTEXT_RULES",
    "TUNIX_RULES",
    "AbsMax",
    "Additive",
    "Adjustment",
    "AmbiguousMatrixWarning",
    "AnyScale",
    "BaseScale",
    "Block",
    "Channel",
    "CoarseToFine",
    "Codebook",
    "Comparison",
    "DaqError",
    "DensityRecipe",
    "DitheredFeedback",
    "Divergence",
    "Figures",
    "Format",
    "Grams",
    "Grid",
    "Group",
    "Inspection",
    "Integer",
    "LeastSquares",
    "Metric",
    "NarrowMatrixWarning",
    "Nearest",
    "OffGrid",
    "PerTensor",
    "Plan",
    "PlannedLeaf",
    "PowerOfTwo",
    "QTensor",
    "Recipe",
    "Rounding",
    "Rule",
    "Scales",
    "Search",
    "SignRate",
    "SignSteps",
    "SmallFloat",
    "Stochastic",
    "Tiles",
    "Tiling",
    "Trial",
    "Trials",
    "UnbiasedFeedback",
    "UnbiasedGain",
    "UnbiasedSubspace",
    "UncalibratedWarning",
    "UnlikelyPairWarning",
    "UnreadMetricWarning",
    "UnusedRuleWarning",
    "WithBaseScale",
    "calibrate",
    "calibrate_from",
    "compare",
    "compare_folders",
    "cosine",
    "dequantize",
    "divergence",
    "dot",
    "enable_compilation_cache",
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
    "merge",
    "neg_mse",
    "nf4",
    "nnx_with",
    "plan",
    "quantize",
    "quantize_density",
    "quantize_folder",
    "recipes",
    "rules_for",
    "save",
    "to_qwix",
    "use",
]


def __getattr__(name: str) -> object:
    if name not in _EDGES:
        import difflib

        close = difflib.get_close_matches(name, __all__)
        hint = f". Did you mean {' or '.join(close)}?" if close else ""
        raise AttributeError(f"module 'daq_jax' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(_EDGES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *NAMESPACES, "__version__"})
