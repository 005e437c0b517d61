"""Scoring candidate scales: the loop that every search runs.

By definition a search is `jax.vmap` over candidates and tiles of one score. The order of the loops is free,
and differs by machine: an accelerator scores a few candidates of all tiles at once; a CPU takes candidates
one after another, over as many tiles as its cache holds. NVIDIA GPUs have kernels for the common cases, in
`gpu_search`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.cpu_parts import in_parts
from daq_jax.metrics import Additive, Metric
from daq_jax.numerics.arithmetic import divide, total
from daq_jax.roundings.nearest import Rounding
from daq_jax.scales import absmax_scale, usable
from daq_jax.tiles import Tiles

if TYPE_CHECKING:
    from daq_jax.recipes import Recipe  # which holds a search, which is made of trials

_TOGETHER = 4  # candidates that an accelerator scores at once; more were no faster on an H200


class Trial(NamedTuple):
    """One candidate for every tile: its scale, its ratio to the AbsMax scale, its score."""

    scale: Array
    ratio: Array
    score: Array


def better(a: Trial, b: Trial) -> Trial:
    """Tile by tile the better of two candidates; `a` where `b` cannot be compared (NaN)."""
    off_a, off_b = jnp.abs(a.ratio - 1), jnp.abs(b.ratio - 1)
    nearer = (off_b < off_a) | ((off_b == off_a) & (b.ratio < a.ratio))
    take = (b.score > a.score) | ((b.score == a.score) & nearer)
    return Trial(*(jnp.where(take, y, x) for x, y in zip(a, b, strict=True)))


@dataclasses.dataclass(frozen=True)
class Trials:
    """What a search may ask. Values per tile have a shape that broadcasts over the tiles.

    Attributes:
        tiles: the pair of weights, cut into tiles.
        recipe: its metric, its rounding and the scales it allows.
        absmax: AbsMax scale of each tile; NaN where the base or the tuned weights are not finite.
        base: the scale that the base was stored with, else the base's own AbsMax scale.
        changed: whether a tile holds any change.
        fixed_sums: sums over each tile of what an `Additive` metric takes of the change alone.
        parallel: whether to score several candidates at once.
    """

    tiles: Tiles
    recipe: "Recipe"
    absmax: Array
    base: Array
    changed: Array
    fixed_sums: tuple[Array, ...]
    parallel: bool

    def score(self, scale: Array, rounding: Rounding | None = None) -> Array:
        """Score of each tile under a scale, of the codes that `rounding` (the recipe's) would store."""
        metric = self.recipe.metric
        rounding = rounding or self.recipe.rounding
        values = getattr(rounding, "scored_as", rounding)(self.tiles, scale)
        d, q = self.tiles.change, self.tiles.kept(values, scale)
        if isinstance(metric, Additive):
            sums = [_total(x, self.tiles.axes, self.parallel) for x in metric.terms(d, q)]
            score = metric.score(*self.fixed_sums, *sums)
        else:
            score = self.tiles.per_tile(metric(self.tiles.flat(d), self.tiles.flat(q)))
        return jnp.where(self.changed, score, 0)  # all alike where nothing changed: AbsMax wins the tie

    def judged_by(self, metric: Metric, rounding: Rounding) -> "Trials":
        """The same trials under another metric, of the codes of another rounding."""
        recipe = dataclasses.replace(self.recipe, metric=metric, rounding=rounding)
        fixed = _fixed_sums(metric, self.tiles, self.parallel)
        return dataclasses.replace(self, recipe=recipe, fixed_sums=fixed)

    def at_scale(self, scale: Array) -> Trial:
        """A scale of one's own as a candidate."""
        scale = self.recipe.scales(usable(scale))
        return Trial(scale, divide(scale, self.absmax), self.score(scale))

    def at_ratio(self, ratio: Array) -> Trial:
        """The candidate `ratio * absmax`; `ratio` is float32, one for all tiles or one for each."""
        scale = self.recipe.scales(usable(ratio * self.absmax))
        # No ratio where there is no scale; and inside `shard_map` as device-varying as the scale.
        return Trial(scale, jnp.where(jnp.isnan(scale), jnp.nan, ratio), self.score(scale))

    def best(self, ratios: Array, start: Trial | None = None) -> Trial:
        """The best of several ratios, and of `start`.

        Args:
            ratios: `[N]` for all tiles, or `[N, ...]` with one for each tile; float32.
            start: a candidate that stays in play.
        """
        if start is None:
            start, ratios = self.at_ratio(ratios[0]), ratios[1:]

        return self.fold(better, start, ratios, self.at_ratio)

    def fold(
        self,
        choose: Callable[[Trial, Trial], Trial],
        start: Trial,
        ratios: Array,
        trial: Callable[[Array], Trial],
    ) -> Trial:
        """Folds the trials of several ratios into one, in their order."""
        if not self.parallel:
            return lax.scan(lambda best, ratio: (choose(best, trial(ratio)), None), start, ratios)[0]
        for i in range(0, len(ratios), _TOGETHER):
            some = jax.vmap(trial)(ratios[i : i + _TOGETHER])
            for k in range(len(some.score)):
                start = choose(start, Trial(*(x[k] for x in some)))
        return start


def _total(x: Array, axes: tuple[int, int], parallel: bool) -> Array:
    # An accelerator sums in short runs by itself; XLA's GPU code was half as fast for axes out of order.
    return jnp.sum(x, tuple(sorted(axes)), keepdims=True) if parallel else total(x, axes)


def _fixed_sums(metric: Metric, tiles: Tiles, parallel: bool) -> tuple[Array, ...]:
    terms = metric.fixed_terms(tiles.change) if isinstance(metric, Additive) else ()
    return tuple(_total(x, tiles.axes, parallel) for x in terms)


def _trials(recipe: "Recipe", tiles: Tiles, stored_base: Array | None, parallel: bool) -> Trials:
    absmax = functools.partial(absmax_scale, axes=tiles.axes, largest=tiles.format.largest)
    return Trials(
        tiles,
        recipe,
        absmax=absmax(jnp.where(jnp.isfinite(tiles.base), tiles.tuned, jnp.nan)),
        base=absmax(tiles.base) if stored_base is None else stored_base,
        changed=jnp.any(tiles.change != 0, axis=tiles.axes, keepdims=True),
        fixed_sums=_fixed_sums(recipe.metric, tiles, parallel),
        parallel=parallel,
    )


def find_scales(recipe: "Recipe", tiles: Tiles, stored_base: Array | None) -> Array:
    """The scales that the recipe's search picks, by the order of loops that suits the machine.

    Args:
        recipe: its search, metric, rounding and scales.
        tiles: the pair of weights.
        stored_base: the scale of each tile that the base was stored with, or None.
    """

    def search(tiles: Tiles, stored_base: Array | None, parallel: bool = False) -> Array:
        trials = _trials(recipe, tiles, stored_base, parallel)
        return jnp.where(
            jnp.isnan(trials.absmax), jnp.nan, recipe.search(trials)
        )  # whatever a search makes of it

    def parallel(tiles: Tiles, stored_base: Array | None) -> Array:
        return search(dataclasses.replace(tiles, quick=True), stored_base, parallel=True)

    def in_order(tiles: Tiles, stored_base: Array | None) -> Array:
        if not tiles.local:  # cutting them would move them between devices
            return search(tiles, stored_base)
        rounding = getattr(recipe.rounding, "scored_as", recipe.rounding)
        step = rounding.alignment(tiles) if hasattr(rounding, "alignment") else 1  # pyright: ignore
        return in_parts(search, tiles, stored_base, step=step)

    return lax.platform_dependent(tiles, stored_base, cpu=in_order, default=parallel)
