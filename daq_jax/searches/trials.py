"""Scoring candidate scales: the loop that every search runs.

By definition a search is `jax.vmap` over candidates and tiles of one score. The order of the loops is free,
and differs by machine: an accelerator scores a few candidates of all tiles at once; a CPU takes candidates
one after another, over as many tiles as its cache holds. NVIDIA GPUs have a kernel for the common cases, in
`gpu_kernel`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.metrics import Metric
from daq_jax.numerics.arithmetic import divide
from daq_jax.roundings.rounding import Rounding
from daq_jax.scales import finite_size, scale_reaching, usable
from daq_jax.tiles import Tiles

_TOGETHER = 4  # candidates that a GPU scores at once; more were no faster on an H200
_UNROLLED = 16  # candidates that a TPU's program has side by side


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
        metric: scores the kept change.
        rounding: gives the codes that are scored.
        scales: which scales may be stored.
        absmax: AbsMax scale of each tile; NaN where the base or the tuned weights are not finite.
        stored_base: the scale that the base was stored with, in this format and tiling; None if it has
            none.
        base: the scale that the base was stored with, or where it has none the base's own AbsMax scale.
        changed: whether a tile holds any change.
        fixed_sums: what the metric needs of the change alone.
    """

    tiles: Tiles
    metric: Metric
    rounding: Rounding
    scales: Callable[[Array], Array]
    absmax: Array
    stored_base: Array | None
    base: Array
    changed: Array
    fixed_sums: tuple[Array, ...]

    @classmethod
    def of(
        cls,
        tiles: Tiles,
        metric: Metric,
        rounding: Rounding,
        scales: Callable[[Array], Array],
        stored_base: Array | None,
    ) -> "Trials":
        """The trials of a pair of weights.

        Args:
            tiles: the base and the tuned weights, cut into tiles.
            metric: what scores a candidate.
            rounding: what chooses the codes that are scored.
            scales: which scales may be stored.
            stored_base: the scale of each tile that the base was stored with, or None.
        """

        def absmax(x: Array) -> Array:
            return scale_reaching(tiles.within.most(finite_size(x)), tiles.format.largest)

        return cls(
            tiles,
            metric,
            rounding,
            scales,
            absmax=absmax(jnp.where(jnp.isfinite(tiles.base), tiles.tuned, jnp.nan)),
            stored_base=stored_base,
            base=absmax(tiles.base) if stored_base is None else stored_base,
            changed=tiles.within.any(tiles.change != 0),
            fixed_sums=metric.fixed_sums(tiles, tiles.total),
        )

    def score(self, scale: Array, rounding: Rounding | None = None) -> Array:
        """Score of each tile under a scale, of the codes that `rounding` (None: that of the trials) gives."""
        values = (rounding or self.rounding)(self.tiles, scale)
        kept = self.tiles.kept(values, scale)
        score = self.metric.score_tiles(self.tiles, kept, self.fixed_sums, self.tiles.total)
        return jnp.where(self.changed, score, 0)  # all alike where nothing changed: AbsMax wins the tie

    def judged_by(self, metric: Metric, rounding: Rounding) -> "Trials":
        """The same trials under another metric, of the codes of another rounding."""
        fixed = metric.fixed_sums(self.tiles, self.tiles.total)
        return dataclasses.replace(self, metric=metric, rounding=rounding, fixed_sums=fixed)

    def at_scale(self, scale: Array) -> Trial:
        """A scale of one's own as a candidate."""
        scale = self.scales(usable(scale))
        return Trial(scale, divide(scale, self.absmax), self.score(scale))

    def at_ratio(self, ratio: Array) -> Trial:
        """The candidate `ratio * absmax`; `ratio` is float32, one for all tiles or one for each."""
        scale = self.scales(usable(ratio * self.absmax))
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
        if self.tiles.machine.tpu or not self.tiles.machine.scores_at_once:
            # A TPU's compiler sums for several candidates in one pass, if they are no batch.
            several = min(len(ratios), _UNROLLED) if self.tiles.machine.tpu else 1
            step = lambda best, ratio: (choose(best, trial(ratio)), None)  # noqa: E731
            return lax.scan(step, start, ratios, unroll=several)[0]
        for i in range(0, len(ratios), _TOGETHER):
            some = jax.vmap(trial)(ratios[i : i + _TOGETHER])
            for k in range(len(some.score)):
                start = choose(start, Trial(*(x[k] for x in some)))
        return start
