"""Which scale each tile gets: candidates around AbsMax, scored by the codes they would store.

A search takes `Trials` and returns one scale per tile. `Trials` holds the AbsMax scale and scores any other;
a candidate is a ratio to the AbsMax scale. All searches here also try AbsMax itself. Of equal scores the
ratio nearest 1 wins, then the smaller, so a tile in which nothing changed keeps its AbsMax scale.

By definition a search is `jax.vmap` over candidates and tiles of one score. The order of the loops is free:
`Trials.best` holds it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from daq_jax.arithmetic import divide, total
from daq_jax.metrics import Additive, Metric
from daq_jax.roundings import Rounding, Tiles
from daq_jax.scales import usable


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
    """What a search may ask.

    Attributes:
        tiles: the pair of weights, cut into tiles.
        changed: whether a tile holds any change, in a shape that broadcasts over the tiles.
        absmax: AbsMax scale of each tile, in that shape too.
        base: the scale that the base was stored with, or the base's own AbsMax scale.
        metric: `(d, q) -> score per tile`.
        rounding: `(tiles, scale) -> code values`.
        allowed: `scale -> the scale to store in its place`.
    """

    tiles: Tiles
    changed: Array
    absmax: Array
    base: Array
    metric: Metric
    rounding: Rounding
    allowed: Callable[[Array], Array]

    def score(self, scale: Array, rounding: Rounding | None = None) -> Array:
        """Score of each tile under a scale, of the codes that `rounding` (the recipe's) would store."""
        values = (rounding or self.rounding)(self.tiles, scale)
        view, d, q = self.tiles.view, self.tiles.change, self.tiles.kept(values, scale)
        if isinstance(self.metric, Additive):
            score = self.metric.score(*(total(x, view.tile_axes) for x in self.metric.terms(d, q)))
        else:
            score = view.spread(self.metric(view.flat(d), view.flat(q)).reshape(view.grid))
        return jnp.where(self.changed, score, 0)  # all alike where nothing changed: AbsMax wins the tie

    def at_scale(self, scale: Array) -> Trial:
        """A scale of one's own as a candidate."""
        scale = self.allowed(usable(scale))
        return Trial(scale, divide(scale, self.absmax), self.score(scale))

    def at_ratio(self, ratio: Array) -> Trial:
        """The candidate `ratio * absmax`; `ratio` is float32, one for all tiles or one for each."""
        scale = self.allowed(usable(ratio * self.absmax))
        return Trial(scale, jnp.broadcast_to(ratio, scale.shape), self.score(scale))

    def best(self, ratios: Array, start: Trial | None = None) -> Trial:
        """The best of several ratios, and of `start`.

        Args:
            ratios: `[N]` for all tiles, or `[N, ...]` with one for each tile; float32.
            start: a candidate that stays in play.
        """
        if start is None:
            start, ratios = self.at_ratio(ratios[0]), ratios[1:]

        def step(best: Trial, ratio: Array) -> tuple[Trial, None]:
            return better(best, self.at_ratio(ratio)), None

        return jax.lax.scan(step, start, ratios)[0]


Search = Callable[[Trials], Array]  # -> scale per tile, in the shape of `Trials.absmax`


def _check_range(search: object, low: float, high: float, **counts: int) -> None:
    name = type(search).__name__
    if not 0 < low <= high < float("inf"):
        raise ValueError(f"{name}: ratios must satisfy 0 < low <= high; got low={low}, high={high}.")
    for word, n in counts.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise ValueError(f"{name}: `{word}` must be a whole number of at least 2; got {n!r}.")


def _one(trials: Trials) -> Trial:
    return trials.at_ratio(jnp.float32(1))


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """No search: the smallest scale at which nothing saturates."""

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return trials.allowed(trials.absmax)


@dataclasses.dataclass(frozen=True)
class Grid:
    """`n` ratios evenly spaced from `low` to `high`, both included, and AbsMax."""

    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high, n=self.n)

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        ratios = np.linspace(self.low, self.high, self.n).astype(np.float32)
        return trials.best(jnp.asarray(ratios), _one(trials)).scale


@dataclasses.dataclass(frozen=True)
class CoarseToFine:
    """A coarse grid of ratios, then a fine one around its winner, which stays in play, and AbsMax.

    The fine points run from half a coarse step below the winner to half a step above, within the range.
    With 5 and 10 points a tile is scored 16 times. Source: arXiv:2603.22324.
    """

    low: float
    high: float
    coarse: int
    fine: int

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high, coarse=self.coarse, fine=self.fine)

    @property
    def coarse_ratios(self) -> np.ndarray:
        """`[coarse]` float32."""
        return np.linspace(self.low, self.high, self.coarse).astype(np.float32)

    @property
    def fine_ratios(self) -> np.ndarray:
        """`[fine, coarse]` float32: the fine points for each winner of the coarse grid."""
        winners = np.linspace(self.low, self.high, self.coarse)
        half = (self.high - self.low) / (self.coarse - 1) / 2
        lows, highs = np.maximum(winners - half, self.low), np.minimum(winners + half, self.high)
        return np.linspace(lows, highs, self.fine).astype(np.float32)

    def around(self, winner: Array) -> Array:
        """`[fine, ...]`: the fine points of each tile, given the ratio that won its coarse grid."""
        index = jnp.searchsorted(jnp.asarray(self.coarse_ratios), winner)
        return jnp.asarray(self.fine_ratios)[:, index]

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        winner = trials.best(jnp.asarray(self.coarse_ratios))
        return trials.best(self.around(winner.ratio), better(_one(trials), winner)).scale


@dataclasses.dataclass(frozen=True)
class WithBaseScale:
    """Another search, with the scale of the base as one more candidate.

    That is the scale the base was stored with if it came as a `QTensor` of the same tiling and format, and
    its AbsMax scale otherwise. On a base that was shipped in FP8 this is the very grid the base lies on.
    """

    search: Search

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return better(trials.at_scale(self.search(trials)), trials.at_scale(trials.base)).scale


@dataclasses.dataclass(frozen=True)
class Released:
    """The coarse-to-fine search of the program released with arXiv:2603.22324, as it is, for comparison.

    It differs from `CoarseToFine` in three ways that cost quality: candidates are scored with weights that
    were rounded to whole numbers before they were rounded to the format; the lowest ratio wins a tie, so a
    tile without change is clipped; and the winner of the coarse grid is not tried again among the fine ones.
    """

    low: float = 0.8
    high: float = 1.5
    coarse: int = 5
    fine: int = 10

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""

        def first_best(ratios: Array) -> Trial:
            def step(best: Trial, ratio: Array) -> tuple[Trial, None]:
                new = self._trial(trials, ratio)
                return Trial(
                    *(jnp.where(new.score > best.score, y, x) for x, y in zip(best, new, strict=True))
                ), None

            return jax.lax.scan(step, self._trial(trials, ratios[0]), ratios[1:])[0]

        grid = CoarseToFine(self.low, self.high, self.coarse, self.fine)
        winner = first_best(grid.around(first_best(jnp.asarray(grid.coarse_ratios)).ratio))
        one = self._trial(trials, jnp.float32(1))
        return jnp.where(winner.score < one.score, one.scale, winner.scale)

    def _trial(self, trials: Trials, ratio: Array) -> Trial:
        scale = trials.allowed(usable(ratio * trials.absmax))
        return Trial(scale, jnp.broadcast_to(ratio, scale.shape), trials.score(scale, _twice))


def _twice(tiles: Tiles, scale: Array) -> Array:
    """Rounds to whole numbers first and then to the format."""
    return tiles.format.round(jnp.round(divide(tiles.tuned, scale)))
