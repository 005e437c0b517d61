"""Working through a weight part by part, so that a CPU finds what it needs in its cache.

An accelerator takes all tiles at once. On a CPU that is slow and needs several float32 copies of the weight,
so tiles are taken in up to eight parts, by a loop of the compiled program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from daq_jax.tiles import Tiles

_IN_CACHE = 2**18  # elements of a part, where that does not make too many
_MOST_PARTS = 8


def in_parts_on_cpu(function: Callable[..., Any], tiles: Tiles, *per_tile: Any, step: int = 1) -> Any:
    """`function(tiles, *per_tile)`; on a CPU part by part, and there only if all lies on one device."""
    if not tiles.machine.one_device:
        return function(tiles, *per_tile)
    on_cpu = functools.partial(in_parts, function, step=step)
    return lax.platform_dependent(tiles, *per_tile, cpu=on_cpu, default=function)


def in_parts(function: Callable[..., Any], tiles: Tiles, *per_tile: Any, step: int = 1) -> Any:
    """`function(tiles, *per_tile)`, computed part by part.

    All parts are of one size, and the last overlaps the one before it where they do not fit. Where parts must
    begin at multiples of `step` that do not allow this, a shorter rest follows.

    Args:
        function: its results, a tree of arrays, have one value for each tile, or for each element, in the
            shape of those.
        tiles: the weights.
        per_tile: arrays, or None, with one value for each tile.
        step: parts begin at multiples of this number of tiles.
    """
    axis, length, size, step = _split(tiles, step)
    if size == length:
        return function(tiles, *per_tile)
    function = jax.jit(function)  # traced once for the loop and for the shape of its result

    def part(start: Any, size: int) -> Any:
        def cut(x: Array) -> Array:
            return _from_bits(lax.dynamic_slice_in_dim(_bits(x), start, size, axis), x.dtype)

        return function(*jax.tree.map(cut, (tiles, *per_tile)))

    def put(start: Any, size: int, done: Any) -> Any:
        def update(whole: Array, one: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, _bits(one), start, axis)

        return jax.tree.map(update, done, part(start, size))

    def put_next(i: Array | int, done: Any) -> Any:
        return put(jnp.minimum(i * size, length - size), size, done)

    def zeros(one: jax.ShapeDtypeStruct) -> Array:
        shape = [length if a == axis else n for a, n in enumerate(one.shape)]
        # Of the weight, and so inside `shard_map` as device-varying as the loop makes them.
        return _bits(jnp.zeros_like(tiles.stored_tuned[tuple(map(slice, shape))], one.dtype))

    one = jax.eval_shape(lambda: part(0, size))
    overlaps = (length - size) % step == 0
    number = -(-length // size) if overlaps else length // size
    done = lax.fori_loop(0, number, put_next, jax.tree.map(zeros, one))
    if number * size < length:
        done = put(number * size, length - number * size, done)
    return jax.tree.map(lambda x, like: _from_bits(x, like.dtype), done, one)


def _bits(x: Array) -> Array:
    """The bits of a narrow float dtype, and bytes in place of half bytes; any other array as it is.

    CPUs have no such dtypes. XLA would widen a whole weight before the loop, and a whole result and back for
    each of its parts.
    """
    if jnp.issubdtype(x.dtype, jnp.floating) and (bits := jnp.finfo(x.dtype).bits) < 32:
        x = lax.bitcast_convert_type(x, f"uint{bits}")
    return x.astype(jnp.uint8 if x.dtype == jnp.uint4 else jnp.int8 if x.dtype == jnp.int4 else x.dtype)


def _from_bits(x: Array, dtype: np.dtype) -> Array:
    """The inverse of `_bits`."""
    if x.dtype == dtype:
        return x
    if not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    return lax.bitcast_convert_type(x.astype(f"uint{jnp.finfo(dtype).bits}"), dtype)


def _split(tiles: Tiles, step: int) -> tuple[int, int, int, int]:
    """The axis over tiles to split along, the longest; its length; that of a part; the step."""
    lengths = [1 if i in tiles.axes else n for i, n in enumerate(tiles.shape)]
    longest = max(lengths)
    axis = lengths.index(longest)
    step = step if axis in tiles.grid else 1  # matrices of a batch have nothing to do with one another
    parts = max(1, min(-(-math.prod(tiles.shape) // _IN_CACHE), _MOST_PARTS, longest // step))
    return axis, longest, min(longest, -(-longest // (parts * step)) * step), step
