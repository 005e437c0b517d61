"""Rounding that keeps a change on the grid of its base by as few moves as will do, with error feedback."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.errors import DaqError, check_whole_numbers
from daq_jax.formats import Format, dither, weights_of
from daq_jax.grids.membership import half_unit, is_native
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.linalg import leading_directions, rough
from daq_jax.roundings.carriers import REACH, Pair, carry, coherence, worth_keeping
from daq_jax.roundings.feedback_plan import Plan, Rows, Rule
from daq_jax.roundings.rounding import Rounding
from daq_jax.roundings.row_blocks import RowBlocks
from daq_jax.tiles import Tiles

_FEW = 2.0  # moves of a column at which corrections are half
_LEAST = 2.0**-16  # threshold of the dither, in steps


@dataclasses.dataclass(frozen=True)
class DitheredFeedback(Rounding):
    """Keeps the change on average in every row and column, corrects it where it acts, and moves little else.

    Of a tile whose base lies on the grid of its scale, as that of a model shipped in FP8 or in 4-bit blocks,
    the weights with small steps carry the change (`carriers`): the mean move of each is such that every row
    and every column keeps its change, and a dither, with thresholds spread evenly over the matrix, turns mean
    moves into codes. Other tiles are rounded to nearest. In both, each row block makes up for the errors of
    the row blocks before it in the leading directions of the change, as in `UnbiasedFeedback`. On the grid
    of the base a correction never exceeds what a weight is moved anyway, since there it costs nothing; and it
    fades where a column has few moves, since a limit that stops what follows a move, and not what follows
    none, would keep more than the change.

    A change without leading directions, such as random noise, is worth less than the noise of keeping it.
    How much of the change to keep follows from its singular values, and where that is nothing the weights are
    rounded to nearest.

    Sees the whole matrix. On a weight sharded over its outputs, in whole strips of 128, sums over rows and
    the search for directions communicate; one that is sharded over its inputs is moved to shards of outputs
    first (`daq_jax.tilings.over_outputs`).

    Deterministic.

    Attributes:
        rank: number of directions, at most half of the matrix's rows.
        damping: weight of error in general against error in the leading directions; see `UnbiasedFeedback`.
        reach: how large a step may be, in units of the change that a weight would carry, for the weight to
            carry at all. A smaller value leaves fewer weights with more to carry.
    """

    multiplies = True
    squares = True
    in_lines = True
    bytes_per_element = 56  # 56 by XLA's own account, on a CPU

    rank: int = 128
    damping: float = 3.0
    reach: float = REACH

    def __post_init__(self) -> None:
        check_whole_numbers(self, rank=self.rank)
        for name in ("damping", "reach"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and 0 < value < math.inf):
                raise DaqError(f"`{name}` must be a number above 0; got {value!r}.")

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        blocks, moved = RowBlocks.of(tiles), tiles.within.any(tiles.change != 0)
        native = is_native(tiles, scale)
        pair = pair_of(blocks, scale, native & moved)
        carried = carry(tiles.format, pair, self.reach)
        base, tuned, change = map(blocks.whole, (tiles.stored_base, tiles.stored_tuned, tiles.change))
        directions, _ = leading_directions(change, blocks.rank(self.rank))
        keep = worth_keeping(carried, coherence_of(change, directions, blocks.rows), pair.native)
        on_grid = pair.native & (keep > 0)
        move = jnp.where(on_grid, keep * carried.move, carried.move)
        still = jnp.broadcast_to(on_grid, pair.scale.shape) | ~by_rows(blocks, moved)
        damping = self.damping * (1 + jnp.squeeze(carried.price, (1, 2, 3)))
        per_column = jnp.squeeze(carried.moves, (1, 2, 3)) / change.shape[-1]
        answered = jnp.where(jnp.any(on_grid, (1, 2, 3)), per_column / (per_column + _FEW), 1)
        responses = blocks.responses(change, directions, damping) * answered[:, None, None, None]
        plan = Plan(
            (blocks.filled(move.reshape(len(move), -1, move.shape[-1])), base, tuned),
            tuple(jnp.squeeze(x, 2) for x in (pair.scale, still, jnp.where(on_grid, keep, 1))),
            (),
            jnp.where(keep > 0, responses, 0),
            directions,
        )
        return blocks.round(DitherRule(), plan)


@dataclasses.dataclass(frozen=True)
class DitherRule(Rule):
    """A dither about the moved base on its grid, within what a weight is moved anyway; else nearest codes.

    Elements of the plan: `move` (float32, the mean move of each weight), `base`, `tuned` (weights as stored).
    Tiles: `scale` (float32, weight units per code unit), `native` (whether weights move on the base's grid),
    `keep` (the share of the change that is to be kept).
    """

    def round(self, number: Format, rows: Rows, response: Array, block: tuple) -> Float[Array, "..."]:
        """See `Rule`."""
        move, base, tuned = rows.elements
        scale, native, _ = rows.tiles
        change, limit = tuned - base, jnp.abs(move)
        gain = jnp.where(change != 0, move / jnp.where(change != 0, change, 1), 0)
        correction = jnp.clip(gain * response, -limit, limit)
        code = number.round(divide(base, scale))
        thresholds = jnp.maximum(rows.thresholds, _LEAST)  # what is on a code but for rounding stays there
        moved = dither(number, code + divide(move - correction, scale), thresholds)
        nearest = number.round(divide(tuned - response, scale))
        return jnp.where(native, jnp.where(change != 0, moved, code), nearest)

    def error(self, rows: Rows, values: Array) -> Float[Array, "..."]:
        """See `Rule`."""
        _, base, tuned = rows.elements
        scale, _, keep = rows.tiles
        return weights_of(values, scale) - (tuned - (1 - keep) * (tuned - base))


def by_rows(blocks: RowBlocks, per_tile: Array) -> Array:
    """What has the shape of a scale as `[B, t, 1, C]`."""
    return blocks.by_row_of_tiles(per_tile)[:, :, None]


def pair_of(blocks: RowBlocks, scale: Array, native: Array) -> Pair:
    """The weights of cut matrices by rows of tiles."""
    tiles = blocks.cut

    def elements(x: Array) -> Array:
        x = tiles.as_matrix(x)
        return x.reshape(len(x), -1, blocks.height, x.shape[-1])

    scale, native = (by_rows(blocks, x) for x in (scale, native))
    dtype, form = tiles.stored_tuned.dtype, jnp.finfo(tiles.stored_tuned.dtype)
    unit = 2 * half_unit(tiles.tuned, dtype)
    held = tiles.base == lax.reduce_precision(tiles.base, form.nexp, form.nmant)
    both = tiles.stored_base.dtype == dtype
    base, tuned, unit, held = map(elements, (tiles.base, tiles.tuned, unit, held))
    return Pair(base, tuned, scale, native, unit, held, both)


def coherence_of(change: Array, directions: Array, rows: int) -> Array:
    """`coherence`, given the leading left singular directions of the change `[B, R, C]`."""
    return coherence(rough(directions.mT, change), jnp.sum(change * change, (1, 2)), rows)
