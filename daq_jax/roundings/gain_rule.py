"""The rule of `UnbiasedFeedback`: rows aim at gains, and at the size of what the rows before them kept."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from daq_jax.formats import Format, dither, weights_of
from daq_jax.numerics.arithmetic import divide
from daq_jax.roundings.feedback_plan import Rows, Rule

# The three limits below were chosen by the behaviour study; docs/design/behaviour.md says what others did.
_TOLERATED = 2.0  # standard deviations of a strip's kept change that are left uncorrected
_NEAR = 0.04  # share of a strip's change that is left uncorrected: a correction is itself an error
_MOST_MORE = 0.15  # largest relative correction of a gain, up or down


@dataclasses.dataclass(frozen=True)
class GainRule(Rule):
    """Codes nearest to a target less the response, or around it by a dither.

    Elements of the plan: `target` (float32, what rounding aims at before any correction), `base`, `tuned`
    (weights as stored). Tiles: `scale` (float32, weight units per code unit), `moved` (whether tuning changed
    the tile; without change there is no correction), `dithered` (whether a dither stands in for a gain).
    Strips: `d^2`.
    """

    def start(self, strips: tuple[Array, ...]) -> "Size":
        """See `Rule`."""
        return Size.before(*strips)

    def before_block(self, state: "Size") -> Array:
        """The factor on the gains of the block."""
        return state.correction()

    def round(self, number: Format, rows: Rows, response: Array, block: Array) -> Float[Array, "..."]:
        """See `Rule`."""
        target, base, tuned = rows.elements
        scale, moved, dithered = rows.tiles
        target = jnp.where(block == 1, target, base + block * (target - base))
        x = divide(target - jnp.where(moved, response, 0), scale)
        by_dither = dither(number, x, rows.thresholds)
        # A weight that tuning left alone, half a bfloat16 step off its code, stays there.
        return jnp.where(dithered & (tuned - base != 0), by_dither, number.round(x))

    def error(self, rows: Rows, values: Array) -> Float[Array, "..."]:
        """See `Rule`."""
        return weights_of(values, rows.tiles[0]) - rows.elements[2]

    def after(
        self, state: "Size", rows: Rows, error: Array, block: Array, total: Callable[[Array], Array]
    ) -> "Size":
        """See `Rule`."""
        _, base, tuned = rows.elements
        return state.after(tuned - base, error, block, total)


class Size(NamedTuple):
    """How far the change kept so far is from its size, over each strip of 128 outputs; sums `[B, 1, C]`.

    Gains are right for rounding without feedback. A correction by feedback moves weights that are near the
    edge between two codes, and mostly away from the base, since more of them are on their way to the next
    code than beyond it. Later rows make up for this excess too.

    Attributes:
        excess: `d e` summed over the rows done.
        noise: variance of `excess` if errors were independent, the sum of `(d e)^2`.
        done: `d^2` summed over the rows done.
        aimed: `d^2` of the rows done, times the correction that each had.
        left: `d^2` summed over the rows left.
    """

    excess: Array
    noise: Array
    done: Array
    aimed: Array
    left: Array

    @classmethod
    def before(cls, left: Array) -> "Size":
        """The sums before any row is done."""
        none = jnp.zeros_like(left)
        return cls(none, none, none, none, left)

    def correction(self) -> Array:
        """A factor on the gains of the next rows: 1 while the excess is small, or explained by noise."""
        tiny = jnp.finfo(jnp.float32).tiny
        response = (self.done + self.excess) / jnp.maximum(self.aimed, tiny)
        wanted = 1 - self.excess / jnp.maximum(self.left, tiny)
        factor = jnp.clip(wanted / jnp.maximum(response, tiny), 1 - _MOST_MORE, 1 + _MOST_MORE)
        near = _NEAR * (self.done + self.left)
        far = jnp.abs(self.excess) > jnp.maximum(_TOLERATED * jnp.sqrt(self.noise), near)
        return jnp.where(far, factor, 1)

    def after(self, d: Array, error: Array, correction: Array, total: Callable[[Array], Array]) -> "Size":
        """The sums once more rows are done; `total` sums over a strip."""
        excess, noise, size = map(total, (d * error, (d * error) ** 2, d * d))
        return Size(
            self.excess + excess,
            self.noise + noise,
            self.done + size,
            self.aimed + correction * size,
            self.left - size,
        )
