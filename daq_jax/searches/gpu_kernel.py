"""Searches as one kernel for NVIDIA GPUs: a tile is read once, tried under all scales on the chip, and coded.

The plain search in `candidates` and `trials` is the definition; this is the same, tile by tile, for the cases
that `applies` names. XLA reads the weights again for every few candidates and rounds to FP8 with a
dozen instructions; the chip (compute capability 8.9 and later) has one for it. On an H200 that made the
paper's search more than twice as fast.

Written in Pallas for Triton. Where that is missing or the GPU is older, the plain search runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.formats import Format
from daq_jax.gpu_codes import INSTRUCTION, kept
from daq_jax.metrics import Additive, Cosine, NegMse, SignRate, neg_bias, neg_error
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.gpu_arithmetic import multiply_add, reciprocal
from daq_jax.numerics.kernel_choice import interpreted, pallas_call
from daq_jax.roundings.nearest import Nearest
from daq_jax.scales import AnyScale, usable
from daq_jax.searches.candidates import AbsMax, CoarseToFine, Grid, OffGrid
from daq_jax.searches.trials import Trial, better
from daq_jax.tiles import Tiles

_SIDE = 128  # rows and columns of a tile
_ROWS = 4  # rows of a tile that are in registers at a time
_WARPS = 4
_LANES = 8  # candidates that are scored together: their sums must fit into registers
_METRICS = (Cosine, SignRate, NegMse)  # tried in the kernel and found equal to the plain search


def applies(search: Any, metric: Any, rounding: Any, scales: Any, tiles: Tiles) -> bool:
    """Whether `search_tiles` is for these parts of a recipe and these weights."""
    n, shape = len(tiles.shape), tiles.shape
    # Types and not instances: a subclass may do something else than what the kernel does in its place.
    judged = type(metric) in _METRICS and rounding == Nearest()
    return (
        type(search) in _SEARCHES
        and (judged or not _SEARCHES[type(search)].reads_recipe)
        and scales == AnyScale()
        and tiles.format in INSTRUCTION
        and sorted(tiles.axes) == [n - 3, n - 1]
        and shape[-3] == shape[-1] == _SIDE
    )


def search_tiles(
    search: Any, metric: Any, tiles: Tiles, stored_base: Array | None = None
) -> tuple[Array, Array]:
    """Nearest codes in the shape of the tiles, and the scale of each tile, as the plain search gives it.

    Args:
        search: one that `applies` to.
        metric: one that `applies` to; not read by a search that has metrics of its own.
        tiles: the pair of weights.
        stored_base: the scale of each tile that the base was stored with, or None.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    across = tiles.shape[-2]
    weights = [x.reshape(-1, _SIDE, across, _SIDE) for x in (tiles.stored_base, tiles.stored_tuned)]
    count = tiles.stored_tuned.size // _SIDE**2
    tile = pl.BlockSpec((None, _SIDE, None, _SIDE), lambda i: (i // across, 0, i % across, 0))
    number = pl.BlockSpec((1,), lambda i: (i,))
    scales = [] if stored_base is None else [stored_base.reshape(count)]
    codes, scale = pallas_call(
        functools.partial(_search_tile, search=search, metric=metric, number=tiles.format),
        grid=(count,),  # one axis: `vmap` adds its own, and there can be three
        in_specs=[tile, tile, *(number for _ in scales)],
        out_specs=[tile, number],
        out_shape=[
            jax.ShapeDtypeStruct((count // across, _SIDE, across, _SIDE), tiles.format.dtype),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="search",
    )(*weights, *scales)
    return codes.reshape(tiles.shape), tiles.per_tile(scale)


def _over_rows(refs: Sequence[Any], step: Callable[..., Any], start: Any) -> Any:
    """Folds `step(i, result, *rows)` over a tile, a few rows of each of `refs` at a time, as float32."""
    from jax.experimental import pallas as pl

    last = _SIDE // _ROWS - 1

    def load(i: Array | int) -> list[Array]:
        return [ref[pl.ds(i * _ROWS, _ROWS), :] for ref in refs]

    def body(i: Array, carry: tuple[list[Array], Any]) -> tuple[list[Array], Any]:
        rows, result = carry
        following = load(jnp.minimum(i + 1, last))  # asked for early, so that it is there in time
        return following, step(i, result, *(x.astype(jnp.float32) for x in rows))

    return lax.fori_loop(0, last + 1, body, (load(0), start))[1]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One tile on the chip: its weights, and what a first pass over them found.

    Attributes:
        refs: references to the base and to the tuned weights, `[128, 128]`.
        number: the number format of the codes.
        metrics: every metric that the search scores with.
        absmax: AbsMax scale; NaN where a weight is not finite.
        base_absmax: AbsMax scale of the base.
        largest_change: of all elements.
        fixed: by metric, the sums of what it takes of the change alone.
    """

    refs: tuple[Any, Any]
    number: Format
    metrics: tuple[Additive, ...]
    absmax: Array
    base_absmax: Array
    largest_change: Array
    fixed: dict[Additive, tuple[Array, ...]]

    @classmethod
    def of(cls, refs: tuple[Any, Any], number: Format, metrics: tuple[Additive, ...]) -> "_Tile":
        """The first pass."""
        zeros = jnp.zeros((_ROWS, _SIDE), jnp.float32)

        def survey(_: Array, found: tuple[Any, ...], base: Array, tuned: Array) -> tuple[Any, ...]:
            size, base_size, moved, fixed = found
            d = tuned - base
            fine = (jnp.abs(base) < jnp.inf) & (jnp.abs(tuned) < jnp.inf)
            size = jnp.maximum(size, jnp.where(fine, jnp.abs(tuned), jnp.inf))
            base_size, moved = jnp.maximum(base_size, jnp.abs(base)), jnp.maximum(moved, jnp.abs(d))
            return size, base_size, moved, jax.tree.map(jnp.add, fixed, _fixed_terms(metrics, d))

        none = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(functools.partial(_fixed_terms, metrics), zeros),
        )
        *sizes, fixed = _over_rows(refs, survey, (zeros, zeros, zeros, none))
        size, base_size, moved = (jnp.max(x) for x in sizes)

        def absmax_scale(size: Array) -> Array:
            largest = number.largest + 0 * size  # no constant: `divide` looks at its bits
            return jnp.where(size < jnp.inf, usable(divide(size, largest)), jnp.nan)

        sums = dict(zip(metrics, jax.tree.map(jnp.sum, fixed), strict=True))
        return cls(refs, number, metrics, absmax_scale(size), absmax_scale(base_size), moved, sums)

    def score(self, metric: Additive, scales: Sequence[Array]) -> Array:
        """`[_LANES]`: the score of each of up to that many scales."""
        zeros = jnp.zeros((_ROWS, _SIDE), jnp.float32)

        def step(_: Array, sums: Any, base: Array, tuned: Array) -> Any:
            d = tuned - base
            changes = (kept(base, tuned, s, self.number) for s in scales)
            return [metric.add_terms(sum, d, q, multiply_add) for sum, q in zip(sums, changes, strict=True)]

        like = jax.eval_shape(metric.terms, zeros, zeros)
        start = [tuple(jnp.zeros(x.shape, x.dtype) for x in like) for _ in scales]
        sums = _over_rows(self.refs, step, start)
        totals = [_in_lanes([jnp.sum(x, 1, keepdims=True) for x in term]) for term in zip(*sums, strict=True)]
        score = metric.score(*self.fixed[metric], *(jnp.sum(x, 0) for x in totals))
        return jnp.where(self.largest_change > 0, score, 0.0)

    def best(self, ratios: Sequence[Any], start: Trial | None = None) -> Trial:
        """The best of several ratios to the AbsMax scale, and of `start`, by the first metric."""
        groups = -(-len(ratios) // _LANES)
        size = -(-len(ratios) // groups)
        found = [] if start is None else [start]
        for i in range(0, len(ratios), size):
            some = ratios[i : i + size]
            scores = self.score(self.metrics[0], [usable(r * self.absmax) for r in some])
            found.append(_best_lane(_in_lanes(some), scores, len(some)))
        return functools.reduce(better, found)


def _search_tile(
    base_ref: Any,
    tuned_ref: Any,
    *refs: Any,
    search: Any,
    metric: Any,
    number: Format,
) -> None:
    """The kernel: everything for one tile. `refs`: the stored scale of the base, if any, codes and scale."""
    from jax.experimental import pallas as pl

    *stored_ref, codes_ref, scale_ref = refs
    form = _SEARCHES[type(search)]
    metrics = (metric,) if form.reads_recipe else form.metrics
    tile = _Tile.of((base_ref, tuned_ref), number, metrics)
    scale = form.find(search, tile, stored_ref[0][0] if stored_ref else None)
    scale = jnp.where(tile.absmax == tile.absmax, scale, jnp.nan)
    scale_ref[0] = scale
    whole, rest = reciprocal(scale)

    def encode(i: Array, nothing: Any, tuned: Array) -> Any:
        x = divide(tuned, scale) if interpreted() else multiply_add(tuned, whole, tuned * rest)
        x = jnp.clip(x, -number.largest, number.largest)
        codes_ref[pl.ds(i * _ROWS, _ROWS), :] = x.astype(number.dtype)
        return nothing

    _over_rows([tuned_ref], encode, 0)


def _absmax(search: AbsMax, tile: _Tile, stored: Array | None) -> Array:
    return tile.absmax


def _grid(search: Grid, tile: _Tile, stored: Array | None) -> Array:
    return usable(tile.best([1.0, *search.ratios]).ratio * tile.absmax)


def _coarse_to_fine(search: CoarseToFine, tile: _Tile, stored: Array | None) -> Array:
    winner = tile.best([float(r) for r in search.coarse_ratios])
    fine = []
    for row in search.fine_ratios:
        x = winner.ratio
        for r, y in zip(search.coarse_ratios, row, strict=True):
            x = jnp.where(winner.ratio == float(r), float(y), x)
        fine.append(x)
    return usable(tile.best([1.0, *fine], winner).ratio * tile.absmax)


def _off_grid(search: OffGrid, tile: _Tile, stored: Array | None) -> Array:
    base_scale = tile.base_absmax if stored is None else usable(stored)
    least_biased = usable(tile.best([1.0, *search.ratios]).ratio * tile.absmax)
    errors = tile.score(neg_error, [tile.absmax, base_scale, least_biased])
    on_grid = jnp.where(_lane(errors, 1) > _lane(errors, 0), base_scale, tile.absmax)
    return jnp.where(_lane(errors, 2) < -search.noise, on_grid, least_biased)


@dataclasses.dataclass(frozen=True)
class _Form:
    """A search as the kernel has it.

    Attributes:
        find: of the search, the tile and the base's stored scale, to the scale of the tile.
        metrics: the metrics of a search that has its own.
        reads_recipe: whether it scores with the metric and the rounding of the recipe.
    """

    find: Callable[[Any, _Tile, Array | None], Array]
    metrics: tuple[Additive, ...] = ()

    @property
    def reads_recipe(self) -> bool:
        return not self.metrics


_SEARCHES: dict[type, _Form] = {
    AbsMax: _Form(_absmax),
    Grid: _Form(_grid),
    CoarseToFine: _Form(_coarse_to_fine),
    OffGrid: _Form(_off_grid, (neg_bias, neg_error)),
}


def _fixed_terms(metrics: Sequence[Any], d: Array) -> list[tuple[Array, ...]]:
    """What each metric sums of the change alone."""
    return [metric.fixed_terms(d) for metric in metrics]


def _lane(x: Array, i: int) -> Array:
    """One element of `[_LANES]`."""
    return jnp.sum(jnp.where(lax.broadcasted_iota(jnp.int32, (_LANES,), 0) == i, x, 0))


def _in_lanes(values: Sequence[Any]) -> Array:
    """Up to `_LANES` scalars as a vector, or columns as a matrix, filled up with zeros."""
    shape = jnp.shape(values[0])[:-1]
    lane = lax.broadcasted_iota(jnp.int32, (*shape, _LANES), len(shape))
    last = values[-1]
    result = jnp.zeros(lane.shape, last.dtype if isinstance(last, Array) else jnp.float32)
    for i, x in enumerate(values):
        result = jnp.where(lane == i, x, result)
    return result


def _best_lane(ratio: Array, score: Array, count: int) -> Trial:
    """The best of the first lanes, by the rule of `better`."""
    lane = lax.broadcasted_iota(jnp.int32, (_LANES,), 0)
    score = jnp.where((lane < count) & (score == score), score, -jnp.inf)
    top = jnp.max(score)
    off = jnp.where((score == top) & (lane < count), jnp.abs(ratio - 1), jnp.inf)
    ratio = jnp.min(jnp.where(off == jnp.min(off), ratio, jnp.inf))
    return Trial(ratio, ratio, top)
