"""One pair of leaves to one QTensor: cut, find scales, round, join.

`quantize_leaf` is what trees, folders and samples call. The compiled program behind it is `lowered`'s.
"""

import dataclasses
import functools
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

from daq_jax.cpu_parts import in_parts_on_cpu
from daq_jax.metrics import as_metric
from daq_jax.numerics.arithmetic import is_finite, is_staged
from daq_jax.numerics.kernel_choice import kernel_or_plain, may_take_kernels
from daq_jax.numerics.machine import Machine
from daq_jax.numerics.sharding import on_each_device, resharded, run_sharded, sharding_of
from daq_jax.qtensor import QTensor, as_array, codes_of
from daq_jax.recipe import Recipe
from daq_jax.roundings.nearest import Nearest
from daq_jax.roundings.rounding import Rounding, as_rounding
from daq_jax.searches import gpu_kernel
from daq_jax.searches.search import as_search, find_scales
from daq_jax.tiles import Tiles
from daq_jax.tilings import Matrix, TileView, keeps_tiles_whole, over_outputs, scale_sharding

_OWN_PRODUCTS = "xla_gpu_enable_triton_gemm"  # an option of XLA's


def quantize_leaf(
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
        tuned: the weight after tuning, of the same shape.
        recipe: how to quantize it.
        matrix: input axes and output axes of the weight.
        stream: tells this weight's random draws from those of others; 32 bits.
    """
    return quantize_and_look(base, tuned, recipe=recipe, matrix=matrix, stream=stream)[0]


def quantize_and_look(
    base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, *, recipe: Recipe, matrix: Matrix, stream: int
) -> tuple[QTensor, Array]:
    """As `quantize_leaf`, with whether both weights are finite: if not, a scale is NaN."""
    rounding = as_rounding(recipe.rounding)
    # A number that nobody asks for need not go to the device.
    number = np.uint32(stream) if rounding.draws else None
    program = as_called(_quantize) if multiplies_on_gpu(tuned, rounding) else _quantize
    q, finite = program(base, tuned, number, how=_How.of(tuned, recipe, matrix))
    return q, is_finite(q.scale) if finite is None else finite


def lowered(
    base: Any, tuned: Any, *, recipe: Recipe, matrix: Matrix, one_device: bool | None = None
) -> jax.stages.Lowered:
    """The program that `quantize_leaf` runs for such a pair, before it is compiled.

    Args:
        base: the weight before tuning: an array, a QTensor, or shapes and dtypes of one.
        tuned: the weight after tuning, likewise.
        recipe: how to quantize it.
        matrix: input axes and output axes of the weight.
        one_device: whether the weight is on one device; None for what the array itself says.
    """
    how = _How.of(tuned, recipe, matrix)
    if one_device is not None:
        how = dataclasses.replace(how, machine=dataclasses.replace(how.machine, one_device=one_device))
    stream = np.uint32(0) if as_rounding(recipe.rounding).draws else None
    return _quantize.lower(base, tuned, stream, how=how)


def quantize_alike(
    bases: Sequence[ArrayLike | QTensor],
    tuneds: Sequence[ArrayLike | QTensor],
    *,
    recipe: Recipe,
    matrix: Matrix,
) -> tuple[list[QTensor], Array]:
    """Quantizes weights of one shape, dtype and device at once; also returns whether all are finite."""
    how = _How.of(tuneds[0], recipe, matrix)
    return as_called(_quantize_batch)(tuple(bases), tuple(tuneds), how=how)


def multiplies_on_gpu(tuned: ArrayLike | QTensor, rounding: Rounding) -> bool:
    """Whether this weight is on a GPU and is rounded with products of whole matrices."""
    array = codes_of(tuned)
    if isinstance(array, Tracer) or not rounding.multiplies:
        return False
    devices = array.devices() if isinstance(array, jax.Array) else jax.devices()[:1]
    return all(device.platform == "gpu" for device in devices)


def as_called(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program, quick to compile; or as it is where it becomes part of another, whose options hold."""
    return program if is_staged() else quick_to_compile(program)


@functools.cache
def quick_to_compile(program: Callable[..., Any], option: str = _OWN_PRODUCTS) -> Callable[..., Any]:
    """A program that takes its products of matrices from the GPU's libraries, if XLA knows the option.

    XLA's own kernels for them made the default a tenth faster on an H200, and took 10 s a shape to choose.
    """
    options = {option: False}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # XLA's options come and go
        return program
    return jax.jit(program, static_argnames="how", compiler_options=options)


@functools.partial(jax.jit, static_argnames="how")
def _quantize_batch(
    bases: tuple[Array | QTensor, ...], tuneds: tuple[Array | QTensor, ...], *, how: "_How"
) -> tuple[list[QTensor], Array]:
    stacked = (jax.tree.map(lambda *x: jnp.stack(x), *many) for many in (bases, tuneds))
    q, finite = jax.vmap(lambda base, tuned: _quantize(base, tuned, None, how=how))(*stacked)
    return [jax.tree.map(lambda x, i=i: x[i], q) for i in range(len(tuneds))], finite.all()


@dataclasses.dataclass(frozen=True)
class _How:
    """What shapes the compiled program, beside the arrays."""

    recipe: Recipe
    matrix: Matrix
    sharding: NamedSharding | None
    machine: Machine

    @classmethod
    def of(cls, tuned: Any, recipe: Recipe, matrix: Matrix) -> "_How":
        like = codes_of(tuned)
        return cls(recipe, matrix, sharding_of(like), Machine.of(like))


@functools.partial(jax.jit, static_argnames="how")
def _quantize(
    base: Array | QTensor, tuned: Array | QTensor, stream: Array | np.uint32 | None, *, how: _How
) -> tuple[QTensor, Array | None]:
    base, tuned = lax.stop_gradient((base, tuned))  # codes are steps; parts of a rounding have NaN for slopes
    recipe, rounding = how.recipe, as_rounding(how.recipe.rounding)
    view = TileView(tuple(tuned.shape), how.matrix, recipe.tiling)
    stored = None
    if isinstance(base, QTensor) and (base.view, base.format) == (view, recipe.format):
        stored = base.scale if base.zero is None else None  # its grid is shifted: no grid of ours

    moved = over_outputs(how.sharding, view) if rounding.scope == "matrix" else None

    def run(
        base: Array,
        tuned: Array,
        stored: Array | None,
        stream: Array | np.uint32 | None,
        *,
        machine: Machine = how.machine,
    ) -> tuple[Array, Array]:
        base, tuned = (resharded(x, moved) for x in (base, tuned))
        part = dataclasses.replace(view, shape=tuple(tuned.shape))
        noise = rounding.draw(tuned.shape, jnp.asarray(stream)) if stream is not None else None
        if machine.tpu and _goes_in_lines(recipe):
            return _in_lines_of_tiles(part, base, tuned, noise, stored, recipe, machine)
        noise = None if noise is None else part.cut(noise)
        axes, grid = part.tile_axes, part.grid_axes
        tiles = Tiles(part.cut(base), part.cut(tuned), noise, axes, grid, recipe.format, machine)
        codes, scale = _codes_and_scale(tiles, None if stored is None else part.spread(stored), recipe)
        return part.join(codes), part.gather(scale)

    before, after = as_array(base), as_array(tuned)
    weight, scales = out = (how.sharding, scale_sharding(how.sharding, view))
    if weight and scales and keeps_tiles_whole(weight, scales, view) and _goes_tile_by_tile(recipe, view):
        inside = (weight, weight, None if stored is None else scales, None)
        run = on_each_device(
            functools.partial(run, machine=dataclasses.replace(how.machine, one_device=True)),
            inside,
            (weight, scales),
        )
    codes, scale = run_sharded(run, out)(before, after, stored, stream)
    q = QTensor(codes, scale, recipe.format, recipe.tiling, np.dtype(tuned.dtype), how.matrix)
    return q, None if how.sharding else is_finite(scale)  # where devices would wait for one another: later


def _goes_in_lines(recipe: Recipe) -> bool:
    """Whether all that a recipe does with tiles may be done with lines of them."""
    search, metric = as_search(recipe.search), as_metric(recipe.metric)
    parts = search, as_rounding(recipe.rounding), search.judged(as_rounding(recipe.rounding))
    return all(part.in_lines for part in parts) and (metric.in_lines or not search.reads_metric)


def _in_lines_of_tiles(
    view: TileView,
    base: Array,
    tuned: Array,
    noise: Array | None,
    stored: Array | None,
    recipe: Recipe,
    machine: Machine,
) -> tuple[Array, Array]:
    """Codes and scales of a weight that is cut as suits a TPU; see `TileView.lines`.

    Without the barriers its compiler moves the cut behind all that is computed, and what has one value for
    each tile is written out at the weight's size.
    """
    fine = view.lines
    noise = None if noise is None else fine.cut(noise)
    base, tuned, noise = lax.optimization_barrier((fine.cut(base), fine.cut(tuned), noise))
    axes, grid = fine.tile_axes, fine.grid_axes
    tiles = Tiles(base, tuned, noise, axes, grid, recipe.format, machine, view.lines_of_a_tile)
    stored = None if stored is None else lax.optimization_barrier(fine.spread(view.in_lines(stored)))
    codes, scale = _codes_and_scale(tiles, stored, recipe)
    return fine.join(lax.optimization_barrier(codes)), view.from_lines(fine.gather(scale))


def _goes_tile_by_tile(recipe: Recipe, view: TileView) -> bool:
    """Whether the codes of a tile are known to depend on nothing outside the tile."""
    rounding = as_rounding(recipe.rounding)
    if rounding.scope == "matrix" or rounding.draws:  # draws depend on the place in the whole weight
        return False
    cut = jax.eval_shape(view.cut, jax.ShapeDtypeStruct(view.shape, jnp.float32))
    tiles = Tiles(cut, cut, None, view.tile_axes, view.grid_axes, recipe.format)
    return rounding.alignment(tiles) == 1 and as_search(recipe.search).is_tile_local


def _codes_and_scale(tiles: Tiles, stored: Array | None, recipe: Recipe) -> tuple[Array, Array]:
    search, metric, rounding = (
        as_search(recipe.search),
        as_metric(recipe.metric),
        as_rounding(recipe.rounding),
    )
    find = functools.partial(find_scales, search, metric, rounding, recipe.scales)
    takes_kernel = gpu_kernel.applies(search, metric, rounding, recipe.scales, tiles)
    if not (takes_kernel and tiles.machine.one_device and may_take_kernels()):
        scale = find(tiles, stored)
        return _codes(tiles, scale, rounding), scale
    coded = rounding == Nearest()  # codes come with the scale
    scored = dataclasses.replace(tiles, noise=None)  # in the kernel every search scores nearest codes

    def plain(base: Array, tuned: Array, *stored: Array) -> list[Array]:
        pair = dataclasses.replace(scored, stored_base=base, stored_tuned=tuned)
        scale = find(pair, *stored or [None])
        return [scale, _codes(pair, scale, rounding)] if coded else [scale]

    def kernel(base: Array, tuned: Array, *stored: Array) -> list[Array]:
        pair = dataclasses.replace(scored, stored_base=base, stored_tuned=tuned)
        codes, scale = gpu_kernel.search_tiles(search, metric, pair, *stored)
        return [scale, codes] if coded else [scale]

    arrays = (tiles.stored_base, tiles.stored_tuned, *([] if stored is None else [stored]))
    scale, *codes = kernel_or_plain(kernel, plain, *arrays)
    return codes[0] if coded else _codes(tiles, scale, rounding), scale


def _codes(tiles: Tiles, scale: Array, rounding: Rounding) -> Array:
    """Codes under a scale, in the dtype of the format."""

    def encode(tiles: Tiles, scale: Array) -> Array:
        values = rounding(tiles, scale)
        # A zero keeps its sign, as in a cast: arithmetic rounding makes every zero positive.
        values = jnp.where(values == 0, jnp.copysign(values, tiles.tuned), values)
        return tiles.format.encode(values)

    if rounding.scope == "matrix":
        return encode(tiles, scale)
    return in_parts_on_cpu(encode, tiles, scale, step=rounding.alignment(tiles))
