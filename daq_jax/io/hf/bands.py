"""Bands: some rows of a weight at a time, so that memory does not depend on the size of a matrix.

A weight is `[..., out, in]` here. A band of a matrix is some of its outputs; a band of a stack of matrices is
some whole matrices. Bands begin and end between tiles. Only a tile as long as the matrix may be cut, because
its one scale goes with any band.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from daq_jax.analysis.comparison import compare_leaf
from daq_jax.analysis.figures import Figures, pool
from daq_jax.errors import DaqError
from daq_jax.qtensor import QTensor
from daq_jax.tilings import Tiling

Leaf = np.ndarray | jax.Array | QTensor

MOST_ELEMENTS = 2**21  # of a band that is compared on a CPU: 25 bytes for each, 52 MB
_ON_ACCELERATOR = 2**26  # where memory is the accelerator's own, and work stops at the end of each band


def rows_per_tile(tiling: Tiling, shape: Sequence[int]) -> int:
    """Outputs of a weight `[..., out, in]` that a tile holds; at least 1."""
    *_, outputs, inputs = shape
    return max(tiling.tile(inputs, outputs)[1], 1)


def can_be_cut(tiling: Tiling, shape: Sequence[int]) -> bool:
    """Whether tiles are as long as the matrix, so that their scales go with any band."""
    return rows_per_tile(tiling, shape) >= shape[-2]


def scale_rows(tiling: Tiling, shape: Sequence[int], band: slice) -> slice:
    """The rows of a scale `[..., out tiles, in tiles]` that belong to a band of outputs.

    Args:
        tiling: tiling of the weight.
        shape: shape of the weight, `[..., out, in]`.
        band: outputs of the band.

    Raises:
        DaqError: if the band cuts through a tile that other bands hold too.
    """
    if can_be_cut(tiling, shape):
        return slice(None)
    step = rows_per_tile(tiling, shape)
    first, last, _ = band.indices(shape[-2])
    if first % step or (last % step and last != shape[-2]):
        raise DaqError(f"rows {first} to {last} cut through a tile of {step} rows.")
    return slice(first // step, -(-last // step))


def bands(shape: Sequence[int], step: int, *, most: int) -> list[slice]:
    """Bands of the first axis of a tensor, in order.

    Args:
        shape: shape of the tensor.
        step: bands begin at multiples of this number.
        most: elements of a band, unless a single step has more.
    """
    length, *rest = shape
    rows = max(step, most // max(math.prod(rest), 1) // step * step)
    return [slice(i, min(i + rows, length)) for i in range(0, length, rows)]


def band_around(first: int, last: int, step: int, length: int) -> slice:
    """The smallest band of whole steps that holds rows `first` to `last`, `last` itself not among them."""
    return slice(first // step * step, min(-(-last // step) * step, length))


def band_of(x: Leaf, band: slice) -> Leaf:
    """A band of the outputs of a weight `[..., out, in]`; of a QTensor it must not cut through a tile."""
    if not isinstance(x, QTensor):
        return x[..., band, :]
    scale = x.scale[..., scale_rows(x.tiling, x.shape, band)]
    return dataclasses.replace(x, codes=x.codes[..., band, :], scale=scale)


def figures_in_bands(base: Leaf, tuned: Leaf, q: QTensor) -> Figures:
    """What `compare` finds of one weight `[..., out, in]`, whose sums take 25 bytes for each element."""
    found = []
    for band in _compared(q.shape, [x.tiling for x in (base, tuned, q) if isinstance(x, QTensor)]):
        old, new, kept = (band_of(x, band) for x in (base, tuned, q))
        assert isinstance(kept, QTensor)
        found.append(compare_leaf(old, new, kept))
    return pool(found)


def elements_compared(shape: Sequence[int], tilings: Sequence[Tiling]) -> int:
    """Most elements of a weight `[..., out, in]` that `figures_in_bands` looks at together.

    Args:
        shape: shape of the weight.
        tilings: those of its codes, and of its base and itself where they are codes too.
    """
    band = _compared(shape, tilings)[0]
    return (band.stop - band.start) * math.prod(shape) // max(shape[-2], 1)


def _compared(shape: Sequence[int], tilings: Sequence[Tiling]) -> list[slice]:
    *batch, outputs, inputs = shape
    step = math.lcm(*(rows_per_tile(t, shape) for t in tilings if not can_be_cut(t, shape)))
    most = MOST_ELEMENTS if jax.default_backend() == "cpu" else _ON_ACCELERATOR
    return bands((outputs, math.prod(batch) * inputs), step, most=most)
