"""Working through a weight part by part, so that a CPU finds what it needs in its cache.

An accelerator takes all tiles at once. On a CPU that is slow and needs several float32 copies of the weight,
so tiles are taken in up to eight parts, one after another. A loop of the compiled program would be shorter,
but XLA's CPU code for nested loops was four times slower.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.tiles import Tiles

_IN_CACHE = 2**18  # elements of a part, where that does not make too many
_MOST_PARTS = 8  # each is compiled on its own


def in_parts(function: Callable[..., Array], tiles: Tiles, *per_tile: Any, step: int = 1) -> Array:
    """`function(tiles, *per_tile)`, computed part by part.

    Args:
        function: its result has one value for each tile, or for each element, in the shape of those.
        tiles: the weights.
        per_tile: arrays, or None, with one value for each tile.
        step: parts begin at multiples of this number of tiles.
    """
    axis, edges = _split(tiles, step)
    function = jax.jit(function)  # parts of one size are traced once
    results: list[Array] = []
    for start, stop in itertools.pairwise(edges):
        wait = _zero_after(results[-1]) if results else 0

        def cut(x: Array, start: Any = start + wait, size: int = stop - start) -> Array:
            return lax.dynamic_slice_in_dim(x, start, size, axis)

        results.append(function(*jax.tree.map(cut, (tiles, *per_tile))))
    return jnp.concatenate(results, axis) if len(results) > 1 else results[0]


def _zero_after(x: Array) -> Array:
    """Zero, but the compiler cannot know: what starts there waits for `x`, and then takes over its memory."""
    first = x[(0,) * x.ndim].astype(jnp.float32)
    return (first >= float(jnp.finfo(jnp.float32).max)).astype(jnp.int32)


def _split(tiles: Tiles, step: int) -> tuple[int, list[int]]:
    """The axis over tiles to split along, the longest, and the edges of the parts."""
    lengths = [1 if i in tiles.axes else n for i, n in enumerate(tiles.shape)]
    longest = max(lengths)
    axis = lengths.index(longest)
    step = step if axis in tiles.grid else 1  # matrices of a batch have nothing to do with one another
    parts = max(1, min(-(-math.prod(tiles.shape) // _IN_CACHE), _MOST_PARTS, longest // step))
    edges = [longest * i // parts // step * step for i in range(parts)]
    return axis, [*edges, longest]
