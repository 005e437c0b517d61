"""One pair of leaves to one QTensor: cut, scale, round, join."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array

from daq_jax.parts import in_parts
from daq_jax.qtensor import QTensor
from daq_jax.recipes import Recipe
from daq_jax.sharding import run_sharded, scale_sharding, sharding_of
from daq_jax.tiles import Tiles
from daq_jax.tilings import Matrix, TileView
from daq_jax.trials import find_scales


def quantize_pair(
    base: ArrayLike | QTensor,
    tuned: ArrayLike | QTensor,
    *,
    recipe: Recipe,
    matrix: Matrix,
    stream: int = 0,
) -> QTensor:
    """Quantizes one weight.

    Args:
        base: the weight before tuning; a QTensor stands for what it dequantizes to, in its dtype.
        tuned: the weight after, of the same shape.
        recipe: how to.
        matrix: input axes and output axes of the weight.
        stream: tells this weight's random draws from those of others; 32 bits.
    """
    like = tuned.codes if isinstance(tuned, QTensor) else tuned
    sharding = sharding_of(like)
    # Under a trace an array may lie on several devices, where there are several, without our knowing.
    split = sharding is None and (not isinstance(like, Tracer) or jax.device_count() == 1)
    how = _How(recipe, matrix, sharding, split)
    return _quantize_pair(base, tuned, np.uint32(stream), how=how)


@dataclasses.dataclass(frozen=True)
class _How:
    """What shapes the compiled program, beside the arrays."""

    recipe: Recipe
    matrix: Matrix
    sharding: NamedSharding | None
    split: bool


@functools.partial(jax.jit, static_argnames="how")
def _quantize_pair(base: Array | QTensor, tuned: Array | QTensor, stream: Array, *, how: _How) -> QTensor:
    recipe = how.recipe
    view = TileView(tuple(tuned.shape), how.matrix, recipe.tiling)
    stored = None
    if isinstance(base, QTensor) and (base.view, base.format) == (view, recipe.format):
        stored = base.scale if base.zero is None else None  # its grid is shifted: no grid of ours

    def run(base: Array, tuned: Array, stored: Array | None, stream: Array) -> tuple[Array, Array]:
        draw = getattr(recipe.rounding, "draw", None)
        noise = view.cut(draw(tuned.shape, stream)) if draw else None
        axes, grid = view.tile_axes, view.grid_axes
        tiles = Tiles(view.cut(base), view.cut(tuned), noise, axes, grid, recipe.format)
        codes, scale = _codes_and_scale(
            tiles, None if stored is None else view.spread(stored), recipe, how.split
        )
        return view.join(codes), view.gather(scale)

    base, tuned = (x.dequantize() if isinstance(x, QTensor) else x for x in (base, tuned))
    out = (how.sharding, scale_sharding(how.sharding, view))
    codes, scale = run_sharded(run, out)(base, tuned, stored, stream)
    return QTensor(codes, scale, recipe.format, recipe.tiling, np.dtype(tuned.dtype), how.matrix)


def _codes_and_scale(tiles: Tiles, stored: Array | None, recipe: Recipe, split: bool) -> tuple[Array, Array]:
    def encode(tiles: Tiles, scale: Array) -> Array:
        values = recipe.rounding(tiles, scale)
        # A zero keeps its sign, as in a cast: arithmetic rounding makes every zero positive.
        values = jnp.where(values == 0, jnp.copysign(values, tiles.tuned), values)
        return recipe.format.encode(values)

    scale = find_scales(recipe, tiles, stored, split=split)
    alignment = getattr(recipe.rounding, "alignment", None)
    if split and alignment:
        on_cpu = functools.partial(in_parts, encode, step=alignment(tiles))
        return lax.platform_dependent(tiles, scale, cpu=on_cpu, default=encode), scale
    return encode(tiles, scale), scale
