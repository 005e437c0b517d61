"""The rows of one row block, as error feedback takes them: how they are rounded, and what is handed on.

The plain loop of `feedback` and the kernel of `feedback_gpu` are both made of this. Rows are `[b, C]`; in the
loop they have a batch axis in front.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from daq_jax.formats import Format, dither, weights_of
from daq_jax.numerics.arithmetic import divide

# The three limits below were chosen by the behaviour study; docs/design/behaviour.md says what others did.
STRIP = 128  # columns whose change is held to its size together
_TOLERATED = 2.0  # standard deviations of a strip's kept change that are left uncorrected
_NEAR = 0.04  # share of a strip's change that is left uncorrected: a correction is itself an error
_MOST_MORE = 0.15  # largest relative correction of a gain, up or down
_LATTICE = np.array([3242174889, 2447445414], np.uint32)  # 2^32 over the plastic number, and over its square


class Plan(NamedTuple):
    """What is known of matrices before their first rows are rounded: `R` rows in `n` row blocks of `b` rows.

    Attributes:
        target: `[B, R, C]` float32, what rounding aims at before any correction.
        base: `[B, R, C]`, weights before tuning, as stored.
        tuned: `[B, R, C]`, weights after tuning, as stored.
        scale: `[B, t, C]` float32, weight units per code unit, for each of `t` rows of tiles.
        moved: `[B, t, C]` bool, whether tuning changed the tile; a tile without change is not corrected.
        dithered: `[B, t, C]` bool, whether the tile is rounded by a dither in place of a gain.
        responses: `[B, n, b, k]` float32, `K`: how the rows of a block answer the error `s` so far.
        directions: `[B, R, k]` float32, `U`: orthonormal leading left singular directions of the change.
        left: `[B, 1, C]` float32, `d^2` summed over each strip.
    """

    target: Array
    base: Array
    tuned: Array
    scale: Array
    moved: Array
    dithered: Array
    responses: Array
    directions: Array
    left: Array


class Rows(NamedTuple):
    """Rows of a `Plan` that are rounded at once.

    Attributes:
        target: `[b, C]` float32, what rounding aims at before any correction.
        base: `[b, C]` float32, weights before tuning.
        tuned: `[b, C]` float32, weights after tuning.
        scale: float32, weight units per code unit; broadcasts over the rows.
        moved: bool, whether tuning changed the tile; broadcasts.
        dithered: bool, whether the tile is rounded by a dither; broadcasts.
        thresholds: `[b, C]` float32 in [0, 1), those of the dither.
    """

    target: Array
    base: Array
    tuned: Array
    scale: Array
    moved: Array
    dithered: Array
    thresholds: Array

    @classmethod
    def of(
        cls, plan: Plan, take: Callable[[Any], Array], take_tiles: Callable[[Any], Array], thresholds: Array
    ) -> "Rows":
        """The rows that `take` picks from arrays `[B, R, C]`, and `take_tiles` from arrays `[B, t, C]`."""
        target, base, tuned = (take(x).astype(jnp.float32) for x in (plan.target, plan.base, plan.tuned))
        scale, moved, dithered = map(take_tiles, (plan.scale, plan.moved, plan.dithered))
        return cls(target, base, tuned, scale, moved, dithered, thresholds)

    @property
    def change(self) -> Array:
        """The true change d."""
        return self.tuned - self.base

    def aim(self, more: Array, response: Array) -> Array:
        """The target with gains `more` times as large, less the response to the errors of earlier rows."""
        target = jnp.where(more == 1, self.target, self.base + more * (self.target - self.base))
        return target - jnp.where(self.moved, response, 0)

    def rounded(self, aim: Array, number: Format) -> Array:
        """Values of the codes for an aim."""
        x = divide(aim, self.scale)
        by_dither = dither(number, x, self.thresholds)
        # A weight that tuning left alone, half a bfloat16 step off its code, stays there.
        return jnp.where(self.dithered & (self.change != 0), by_dither, number.round(x))

    def error(self, values: Array) -> Array:
        """Dequantized weights of these code values less the tuned weights, `[b, C]` float32."""
        return weights_of(values, self.scale) - self.tuned


def lattice(rows: Array, columns: Array) -> Array:
    """Numbers in [0, 1) for positions in a matrix, uint32 arrays that broadcast: neighbours differ widely."""
    place = rows * _LATTICE[0] + columns * _LATTICE[1]
    return (place >> 8).astype(jnp.float32) * 2.0**-24


def over_strips(x: Float[Array, "B b C"]) -> Float[Array, "B 1 C"]:
    """Sums over all rows and 128 columns at a time, spread over these again."""
    columns = jnp.sum(x, 1, keepdims=True)
    width = STRIP if columns.shape[-1] % STRIP == 0 else columns.shape[-1]
    strips = columns.reshape(*columns.shape[:-1], -1, width)
    return jnp.broadcast_to(jnp.sum(strips, -1, keepdims=True), strips.shape).reshape(columns.shape)


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
