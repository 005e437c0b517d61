"""The gains of `UnbiasedGain` as one kernel for NVIDIA GPUs: weights are read once and bisected on the chip.

`gains.bracket` says what is computed; here it runs on a few rows, or columns, of a tile at a time, which
stay in registers from the first rounding to the last.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.formats import Format
from daq_jax.gpu_codes import INSTRUCTION, kept
from daq_jax.numerics.gpu_arithmetic import moved
from daq_jax.numerics.kernel_choice import pallas_call
from daq_jax.tiles import Tiles

_SIDE = 128  # rows and columns of a tile
_WARPS = 4
_SETS = 32  # that are in registers at a time
_RESULTS = 7  # fields of a bracket


def applies(tiles: Tiles, axes: tuple[int, ...], run: int) -> bool:
    """Whether `per_set` is for sets over these axes of a tile, each reaching over `run` tiles."""
    n, shape = len(tiles.shape), tiles.shape
    return (
        tiles.format in INSTRUCTION
        and sorted(tiles.axes) == [n - 3, n - 1]
        and shape[-3] == shape[-1] == _SIDE
        and len(axes) == run == 1
    )


def per_set(
    bracket: Callable[..., tuple[Array, ...]],
    number: Format,
    axes: tuple[int, ...],
    base: Array,
    tuned: Array,
    scale: Array,
) -> list[Array]:
    """What `bracket(change, kept, total)` returns for every set, in a shape that broadcasts over the tiles.

    Args:
        bracket: of a few rows or columns of a tile.
        number: the format of the codes.
        axes: the one axis of a tile that a set sums over.
        base: weights before tuning, cut into tiles.
        tuned: weights after.
        scale: of each tile.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    across, count = base.shape[-2], base.size // _SIDE**2
    axis = 0 if axes[0] == base.ndim - 3 else 1  # in a tile
    tile = pl.BlockSpec((None, _SIDE, None, _SIDE), lambda i: (i // across, 0, i % across, 0))
    found = pallas_call(
        functools.partial(_bracket_tile, bracket=bracket, number=number, axis=axis),
        grid=(count,),
        in_specs=[tile, tile, pl.BlockSpec((1,), lambda i: (i,))],
        out_specs=pl.BlockSpec((_RESULTS, None, _SIDE), lambda i: (0, i, 0)),
        out_shape=jax.ShapeDtypeStruct((_RESULTS, count, _SIDE), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="gains",
    )(*(x.reshape(-1, _SIDE, across, _SIDE) for x in (base, tuned)), scale.reshape(-1))
    found = found.reshape(_RESULTS, *base.shape[:-3], across, _SIDE)
    return [jnp.expand_dims(x.mT, -1) if axis else jnp.expand_dims(x, -3) for x in found]


def _bracket_tile(
    base_ref: Any,
    tuned_ref: Any,
    scale_ref: Any,
    found_ref: Any,
    *,
    bracket: Any,
    number: Format,
    axis: int,
) -> None:
    """The kernel: all sets of one tile."""
    from jax.experimental import pallas as pl

    scale = scale_ref[0]

    def some_sets(i: Array, nothing: Any) -> Any:
        sets = pl.ds(i * _SETS, _SETS)
        index = (sets, slice(None)) if axis else (slice(None), sets)
        base, tuned = (ref[index].astype(jnp.float32) for ref in (base_ref, tuned_ref))
        d = tuned - base

        def kept_at(gain: Array | float) -> Array:
            target = tuned if not isinstance(gain, Array) else moved(base, d, gain)
            return kept(base, target, scale, number)

        found = bracket(d, kept_at, lambda x: jnp.sum(x, axis, keepdims=True))
        for k, x in enumerate(found):
            found_ref[k, sets] = jnp.sum(x, axis)
        return nothing

    lax.fori_loop(0, _SIDE // _SETS, some_sets, 0)
