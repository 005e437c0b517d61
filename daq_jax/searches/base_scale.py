"""The search that keeps the grid of the base: its own scale, and clips what has grown beyond it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.cpu_parts import in_parts
from daq_jax.errors import DaqError
from daq_jax.formats import Format, Integer, weights_of
from daq_jax.grids.fitting import fitted_scale
from daq_jax.grids.membership import is_native
from daq_jax.numerics.arithmetic import divide, power_below
from daq_jax.roundings.carriers import REACH, carry, every_nth
from daq_jax.roundings.dithered import pair_of
from daq_jax.roundings.nearest import Nearest
from daq_jax.roundings.rounding import Rounding
from daq_jax.roundings.row_blocks import RowBlocks
from daq_jax.scales import usable
from daq_jax.searches.search import Search
from daq_jax.searches.trials import Trials
from daq_jax.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class BaseScale(Search):
    """Keeps the scale of the base, so that a tile of a native base stays on its grid.

    For each tile:

    1. A base that came as a `QTensor` of the same tiling and format has a stored scale: that one.
    2. Otherwise the scale is fitted to the weights of the base: see `daq_jax.grids.fitting`. Powers of two
       and scales that are numbers of FP8 are found too, and so are bases stored in bfloat16.
    3. A base that is not on the grid of the fitted scale (`daq_jax.grids.membership.is_native`), and a tile
       of zeros that tuning changed, get the AbsMax scale of the tuned weights.
    4. Tuned weights beyond the largest code are clipped. Only if the squared error of clipping alone exceeds
       that of nearest rounding at the AbsMax scale does the tile get the AbsMax scale.

    With `off_grid` a whole matrix may leave the grid of its base: to a scale that is a little above both the
    AbsMax scale and that of the base, if such scales may be stored and nearest rounding there errs less, in
    squares, than a change costs on the grid of the base (`daq_jax.roundings.carriers`). That is so for large
    changes in FP8. The errors are those of a sample of the columns.

    A tile without change keeps the scale of its base. Where a native base came as an array, several scales
    may give the weights of a small tile, as 2 times 1 and 1 times 2 do. The fitted scale and its codes are
    then one such choice, not always those that the base was made with, and its weights are those of the base
    to a unit in the last place of float32.

    The metric and the rounding of the recipe play no part.

    Attributes:
        off_grid: ratio of a scale off the grid of the base to the larger of the AbsMax scale and that of the
            base, from 1 to 2; None for none.
            "by format" is 1.19, and nearer to 1 where steps are even and many: 1.03 for int8. Errors grow
            with the ratio, and codes of many steps are off the old ones soon.
    """

    in_lines = True

    off_grid: float | Literal["by format"] | None = None

    def __post_init__(self) -> None:
        if self.off_grid not in (None, "by format") and not (
            isinstance(self.off_grid, float | int) and 1 <= self.off_grid <= 2
        ):
            raise DaqError(
                f'`off_grid` must be None, "by format" or a number from 1 to 2; got {self.off_grid!r}.'
            )

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return self.off_grid is None

    @property
    def reads_metric(self) -> bool:
        """See `Search`."""
        return False

    def judged(self, rounding: Rounding) -> Rounding:
        """No codes but nearest ones are looked at, whatever rounding the recipe has."""
        return Nearest()

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        tiles, absmax = trials.tiles, trials.scales(trials.absmax)
        stored = None if trials.stored_base is None else trials.scales(usable(trials.stored_base))
        on_grid = functools.partial(_on_grid, trials.scales)
        if self.off_grid is None:
            return on_grid(tiles, absmax, stored)[0]
        alone = tiles.machine.scores_at_once or not tiles.machine.one_device
        scale, known = on_grid(tiles, absmax, stored) if alone else in_parts(on_grid, tiles, absmax, stored)
        ratio = _ratio_of(tiles.format) if self.off_grid == "by format" else self.off_grid
        beside = trials.scales(usable(ratio * jnp.maximum(trials.absmax, scale)))
        ratio = divide(beside, scale)
        changed = known & trials.changed
        may_leave = changed & (ratio != power_below(ratio))  # an octave on the grid is the same
        beside = jnp.where(may_leave, beside, scale)
        return jnp.where(_errs_less(tiles, beside, scale, changed), beside, scale)


def _ratio_of(number: Format) -> float:
    """How far a scale off the grid of the base is above the AbsMax scale, as measured in `docs/design`."""
    return 1 + 0.7 / number.largest ** (2 / 3) if isinstance(number, Integer) else 1.19


def _on_grid(
    storable: Callable[[Array], Array], tiles: Tiles, absmax: Array, stored: Array | None
) -> tuple[Array, Array]:
    """The scale of each tile, if it keeps its grid or has none, and whether its base lies on a grid."""
    changed = tiles.within.any(tiles.change != 0)
    scale, known = stored, jnp.ones_like(changed)
    if scale is None:
        scale = fitted_scale(tiles.base, tiles.within, tiles.format, tiles.stored_base.dtype, storable)
        known = is_native(tiles, scale)
    kept = tiles.within.any(tiles.base != 0) & ~_clips_too_much(tiles, scale, absmax)
    return jnp.where(known & (kept | ~changed), scale, absmax), known


def _clips_too_much(tiles: Tiles, scale: Array, absmax: Array) -> Array:
    """Whether clipping at `scale` errs more than nearest rounding at `absmax`, in squares, tile by tile."""
    unit = 1 / absmax  # squares of weights might leave float32
    beyond = jnp.maximum(jnp.abs(tiles.tuned) - tiles.format.largest * scale, 0)
    error = weights_of(Nearest()(tiles, absmax), absmax) - tiles.tuned
    return tiles.total((beyond * unit) ** 2) > tiles.total((error * unit) ** 2)


def _errs_less(tiles: Tiles, beside: Array, scale: Array, native: Array) -> Array:
    """Whether nearest rounding at `beside` errs less than changes cost at `scale`, matrix by matrix."""
    blocks, number = RowBlocks.of(tiles), tiles.format
    on, off = (every_nth(pair_of(blocks, x, native)) for x in (scale, beside))
    carried = carry(number, on, REACH)
    error = weights_of(number.round(divide(off.tuned, off.scale)), off.scale) - off.tuned
    missed = jnp.sum(error * error, (1, 2, 3), keepdims=True)
    return tiles.per_matrix(missed < carried.plain + carried.excess)
