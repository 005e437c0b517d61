"""One pair of leaves to one QTensor: cut, scale, round, join."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array

from daq_jax.qtensor import QTensor
from daq_jax.recipes import Recipe
from daq_jax.roundings import Tiles
from daq_jax.scales import absmax_scale
from daq_jax.searches import Trials
from daq_jax.sharding import run_sharded, scale_sharding, sharding_of
from daq_jax.tilings import Matrix, TileView


def quantize_pair(
    base: ArrayLike | QTensor,
    tuned: ArrayLike | QTensor,
    stream: ArrayLike,
    *,
    recipe: Recipe,
    matrix: Matrix,
) -> QTensor:
    """Quantizes one weight.

    Args:
        base: the weight before tuning; a QTensor stands for what it dequantizes to, in its dtype.
        tuned: the weight after, of the same shape.
        stream: uint32, a hash of the weight's path, for roundings that draw.
        recipe: how to.
        matrix: input axes and output axes of the weight.
    """
    like = tuned.codes if isinstance(tuned, QTensor) else tuned
    return _quantize_pair(base, tuned, stream, recipe=recipe, matrix=matrix, sharding=sharding_of(like))


@functools.partial(jax.jit, static_argnames=("recipe", "matrix", "sharding"))
def _quantize_pair(
    base: Array | QTensor,
    tuned: Array | QTensor,
    stream: Array,
    *,
    recipe: Recipe,
    matrix: Matrix,
    sharding: NamedSharding | None,
) -> QTensor:
    view = TileView(tuple(tuned.shape), matrix, recipe.tiling)

    def run(base: Array, tuned: Array, base_scale: Array | None, stream: Array) -> tuple[Array, Array]:
        return _codes_and_scale(base, tuned, base_scale, stream, recipe, view)

    base_scale = None
    if isinstance(base, QTensor):
        same = (base.view, base.format) == (view, recipe.format)
        base_scale = base.scale if same else None
    base, tuned = (x.dequantize() if isinstance(x, QTensor) else x for x in (base, tuned))
    out = (sharding, scale_sharding(sharding, view))
    codes, scale = run_sharded(run, out)(base, tuned, base_scale, stream)
    return QTensor(codes, scale, recipe.format, recipe.tiling, np.dtype(tuned.dtype), matrix)


def _codes_and_scale(
    base: Array, tuned: Array, base_scale: Array | None, stream: Array, recipe: Recipe, view: TileView
) -> tuple[Array, Array]:
    base, tuned = (view.cut(x).astype(jnp.float32) for x in (base, tuned))
    tiles = Tiles(base, tuned, view, recipe.format, stream)
    axes, largest = view.tile_axes, recipe.format.largest
    # NaN or infinity in the base spoils its tile too.
    absmax = absmax_scale(jnp.where(jnp.isfinite(base), tuned, jnp.nan), axes, largest=largest)
    trials = Trials(
        tiles=tiles,
        changed=jnp.any(tiles.change != 0, axis=axes, keepdims=True),
        absmax=absmax,
        base=absmax_scale(base, axes, largest=largest) if base_scale is None else view.spread(base_scale),
        metric=recipe.metric,
        rounding=recipe.rounding,
        allowed=recipe.scales,
    )
    scale = recipe.search(trials)
    values = recipe.rounding(tiles, scale)
    return view.join(recipe.format.encode(values)), view.gather(scale)
