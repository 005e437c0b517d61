"""Searches as one kernel for NVIDIA GPUs: a tile is read once, tried under all scales on the chip, and coded.

The plain search in `searches` and `trials` is the definition; this is the same, tile by tile, for the cases
that `applies` names. XLA reads the weights again for every few candidates and rounds to FP8 with a
dozen instructions; the chip (compute capability 8.9 and later) has one for it. On an H200 that made the
paper's search more than twice as fast.

Written in Pallas for Triton. Where that is missing or the GPU is older, the plain search runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.metrics import Additive, Cosine, NegMse, SignRate, SumOfProducts, neg_bias, neg_error
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.gpu_arithmetic import INSTRUCTION, kept, multiply_add, reciprocal
from daq_jax.roundings.nearest import Nearest
from daq_jax.scales import AnyScale, usable
from daq_jax.searches.candidates import AbsMax, CoarseToFine, Grid, OffGrid
from daq_jax.searches.trials import Trial, better
from daq_jax.tiles import Tiles

if TYPE_CHECKING:
    from daq_jax.recipes import Recipe

_SIDE = 128  # rows and columns of a tile
_ROWS = 4  # rows of a tile that are in registers at a time
_WARPS = 4
_LANES = 8  # candidates that are scored together: their sums must fit into registers


def applies(recipe: "Recipe", tiles: Tiles) -> bool:
    """Whether `search` is for this recipe and these weights."""
    n, shape = len(tiles.shape), tiles.shape
    ours = type(recipe.search) in (AbsMax, Grid, CoarseToFine)
    judged = type(recipe.metric) in (Cosine, SignRate, NegMse) and type(recipe.rounding) is Nearest
    return (
        ((ours and judged) or type(recipe.search) is OffGrid)  # which has metrics and a rounding of its own
        and type(recipe.scales) is AnyScale
        and tiles.format in INSTRUCTION
        and sorted(tiles.axes) == [n - 3, n - 1]
        and shape[-3] == shape[-1] == _SIDE
    )


def search(
    recipe: "Recipe", tiles: Tiles, stored_base: Array | None = None, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Nearest codes in the shape of the tiles, and the scale of each, as the plain search gives it.

    Args:
        recipe: one that `applies` to.
        tiles: the pair of weights.
        stored_base: the scale of each tile that the base was stored with, or None.
        interpret: run as plain JAX, anywhere, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    across = tiles.shape[-2]
    weights = [x.reshape(-1, _SIDE, across, _SIDE) for x in (tiles.stored_base, tiles.stored_tuned)]
    count = tiles.stored_tuned.size // _SIDE**2
    tile = pl.BlockSpec((None, _SIDE, None, _SIDE), lambda i: (i // across, 0, i % across, 0))
    number = pl.BlockSpec((1,), lambda i: (i,))
    scales = [] if stored_base is None else [stored_base.reshape(count)]
    codes, scale = pl.pallas_call(
        functools.partial(_search_tile, recipe=recipe, interpret=interpret),
        grid=(count,),  # one axis: `vmap` adds its own, and there can be three
        in_specs=[tile, tile, *(number for _ in scales)],
        out_specs=[tile, number],
        out_shape=[
            jax.ShapeDtypeStruct((count // across, _SIDE, across, _SIDE), tiles.format.dtype),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
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


def _search_tile(base_ref: Any, tuned_ref: Any, *refs: Any, recipe: "Recipe", interpret: bool) -> None:
    """The kernel: everything for one tile. `refs`: the stored scale of the base, if any, codes and scale."""
    from jax.experimental import pallas as pl

    *stored_ref, codes_ref, scale_ref = refs
    number, search, zeros = recipe.format, recipe.search, jnp.zeros((_ROWS, _SIDE), jnp.float32)
    metrics = [neg_bias, neg_error] if isinstance(search, OffGrid) else [cast(Additive, recipe.metric)]

    def survey(_: Array, found: tuple[Any, ...], base: Array, tuned: Array) -> tuple[Any, ...]:
        size, base_size, moved, fixed = found
        d = tuned - base
        fine = (jnp.abs(base) < jnp.inf) & (jnp.abs(tuned) < jnp.inf)
        size = jnp.maximum(size, jnp.where(fine, jnp.abs(tuned), jnp.inf))
        base_size, moved = jnp.maximum(base_size, jnp.abs(base)), jnp.maximum(moved, jnp.abs(d))
        return size, base_size, moved, jax.tree.map(jnp.add, fixed, _fixed_terms(metrics, d))

    none = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(functools.partial(_fixed_terms, metrics), zeros)
    )
    *sizes, fixed = _over_rows([base_ref, tuned_ref], survey, (zeros, zeros, zeros, none))
    size, base_size, moved = (jnp.max(x) for x in sizes)
    fixed = dict(zip(metrics, jax.tree.map(jnp.sum, fixed), strict=True))

    def absmax_scale(size: Array) -> Array:
        largest = number.largest + 0 * size  # no constant: `divide` looks at its bits
        return jnp.where(size < jnp.inf, usable(divide(size, largest)), jnp.nan)

    absmax = absmax_scale(size)

    def score(metric: Additive, scales: Sequence[Array]) -> Array:
        """`[_LANES]`: the score of each of up to that many scales."""

        def step(_: Array, sums: Any, base: Array, tuned: Array) -> Any:
            d = tuned - base
            changes = (kept(base, tuned, s, number, interpret) for s in scales)
            return [_add_terms(metric, sum, d, q, interpret) for sum, q in zip(sums, changes, strict=True)]

        like = jax.eval_shape(metric.terms, zeros, zeros)
        start = [tuple(jnp.zeros(x.shape, x.dtype) for x in like) for _ in scales]
        sums = _over_rows([base_ref, tuned_ref], step, start)
        totals = [_in_lanes([jnp.sum(x, 1, keepdims=True) for x in term]) for term in zip(*sums, strict=True)]
        return jnp.where(moved > 0, metric.score(*fixed[metric], *(jnp.sum(x, 0) for x in totals)), 0.0)

    def best(ratios: Sequence[Any], start: Trial | None = None) -> Trial:
        groups = -(-len(ratios) // _LANES)
        size = -(-len(ratios) // groups)
        found = []
        for i in range(0, len(ratios), size):
            some = ratios[i : i + size]
            scores = score(metrics[0], [usable(r * absmax) for r in some])
            found.append(_best_lane(_in_lanes(some), scores, len(some)))
        return functools.reduce(better, found if start is None else [start, *found])

    if isinstance(search, AbsMax):
        scale = absmax
    elif isinstance(search, OffGrid):
        base_scale = usable(stored_ref[0][0]) if stored_ref else absmax_scale(base_size)
        least_biased = usable(best([1.0, *search.ratios]).ratio * absmax)
        errors = score(neg_error, [absmax, base_scale, least_biased])
        on_grid = jnp.where(_lane(errors, 1) > _lane(errors, 0), base_scale, absmax)
        scale = jnp.where(_lane(errors, 2) < -search.noise, on_grid, least_biased)
    else:
        scale = usable(_find(search, best) * absmax)
    scale = jnp.where(absmax == absmax, scale, jnp.nan)
    scale_ref[0] = scale
    whole, rest = reciprocal(scale)

    def encode(i: Array, nothing: Any, tuned: Array) -> Any:
        x = divide(tuned, scale) if interpret else multiply_add(tuned, whole, tuned * rest, interpret)
        x = jnp.clip(x, -number.largest, number.largest)
        codes_ref[pl.ds(i * _ROWS, _ROWS), :] = x.astype(number.dtype)
        return nothing

    _over_rows([tuned_ref], encode, 0)


def _fixed_terms(metrics: Sequence[Any], d: Array) -> list[tuple[Array, ...]]:
    """What each metric sums of the change alone."""
    return [metric.fixed_terms(d) for metric in metrics]


def _find(search: Any, best: Callable[..., Trial]) -> Array:
    """The ratio that a search picks."""
    if isinstance(search, Grid):
        return best([1.0, *search.ratios]).ratio
    winner = best([float(r) for r in search.coarse_ratios])
    fine = []
    for row in search.fine_ratios:
        x = winner.ratio
        for r, y in zip(search.coarse_ratios, row, strict=True):
            x = jnp.where(winner.ratio == float(r), float(y), x)
        fine.append(x)
    return best([1.0, *fine], winner).ratio


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


def _add_terms(metric: Any, sums: Sequence[Array], d: Array, q: Array, interpret: bool) -> tuple[Array, ...]:
    """`sums` and the metric's terms."""
    if isinstance(metric, SumOfProducts):
        pairs = zip(metric.factors(d, q), sums, strict=True)
        return tuple(multiply_add(a, b, sum, interpret) for (a, b), sum in pairs)
    return tuple(a + b for a, b in zip(sums, metric.terms(d, q), strict=True))
