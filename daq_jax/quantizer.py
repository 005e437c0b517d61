"""One pair of leaves to one QTensor: cut, scale, round, join."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array

from daq_jax.qtensor import QTensor
from daq_jax.recipes import Recipe
from daq_jax.sharding import run_sharded, scale_sharding, sharding_of
from daq_jax.tiles import Tiles
from daq_jax.tilings import Matrix, TileView
from daq_jax.trials import find_scales


def quantize_pair(
    base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, *, recipe: Recipe, matrix: Matrix
) -> QTensor:
    """Quantizes one weight.

    Args:
        base: the weight before tuning; a QTensor stands for what it dequantizes to, in its dtype.
        tuned: the weight after, of the same shape.
        recipe: how to.
        matrix: input axes and output axes of the weight.
    """
    like = tuned.codes if isinstance(tuned, QTensor) else tuned
    sharding = sharding_of(like)
    # Under a trace an array may lie on many devices without our knowing.
    whole_here = sharding is None and not isinstance(like, Tracer)
    return _quantize_pair(base, tuned, recipe=recipe, matrix=matrix, sharding=sharding, split=whole_here)


@functools.partial(jax.jit, static_argnames=("recipe", "matrix", "sharding", "split"))
def _quantize_pair(
    base: Array | QTensor,
    tuned: Array | QTensor,
    *,
    recipe: Recipe,
    matrix: Matrix,
    sharding: NamedSharding | None,
    split: bool,
) -> QTensor:
    view = TileView(tuple(tuned.shape), matrix, recipe.tiling)

    def run(base: Array, tuned: Array, base_scale: Array | None) -> tuple[Array, Array]:
        return _codes_and_scale(base, tuned, base_scale, recipe, view, split)

    base_scale = None
    if isinstance(base, QTensor) and (base.view, base.format) == (view, recipe.format):
        base_scale = base.scale
    base, tuned = (x.dequantize() if isinstance(x, QTensor) else x for x in (base, tuned))
    out = (sharding, scale_sharding(sharding, view))
    codes, scale = run_sharded(run, out)(base, tuned, base_scale)
    return QTensor(codes, scale, recipe.format, recipe.tiling, np.dtype(tuned.dtype), matrix)


def _codes_and_scale(
    base: Array, tuned: Array, base_scale: Array | None, recipe: Recipe, view: TileView, split: bool
) -> tuple[Array, Array]:
    tiles = Tiles(view.cut(base), view.cut(tuned), view.tile_axes, recipe.format)
    stored = None if base_scale is None else view.spread(base_scale)
    scale = find_scales(recipe, tiles, stored, split=split)
    values = recipe.rounding(tiles, scale)
    # A zero keeps its sign, as in a cast: arithmetic rounding makes every zero positive.
    values = jnp.where(values == 0, jnp.copysign(values, tiles.tuned), values)
    return view.join(recipe.format.encode(values)), view.gather(scale)
