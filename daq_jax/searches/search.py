"""What a search is: it finds the scale of each tile, by asking trials."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.cpu_parts import in_parts
from daq_jax.metrics import Metric
from daq_jax.numerics.arithmetic import LARGEST_SQUARED
from daq_jax.roundings.rounding import Rounding
from daq_jax.searches.trials import Trials
from daq_jax.tiles import Tiles


class Search(abc.ABC):
    """Finds one scale per tile.

    A plain function `(trials) -> scales` serves as well: a `Recipe` turns it into a search with the defaults
    below. Subclasses are frozen, hashable dataclasses; they override what differs.

    Attributes:
        in_lines: whether it asks only `trials`, and reduces over tiles by `Tiles.total` and `Tiles.within`
            alone, so that a TPU may cut a weight into lines of tiles (`daq_jax.tilings.TileView.lines`).
    """

    in_lines: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, trials: Trials) -> Array:
        """The scale of each tile, float32, in the shape of `trials.absmax`."""

    @property
    def is_tile_local(self) -> bool:
        """Whether the scale of a tile depends on that tile alone, so that shards may be searched apart."""
        return False

    @property
    def reads_metric(self) -> bool:
        """Whether the metric of the recipe decides anything; if not, a metric of one's own is warned of."""
        return True

    def judged(self, rounding: Rounding) -> Rounding:
        """The rounding whose codes are scored, given that of the recipe."""
        return rounding.scored_as()


@dataclasses.dataclass(frozen=True)
class OfFunction(Search):
    """The search that a plain function of the signature is."""

    function: Callable[[Trials], Array]

    def __call__(self, trials: Trials) -> Array:
        return self.function(trials)


def as_search(value: Callable[[Trials], Array]) -> Search:
    """A search, or a plain function as one."""
    return value if isinstance(value, Search) else OfFunction(value)


def find_scales(
    search: Search,
    metric: Metric,
    rounding: Rounding,
    scales: Callable[[Array], Array],
    tiles: Tiles,
    stored_base: Array | None,
) -> Array:
    """The scales that a search picks, by the order of loops that suits the machine.

    Args:
        search: finds the scales.
        metric: scores the kept change.
        rounding: that of the recipe; `search.judged` says which rounding's codes are scored.
        scales: which scales may be stored.
        tiles: the pair of weights.
        stored_base: the scale of each tile that the base was stored with, or None.

    Returns:
        Float32, in a shape that broadcasts over the tiles; NaN for a tile that is not finite.
    """
    judged = search.judged(rounding)

    def run(tiles: Tiles, stored_base: Array | None) -> Array:
        trials = Trials.of(tiles, metric, judged, scales, stored_base)
        refused = jnp.isnan(trials.absmax)
        if rounding.squares:  # whose sums would leave float32
            size = jnp.maximum(jnp.abs(tiles.base), jnp.abs(tiles.tuned))
            refused |= tiles.within.most(size) > LARGEST_SQUARED
        return jnp.where(refused, jnp.nan, search(trials))  # whatever a search makes of it

    def at_once(tiles: Tiles, stored_base: Array | None) -> Array:
        machine = dataclasses.replace(tiles.machine, scores_at_once=True)
        return run(dataclasses.replace(tiles, machine=machine), stored_base)

    def in_order(tiles: Tiles, stored_base: Array | None) -> Array:
        # Parts of a sharded weight would move between devices, and some must see the whole.
        whole = judged.scope == "matrix" or not search.is_tile_local
        if whole or not tiles.machine.one_device:
            return run(tiles, stored_base)
        return in_parts(run, tiles, stored_base, step=judged.alignment(tiles))

    if tiles.machine.tpu:
        return at_once(tiles, stored_base)
    return lax.platform_dependent(tiles, stored_base, cpu=in_order, default=at_once)
