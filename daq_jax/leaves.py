"""One pair of leaves to one QTensor: cut, scale, round, join."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array

from daq_jax.cpu_parts import in_parts
from daq_jax.numerics.kernel_choice import has_fp8_gpu, kernel_or_plain
from daq_jax.numerics.sharding import (
    keeps_tiles_whole,
    on_each_device,
    run_sharded,
    scale_sharding,
    sharding_of,
)
from daq_jax.qtensor import QTensor
from daq_jax.recipes import Recipe
from daq_jax.roundings.nearest import Nearest
from daq_jax.searches import gpu_kernel
from daq_jax.searches.candidates import OURS
from daq_jax.searches.trials import find_scales
from daq_jax.tiles import Tiles
from daq_jax.tilings import Matrix, TileView

_MOST_TOGETHER = 300_000_000  # elements of a batch of weights
_OWN_PRODUCTS = "xla_gpu_enable_triton_gemm"  # an option of XLA's


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
    return quantize_and_look(base, tuned, recipe=recipe, matrix=matrix, stream=stream)[0]


def quantize_and_look(
    base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, *, recipe: Recipe, matrix: Matrix, stream: int
) -> tuple[QTensor, Array]:
    """As `quantize_pair`, with whether both weights are finite: if not, a scale is NaN."""
    how = _How.of(tuned, recipe, matrix)
    draws = hasattr(recipe.rounding, "draw")  # a number that nobody asks for need not go to the device
    program = _as_called(_quantize_pair) if _multiplies_on_gpu(tuned, recipe) else _quantize_pair
    q, finite = program(base, tuned, np.uint32(stream) if draws else None, how=how)
    return q, is_finite(q.scale) if finite is None else finite


def better_together(tuned: ArrayLike | QTensor, recipe: Recipe) -> int:
    """How many weights like this are best quantized by one `quantize_alike`.

    Roundings of whole matrices take many small steps, in which one matrix leaves most of a GPU idle.
    """
    if not _multiplies_on_gpu(tuned, recipe) or sharding_of(_array(tuned)):
        return 1
    return max(1, _MOST_TOGETHER // max(1, math.prod(np.shape(tuned))))


def is_staged() -> bool:
    """Whether JAX only records what is computed here: then nobody can look at numbers that are at hand."""
    return isinstance(jnp.zeros(()), Tracer)


def _array(x: ArrayLike | QTensor) -> ArrayLike:
    return x.codes if isinstance(x, QTensor) else x


def _multiplies_on_gpu(tuned: ArrayLike | QTensor, recipe: Recipe) -> bool:
    """Whether this weight lies on a GPU, and is rounded with products of whole matrices."""
    array = _array(tuned)
    if isinstance(array, Tracer) or not hasattr(recipe.rounding, "scored_as"):
        return False
    devices = array.devices() if isinstance(array, jax.Array) else jax.devices()[:1]
    return all(device.platform == "gpu" for device in devices)


def _as_called(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program, quick to compile; or as it is where it becomes part of another, whose options hold."""
    return program if is_staged() else _quick_to_compile(program)


@functools.cache
def _quick_to_compile(program: Callable[..., Any], option: str = _OWN_PRODUCTS) -> Callable[..., Any]:
    """A program that takes its products of matrices from the GPU's libraries, if XLA knows the option.

    XLA's own kernels for them made the default a tenth faster on an H200, and took 10 s a shape to choose.
    """
    options = {option: False}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # XLA's options come and go
        return program
    return jax.jit(program, static_argnames="how", compiler_options=options)


def quantize_alike(
    bases: Sequence[ArrayLike | QTensor],
    tuneds: Sequence[ArrayLike | QTensor],
    *,
    recipe: Recipe,
    matrix: Matrix,
) -> tuple[list[QTensor], Array]:
    """Quantizes weights of one shape, dtype and device at once; also returns whether all are finite."""
    how = _How.of(tuneds[0], recipe, matrix)
    return _as_called(_quantize_batch)(tuple(bases), tuple(tuneds), how=how)


@functools.partial(jax.jit, static_argnames="how")
def _quantize_batch(
    bases: tuple[Array | QTensor, ...], tuneds: tuple[Array | QTensor, ...], *, how: "_How"
) -> tuple[list[QTensor], Array]:
    stacked = (jax.tree.map(lambda *x: jnp.stack(x), *many) for many in (bases, tuneds))
    q, finite = jax.vmap(lambda base, tuned: _quantize_pair(base, tuned, None, how=how))(*stacked)
    return [jax.tree.map(lambda x, i=i: x[i], q) for i in range(len(tuneds))], finite.all()


@jax.jit
def is_finite(tree: Any) -> Array:
    """No NaN, no infinity, in any array of a tree."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


@dataclasses.dataclass(frozen=True)
class _How:
    """What shapes the compiled program, beside the arrays."""

    recipe: Recipe
    matrix: Matrix
    sharding: NamedSharding | None
    split: bool

    @classmethod
    def of(cls, tuned: ArrayLike | QTensor, recipe: Recipe, matrix: Matrix) -> "_How":
        like = _array(tuned)
        sharding = sharding_of(like)
        # Under a trace an array may lie on several devices, where there are several, without our knowing.
        split = sharding is None and (not isinstance(like, Tracer) or jax.device_count() == 1)
        return cls(recipe, matrix, sharding, split)


@functools.partial(jax.jit, static_argnames="how")
def _quantize_pair(
    base: Array | QTensor, tuned: Array | QTensor, stream: Array | None, *, how: _How
) -> tuple[QTensor, Array | None]:
    recipe = how.recipe
    view = TileView(tuple(tuned.shape), how.matrix, recipe.tiling)
    stored = None
    if isinstance(base, QTensor) and (base.view, base.format) == (view, recipe.format):
        stored = base.scale if base.zero is None else None  # its grid is shifted: no grid of ours

    def run(
        base: Array, tuned: Array, stored: Array | None, stream: Array | None, *, local: bool = how.split
    ) -> tuple[Array, Array]:
        part = dataclasses.replace(view, shape=tuple(tuned.shape))
        draw = getattr(recipe.rounding, "draw", None)
        noise = part.cut(draw(tuned.shape, stream)) if draw else None
        axes, grid = part.tile_axes, part.grid_axes
        tiles = Tiles(part.cut(base), part.cut(tuned), noise, axes, grid, recipe.format, local)
        codes, scale = _codes_and_scale(tiles, None if stored is None else part.spread(stored), recipe)
        return part.join(codes), part.gather(scale)

    base, tuned = (x.dequantize() if isinstance(x, QTensor) else x for x in (base, tuned))
    weight, scales = out = (how.sharding, scale_sharding(how.sharding, view))
    if weight and scales and keeps_tiles_whole(weight, scales, view) and _goes_tile_by_tile(recipe, view):
        inside = (weight, weight, None if stored is None else scales, None)
        run = on_each_device(functools.partial(run, local=True), inside, (weight, scales))
    codes, scale = run_sharded(run, out)(base, tuned, stored, stream)
    q = QTensor(codes, scale, recipe.format, recipe.tiling, np.dtype(tuned.dtype), how.matrix)
    return q, None if how.sharding else is_finite(scale)  # where devices would wait for one another: later


def _goes_tile_by_tile(recipe: Recipe, view: TileView) -> bool:
    """Whether the codes of a tile are known to depend on nothing outside it."""
    alignment = getattr(recipe.rounding, "alignment", None)
    if alignment:
        cut = jax.eval_shape(view.cut, jax.ShapeDtypeStruct(view.shape, jnp.float32))
        alone = alignment(Tiles(cut, cut, None, view.tile_axes, view.grid_axes, recipe.format)) == 1
    else:
        alone = isinstance(recipe.rounding, Nearest)
    search = getattr(recipe.search, "search", recipe.search)  # of `WithBaseScale`
    return alone and isinstance(search, OURS)


def _codes_and_scale(tiles: Tiles, stored: Array | None, recipe: Recipe) -> tuple[Array, Array]:
    if not (tiles.local and has_fp8_gpu() and gpu_kernel.applies(recipe, tiles)):
        scale = find_scales(recipe, tiles, stored)
        return _codes(tiles, scale, recipe), scale
    coded = isinstance(recipe.rounding, Nearest)  # codes come with the scale
    scored = dataclasses.replace(tiles, noise=None)  # here every search scores `Nearest`

    def plain(base: Array, tuned: Array, *stored: Array) -> list[Array]:
        pair = dataclasses.replace(scored, stored_base=base, stored_tuned=tuned)
        scale = find_scales(recipe, pair, *stored or [None])
        return [scale, _codes(pair, scale, recipe)] if coded else [scale]

    def kernel(base: Array, tuned: Array, *stored: Array) -> list[Array]:
        pair = dataclasses.replace(scored, stored_base=base, stored_tuned=tuned)
        codes, scale = gpu_kernel.search(recipe, pair, *stored)
        return [scale, codes] if coded else [scale]

    arrays = (tiles.stored_base, tiles.stored_tuned, *([] if stored is None else [stored]))
    scale, *codes = kernel_or_plain(kernel, plain, *arrays)
    return codes[0] if coded else _codes(tiles, scale, recipe), scale


def _codes(tiles: Tiles, scale: Array, recipe: Recipe) -> Array:
    """Codes under a scale, in the dtype of the format."""

    def encode(tiles: Tiles, scale: Array) -> Array:
        values = recipe.rounding(tiles, scale)
        # A zero keeps its sign, as in a cast: arithmetic rounding makes every zero positive.
        values = jnp.where(values == 0, jnp.copysign(values, tiles.tuned), values)
        return recipe.format.encode(values)

    alignment = getattr(recipe.rounding, "alignment", None)
    if tiles.local and alignment:
        on_cpu = functools.partial(in_parts, encode, step=alignment(tiles))
        return lax.platform_dependent(tiles, scale, cpu=on_cpu, default=encode)
    return encode(tiles, scale)
