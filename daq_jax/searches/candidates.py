"""Which scale each tile gets: candidates around AbsMax, scored by the codes they would store.

A search takes `Trials` and returns one scale per tile. `Trials` holds the AbsMax scale and scores any other;
a candidate is a ratio to the AbsMax scale. All searches here also try AbsMax itself. Of equal scores the
ratio nearest 1 wins, then the smaller, so a tile in which nothing changed keeps its AbsMax scale.

`Search` says what a search of one's own may declare; a plain function of that signature is one too.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from daq_jax.errors import DaqError, check_whole_numbers
from daq_jax.metrics import neg_bias, neg_error
from daq_jax.numerics.arithmetic import divide
from daq_jax.roundings.nearest import Nearest
from daq_jax.roundings.rounding import Rounding
from daq_jax.scales import usable
from daq_jax.searches.search import Search, as_search
from daq_jax.searches.trials import Trial, Trials, better
from daq_jax.tiles import Tiles


def _check_range(search: object, low: float, high: float, **counts: int) -> None:
    if not 0 < low <= high < float("inf"):
        name = type(search).__name__
        raise DaqError(f"{name}: ratios must satisfy 0 < low <= high; got low={low}, high={high}.")
    check_whole_numbers(search, least=2, **counts)


def _one(trials: Trials) -> Trial:
    return trials.at_ratio(jnp.float32(1))


@dataclasses.dataclass(frozen=True)
class AbsMax(Search):
    """No search: the smallest scale at which nothing saturates."""

    in_lines = True

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    @property
    def reads_metric(self) -> bool:
        """See `Search`."""
        return False

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return trials.scales(trials.absmax)


@dataclasses.dataclass(frozen=True)
class Grid(Search):
    """`n` ratios evenly spaced from `low` to `high`, both included, and AbsMax.

    Attributes:
        low: smallest ratio to the AbsMax scale.
        high: largest ratio to the AbsMax scale.
        n: number of ratios, at least 2.
    """

    in_lines = True

    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high, n=self.n)

    @property
    def ratios(self) -> np.ndarray:
        """`[n]` float32."""
        return np.linspace(self.low, self.high, self.n).astype(np.float32)

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return trials.best(jnp.asarray(self.ratios), _one(trials)).scale


@dataclasses.dataclass(frozen=True)
class CoarseToFine(Search):
    """A coarse grid of ratios, then a fine one around its winner, which stays in play, and AbsMax.

    The fine points run from half a coarse step below the winner to half a step above, within the range.
    With 5 and 10 points a tile is scored 16 times. Source: arXiv:2603.22324.

    Attributes:
        low: smallest ratio to the AbsMax scale.
        high: largest ratio to the AbsMax scale.
        coarse: number of ratios of the coarse grid, at least 2.
        fine: number of ratios of the fine grid, at least 2.
    """

    in_lines = True

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

        def choose(chosen: Array, point: tuple[Array, Array]) -> tuple[Array, None]:
            ratio, around = point
            return jnp.where(winner <= ratio, around.reshape(-1, *[1] * winner.ndim), chosen), None

        # A choice for each coarse ratio, the largest first, no table: a TPU looks up one element at a time.
        points = jnp.asarray(self.coarse_ratios[::-1]), jnp.asarray(self.fine_ratios.T[::-1])
        last = jnp.broadcast_to(points[1][0].reshape(-1, *[1] * winner.ndim), (self.fine, *winner.shape))
        last = jnp.where(winner > 0, last, last)  # inside `shard_map` as device-varying as the loop makes it
        return lax.scan(choose, last, points, unroll=min(self.coarse, 16))[0]

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        winner = trials.best(jnp.asarray(self.coarse_ratios))
        return trials.best(self.around(winner.ratio), better(_one(trials), winner)).scale


@dataclasses.dataclass(frozen=True)
class WithBaseScale(Search):
    """Another search, with the scale of the base as one more candidate.

    The scale of the base is the one it was stored with if it came as a `QTensor` of the same tiling and
    format, and its AbsMax scale otherwise. A base that was shipped in FP8 is on the grid of that scale.

    Attributes:
        search: the other search, or a plain function of its signature.
    """

    search: Callable[[Trials], Array]

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return as_search(self.search).is_tile_local

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return better(trials.at_scale(self.search(trials)), trials.at_scale(trials.base)).scale


@dataclasses.dataclass(frozen=True)
class OffGrid(Search):
    """Keeps the AbsMax scale unless its grid pulls the change back to the base.

    If the base is on the AbsMax grid, as a model shipped in FP8 is, every weight starts on a code and a small
    change rounds back to it: the kept change is biased towards zero. A larger scale removes the bias and adds
    ordinary rounding noise. For each tile:

    1. Among AbsMax and `n` ratios in `[low, high]`, the scale of least bias is taken (`NegBias`: a bias
       within two standard deviations of the noise counts as none, and ties go to AbsMax).
    2. If the squared error under that scale exceeds `noise` times the squared change, the change is too small
       to pay for the noise. The tile gets the AbsMax scale or the base's own, whichever errs less, and the
       bias is left to an unbiased rounding such as `UnbiasedFeedback`.

    The metric and the rounding of the recipe play no part: both steps score the nearest codes.

    Attributes:
        low: smallest ratio to the AbsMax scale that is tried.
        high: largest ratio to the AbsMax scale that is tried.
        n: number of ratios, evenly spaced from `low` to `high`.
        noise: most squared error that is accepted, in units of the squared change; chosen by the study in
            docs/design/behaviour.md.
    """

    in_lines = True

    low: float = 1.05
    high: float = 1.5
    n: int = 4
    noise: float = 8.0

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high, n=self.n)
        if not self.noise >= 0:
            raise DaqError(f"OffGrid: `noise` must be 0 or more; got {self.noise!r}.")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios that are tried beside AbsMax, float32 values."""
        return tuple(float(r) for r in np.linspace(self.low, self.high, self.n).astype(np.float32))

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    @property
    def reads_metric(self) -> bool:
        """See `Search`."""
        return False

    def judged(self, rounding: Rounding) -> Rounding:
        """The rounding of both metrics of this search, whatever the recipe has."""
        return Nearest()

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        biased, wrong = (trials.judged_by(metric, Nearest()) for metric in (neg_bias, neg_error))
        least_biased = biased.best(jnp.asarray(self.ratios, jnp.float32), _one(biased))
        on_grid = better(_one(wrong), wrong.at_scale(trials.base))
        noisy = wrong.at_ratio(least_biased.ratio).score < -self.noise
        return jnp.where(noisy, on_grid.scale, least_biased.scale)


@dataclasses.dataclass(frozen=True)
class Released(Search):
    """The coarse-to-fine search of the program released with arXiv:2603.22324, as it is, for comparison.

    It differs from `CoarseToFine` in three ways that cost quality: candidates are scored with weights that
    were rounded to whole numbers before they were rounded to the format; the lowest ratio wins a tie, so a
    tile without change is clipped; and the winner of the coarse grid is not tried again among the fine ones.
    """

    in_lines = True

    low: float = 0.8
    high: float = 1.5
    coarse: int = 5
    fine: int = 10

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""

        def trial(ratio: Array) -> Trial:
            return self._trial(trials, ratio)

        def first_best(ratios: Array) -> Trial:
            return trials.fold(_higher, trial(ratios[0]), ratios[1:], trial)

        grid = CoarseToFine(self.low, self.high, self.coarse, self.fine)
        winner = first_best(grid.around(first_best(jnp.asarray(grid.coarse_ratios)).ratio))
        one = trial(jnp.float32(1))
        return jnp.where(winner.score < one.score, one.scale, winner.scale)

    def _trial(self, trials: Trials, ratio: Array) -> Trial:
        scale = trials.scales(usable(ratio * trials.absmax))
        return Trial(scale, jnp.broadcast_to(ratio, scale.shape), trials.score(scale, _Twice()))


def _higher(a: Trial, b: Trial) -> Trial:
    """Tile by tile the one with the higher score, the first of equals."""
    return Trial(*(jnp.where(b.score > a.score, y, x) for x, y in zip(a, b, strict=True)))


@dataclasses.dataclass(frozen=True)
class _Twice(Rounding):
    """Rounds to whole numbers first and then to the format."""

    scope = "tile"
    in_lines = True

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """See `Rounding`."""
        return tiles.format.round(jnp.round(divide(tiles.tuned, scale)))
