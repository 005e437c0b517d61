"""Samples of a large weight: some of its elements, read without a copy of the whole weight."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array
from numpy.typing import NDArray

from daq_jax.formats import weights_of
from daq_jax.numerics.sharding import run_sharded, sharding_of
from daq_jax.qtensor import QTensor
from daq_jax.tilings import TileView

_SIDE = 128  # elements
_LEAST = 4  # patches of a leaf, from which a spread can be seen

Index = tuple[
    Any, ...
]  # integers or arrays of them, one for each axis, broadcasting to the shape of what is taken


def take(x: ArrayLike | QTensor, index: Index) -> NDArray:
    """`x[index]` on the host; of a QTensor, elements of what it dequantizes to.

    Args:
        x: NumPy or JAX array, sharded or not, or a QTensor.
        index: whole numbers for every axis; see NumPy's advanced indexing.
    """
    if isinstance(x, QTensor):
        return weights(x, index).astype(x.dtype)
    if isinstance(x, jax.Array):
        sharding = sharding_of(x)
        everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        return np.asarray(_take(x, index, sharding=everywhere))
    return np.asarray(x)[index]


@functools.partial(jax.jit, static_argnames="sharding")
def _take(x: Array, index: Index, *, sharding: NamedSharding | None) -> Array:
    return run_sharded(lambda x, index: x[index], sharding)(x, index)


def weights(q: QTensor, index: Index) -> NDArray[np.float32]:
    """Float32 elements of a quantized weight, before the cast to its dtype; `index` as in `take`."""
    values = q.format.decode(jnp.asarray(take(q.codes, index)))
    zero = None if q.zero is None else jnp.asarray(_of_tile(q, q.zero, index))
    return np.asarray(weights_of(values, jnp.asarray(scales(q, index)), zero))


def scales(q: QTensor, index: Index) -> NDArray[np.float32]:
    """The scale of each of some elements of a quantized weight; `index` as in `take`."""
    return _of_tile(q, q.scale, index)


def _of_tile(q: QTensor, x: ArrayLike, index: Index) -> NDArray:
    """For each of some elements, the value of an array in the shape of the scales at the element's tile."""
    view = q.view
    batch, rows, columns = view.axes

    def number(axes: tuple[int, ...]) -> Any:
        """Of rows or columns in the matrix view."""
        found: Any = 0
        for axis in axes:
            found = found * q.shape[axis] + index[axis]
        return found

    r, c = view.tile
    return take(x, (*(index[a] for a in batch), number(rows) // r, number(columns) // c))


def evenly_spread(shape: tuple[int, ...], most: int) -> Index:
    """The index of at most `most` elements, spread evenly; of all elements in order if there are fewer.

    Multiples of the golden ratio leave no large gaps and, unlike a fixed stride, favour no row or column.
    """
    size = math.prod(shape)
    flat = np.arange(size)
    if size > most:
        flat = (np.arange(most) * ((math.sqrt(5) - 1) / 2) % 1.0 * size).astype(np.int64)
    return np.unravel_index(flat, shape)


@dataclasses.dataclass(frozen=True)
class Patches:
    """A weight as a grid of patches: slices `[r, c]` of its matrix view, each of whole tiles.

    A patch has at least 128 inputs and 128 outputs, or all that the matrix has. Patches at an edge may have
    fewer.
    """

    view: TileView

    @property
    def size(self) -> tuple[int, int]:
        """Inputs and outputs of a patch."""
        tile, whole = self.view.tile, (self.view.rows, self.view.columns)
        r, c = (min(t * -(-_SIDE // t), n) for t, n in zip(tile, whole, strict=True))
        return r, c

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of patches along each batch axis, along the inputs and along the outputs."""
        r, c = self.size
        return (*self.view.batch, -(-self.view.rows // r), -(-self.view.columns // c))

    def index(self, number: int) -> Index:
        """The index, `[r, c]` for each axis of the weight, of the elements of one patch."""
        *batch, i, j = np.unravel_index(number, self.grid)
        (r, c), shape = self.size, self.view.shape
        rows = np.arange(i * r, min((i + 1) * r, self.view.rows))[:, None]
        columns = np.arange(j * c, min((j + 1) * c, self.view.columns))[None, :]
        axes, places = self.view.axes, dict(zip(self.view.axes[0], batch, strict=True))
        for numbers, side in ((rows, axes[1]), (columns, axes[2])):
            places |= dict(zip(side, np.unravel_index(numbers, [shape[a] for a in side]), strict=True))
        return tuple(places[a] for a in range(len(shape)))


def plan(patches: Mapping[str, Patches], most: int) -> dict[str, list[int]]:
    """Which patches of which leaves to look at: a fixed choice, in proportion to the size of each leaf.

    At least four patches are taken from a leaf, or all it has. If that is more than `most` elements, some of
    the leaves are taken, evenly spaced.

    Args:
        patches: how each leaf divides into patches, by path.
        most: largest number of elements, unless four patches of one leaf have more.

    Returns:
        Patch numbers by path, in order; paths without any are left out.
    """
    paths = list(patches)
    least = {p: min(_LEAST, math.prod(x.grid)) * math.prod(x.size) for p, x in patches.items()}
    if sum(least.values()) > most:
        fewer = max(1, int(len(paths) * most / sum(least.values())))
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, fewer).astype(int)]
    share = min(1.0, most / sum(math.prod(patches[p].view.shape) for p in paths))
    chosen = {}
    for path in paths:
        there = math.prod(patches[path].grid)
        n = min(there, max(_LEAST, int(share * there)))
        draw = np.random.default_rng(zlib.crc32(path.encode()))  # the same patches in every run
        chosen[path] = sorted(draw.choice(there, n, replace=False).tolist())
    return chosen
