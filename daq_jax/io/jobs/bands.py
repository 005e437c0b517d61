"""A comparison band by band: sums over a whole matrix at once would take forty bytes for each element."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from daq_jax.analysis.comparison import compare
from daq_jax.analysis.figures import Figures
from daq_jax.qtensor import QTensor
from daq_jax.tilings import Block, PerTensor

Leaf = np.ndarray | jax.Array | QTensor

_ELEMENTS = 2**21  # of a band on a CPU: 80 MB
_ON_ACCELERATOR = 2**26  # where it is the accelerator's own memory, and work stops at the end of each band


def band_of(x: Leaf, start: int, stop: int) -> Leaf:
    """Some outputs of a weight `[..., out, in]`; for a QTensor they must not cut through a tile."""
    if not isinstance(x, QTensor):
        return x[..., start:stop, :]
    step = x.tiling.c if isinstance(x.tiling, Block) else 1
    assert start % step == 0
    scale = x.scale
    if not isinstance(x.tiling, PerTensor):
        scale = scale[..., start // step : -(-stop // step)]
    return dataclasses.replace(x, codes=x.codes[..., start:stop, :], scale=scale)


def figures_in_bands(base: Leaf, tuned: Leaf, q: QTensor) -> Figures:
    """What `compare` finds of one weight `[..., out, in]`, in little memory."""
    *batch, outputs, inputs = q.shape
    tilings = [x.tiling for x in (base, tuned, q) if isinstance(x, QTensor)]
    step = math.lcm(*(t.c for t in tilings if isinstance(t, Block)))
    most = _ELEMENTS if jax.default_backend() == "cpu" else _ON_ACCELERATOR
    rows = max(most // (math.prod(batch) * inputs) // step, 1) * step
    found: Any = None
    for start in range(0, outputs, rows):
        pair = (band_of(x, start, min(start + rows, outputs)) for x in (base, tuned, q))
        part = compare(*({"": x} for x in pair)).total
        found = part if found is None else jax.tree.map(lambda a, b: a + b, found, part)
    return found
