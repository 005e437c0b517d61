"""Error feedback: later rows of a matrix make up for the rounding errors of earlier rows.

A weight acts as `x W`. Once the error of a row is known, the next rows can be rounded so that the effect of
that error on `x W` cancels, in the directions of `x` that matter most. Adaptive rounding with linear feedback
does this with the second moments of calibration inputs (GPTQ, arXiv:2210.17323; LDLQ, arXiv:2307.13304). Here
there is no data, but there is a fine-tune. A gradient step is a sum of products of inputs and output
gradients, so the left singular directions of the change are directions of the inputs, and `d d'` stands for
the second moments `x' x`.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.cpu_parts import in_parts_on_cpu
from daq_jax.errors import DaqError, check_whole_numbers
from daq_jax.formats import weights_of
from daq_jax.numerics.arithmetic import divide, power_below
from daq_jax.numerics.linalg import leading_directions
from daq_jax.roundings.feedback_plan import Plan, over_strips
from daq_jax.roundings.gain_rule import GainRule
from daq_jax.roundings.gains import Per, UnbiasedGain, target_of
from daq_jax.roundings.rounding import Rounding
from daq_jax.roundings.row_blocks import RowBlocks
from daq_jax.tiles import Tiles

_AS_STORED = 1.5  # times the square of a step of bfloat16: what rounding such weights to nearest may cost


@dataclasses.dataclass(frozen=True)
class UnbiasedFeedback(Rounding):
    """`UnbiasedGain`, and then each row block makes up for the errors of the row blocks before it.

    Minimizes `tr(e' H e)` for the error `e` `[R, C]` against the tuned weights, with
    `H = U U' d d' U U' + m I`: `U` are the `rank` leading left singular directions of the change `d`, and `m`
    is `damping` times the mean of the other eigenvalues of `d d'`. There is one pass over the rows, in up to
    64 row blocks. With `s = U' e` of the rows done, the next block aims at `base + g d - K s`, where `K` is
    the best response if the rows left could take any value. A change without leading directions, such as
    random noise, is hardly corrected. Each strip of 128 outputs is held to the size of its change: where the
    change kept so far is clearly too large or too small, the gains of the next block are smaller or larger.

    A gain keeps the largest changes at full size and drops the others. That is wrong where changes are single
    steps of bfloat16, whose sizes only tell how the weights were stored. A tile of bfloat16 numbers that
    nearest rounding moves by less than their steps, as on the grid of its base, is therefore rounded by a
    dither in place of a gain: thresholds between neighbouring codes, spread evenly over the matrix, for the
    weights that changed.

    Sees the whole matrix. On a weight sharded over its outputs, in whole strips, only the search for `U`
    communicates; one that is sharded over its inputs is moved to shards of outputs first. A search scores the
    gain alone.
    Products may run in bfloat16 or TF32: errors are taken after rounding, so the error of a correction is
    corrected like any other error.

    Deterministic. Rounds once more than `UnbiasedGain`.

    Attributes:
        rank: number of directions, at most half of the matrix's rows.
        per: the elements that share a gain; see `UnbiasedGain`.
        damping: weight of error in general against error in the leading directions. A smaller value corrects
            more and adds more error elsewhere. 10 is the choice of docs/design/behaviour.md.
    """

    multiplies = True
    squares = True
    bytes_per_element = 38  # 33 by XLA's own account

    rank: int = 128
    per: Per = "row"
    damping: float = 10.0

    def __post_init__(self) -> None:
        UnbiasedGain(self.per)  # checks `per`
        check_whole_numbers(self, rank=self.rank)
        if not (isinstance(self.damping, float | int) and 0 < self.damping < math.inf):
            raise DaqError(f"`damping` must be a number above 0; got {self.damping!r}.")

    def scored_as(self) -> UnbiasedGain:
        """The rounding that a search scores, tile by tile."""
        return UnbiasedGain(self.per)

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        moved = jnp.any(tiles.change != 0, tiles.axes, keepdims=True)  # a tile without change is left alone
        as_stored = in_parts_on_cpu(_as_stored, tiles, scale, step=1)
        rounding = self.scored_as()
        gain = in_parts_on_cpu(rounding.gains, tiles, scale, step=rounding.alignment(tiles))
        dithered = moved & as_stored
        gain = jnp.where(dithered, 1, gain)
        tiles, gain = lax.optimization_barrier((tiles, gain))
        blocks = RowBlocks.of(tiles)
        target, base, tuned, change = map(
            blocks.whole, (target_of(tiles, gain), tiles.stored_base, tiles.stored_tuned, tiles.change)
        )
        directions, _ = leading_directions(change, blocks.rank(self.rank))
        left = over_strips(change * change)
        plan = Plan(
            (target, base, tuned),
            tuple(map(blocks.by_row_of_tiles, (scale, moved, dithered))),
            (left,),
            blocks.responses(change, directions, self.damping),
            directions,
        )
        return blocks.round(GainRule(), plan)


def _as_stored(tiles: Tiles, scale: Array) -> Array:
    """Whether a tile holds bfloat16 numbers, in any dtype, that nearest rounding moves by under a step."""
    bits = lax.bitcast_convert_type(tiles.tuned, jnp.int32)  # a cast and back may be optimized away
    step = power_below(tiles.tuned) * 2.0**-7
    error = weights_of(tiles.format.round(divide(tiles.tuned, scale)), scale) - tiles.tuned
    excess = jnp.sum(error * error - _AS_STORED * step * step, tiles.axes, keepdims=True)
    return jnp.all(bits & 0xFFFF == 0, tiles.axes, keepdims=True) & (excess < 0)
