"""Some rows of a matrix as error feedback takes them: how they are rounded, and what the rows left must know.

The loop of `feedback` and the kernel of `gpu_feedback` are both made of this. Rows are `[b, C]`, in the loop
with a batch axis before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from daq_jax.formats import Format, dither, weights_of
from daq_jax.numerics.arithmetic import divide

STRIP = 128  # columns whose change is held to its size together
_TOLERATED = 2.0  # standard deviations of what a strip keeps of its change, and
_NEAR = 0.04  # how far from its size it may be in any case: every correction is an error along the change
_MOST_MORE = 0.15  # of a gain, to make up for other rows
_LATTICE = np.array([3242174889, 2447445414], np.uint32)  # 2^32 over the plastic number, and over its square


class Plan(NamedTuple):
    """What is known of matrices before their first rows are rounded: `R` rows in `n` blocks of `b`.

    Attributes:
        target: `[B, R, C]` float32. What rounding aims at where nothing has to be made up for.
        base: `[B, R, C]`, as stored. Weights before tuning.
        tuned: the same after.
        scale: `[B, t, C]` float32, for each of `t` rows of tiles.
        moved: `[B, t, C]` bool. Whether tuning changed the tile; if not, it makes up for nothing.
        dithered: `[B, t, C]` bool. Whether the tile gets a dither.
        responses: `[B, n, b, k]` float32. What rows do about the error `s` in each of `k` directions so far.
        directions: `[B, R, k]` float32, `U`.
        left: `[B, 1, C]` float32. `d^2`, summed over each strip.
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
    """Rows of a `Plan` that are rounded at once, float32; what concerns tiles broadcasts.

    `thresholds` are those of the dither, in [0, 1).
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
        """Of a plan, what `take` takes of its weights and `take_tiles` of what concerns its tiles."""
        target, base, tuned = (take(x).astype(jnp.float32) for x in (plan.target, plan.base, plan.tuned))
        scale, moved, dithered = map(take_tiles, (plan.scale, plan.moved, plan.dithered))
        return cls(target, base, tuned, scale, moved, dithered, thresholds)

    @property
    def change(self) -> Array:
        """The true change d."""
        return self.tuned - self.base

    def aim(self, more: Array, response: Array) -> Array:
        """The target with gains `more` times as large, less the response to the errors of rows before."""
        target = jnp.where(more == 1, self.target, self.base + more * (self.target - self.base))
        return target - jnp.where(self.moved, response, 0)

    def rounded(self, aim: Array, number: Format) -> Array:
        """Values of the codes for an aim."""
        x = divide(aim, self.scale)
        by_dither = dither(number, x, self.thresholds)
        # A weight that tuning left alone, half a bfloat16 step off its code, stays there.
        return jnp.where(self.dithered & (self.change != 0), by_dither, number.round(x))

    def error(self, values: Array) -> Array:
        """How far codes of these values are from the tuned weights."""
        return weights_of(values, self.scale) - self.tuned


def lattice(rows: Array, columns: Array) -> Array:
    """Numbers in [0, 1) for places in a matrix, `uint32`, that broadcast: neighbours differ widely."""
    place = rows * _LATTICE[0] + columns * _LATTICE[1]
    return (place >> 8).astype(jnp.float32) * 2.0**-24


def over_strips(x: Float[Array, "B b C"]) -> Float[Array, "B 1 C"]:
    """Sums over all rows and 128 columns at a time, spread over these again."""
    columns = jnp.sum(x, 1, keepdims=True)
    width = STRIP if columns.shape[-1] % STRIP == 0 else columns.shape[-1]
    strips = columns.reshape(*columns.shape[:-1], -1, width)
    return jnp.broadcast_to(jnp.sum(strips, -1, keepdims=True), strips.shape).reshape(columns.shape)


class Size(NamedTuple):
    """How far the change kept so far is from its size, over each strip of outputs; sums `[B, 1, C]`.

    A gain is right for rounding alone. What feedback adds moves weights that are near the edge between two
    codes, mostly outwards, since more are on their way to the next code than beyond it; later rows make up
    for that as well.

    Attributes:
        excess: `d e` of the rows done.
        noise: its square, were errors independent.
        done: `d^2` of the rows done.
        aimed: the same, times the correction they had.
        left: `d^2` of the rows left.
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
        """The sums with those of more rows, each a `total` over a strip."""
        excess, noise, size = map(total, (d * error, (d * error) ** 2, d * d))
        return Size(
            self.excess + excess,
            self.noise + noise,
            self.done + size,
            self.aimed + correction * size,
            self.left - size,
        )
