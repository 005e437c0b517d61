"""The candidate: weights with small steps carry the change, feedback moves no more than is moved anyway.

One matrix `[R, C]`. Everything that varies is traced, so that one program serves all grids and settings.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.behaviour.envelope.baselines import responses_of
from daq_jax.numerics.linalg import leading_directions
from daq_jax.roundings.feedback_plan import lattice


class Number(NamedTuple):
    """A number format as traced numbers."""

    unit: Array  # 2^-mantissa
    least: Array  # smallest normal
    largest: Array
    integer: Array

    @classmethod
    def of(cls, grid):
        return cls(*map(jnp.float32, (2.0**-grid.mantissa, 2.0**grid.least, grid.largest, grid.integer)))

    def power(self, x):
        bits = lax.bitcast_convert_type(jnp.maximum(jnp.abs(x), self.least), jnp.int32)
        p = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32) * self.unit
        return jnp.where(self.integer > 0, 1.0, p)

    def round(self, x):
        x = jnp.clip(x, -self.largest, self.largest)
        step = self.power(x)
        return jnp.round(x / step) * step

    def up(self, v):
        return jnp.minimum(v + jnp.where(v < 0, self.power(v * (1 - 2.0**-10)), self.power(v)), self.largest)

    def down(self, v):
        return jnp.maximum(v - jnp.where(v > 0, self.power(v * (1 - 2.0**-10)), self.power(v)), -self.largest)

    def around(self, x):
        """Codes below and above, and how far `x` is on the way."""
        x = jnp.clip(x, -self.largest, self.largest)
        r = self.round(x)
        low = jnp.where(r > x, self.down(r), r)
        high = self.up(low)
        return low, high, (x - low) / jnp.where(high > low, high - low, 1)


class Settings(NamedTuple):
    """What the exploration varies; defaults are the recommendation."""

    damping: float = 3.0
    adapt: float = 1.0  # how much dearer a correction is for the price of a move
    reach: float = 3.0
    authority: float = 1.0  # times what is moved anyway
    free: float = 0.0  # 1: a weight past half a step answers freely
    width: float = 1.0  # of the thresholds
    doubt: float = 1.0  # the coherence that counts is this much smaller than measured; 0: no gate
    feedback: float = 1.0
    carry: float = 1.0  # 0: every weight carries its own
    by_code: float = 1.0  # 1: steps are compared within a tile, in code units
    random: float = 0.0


def sums(x, axis):
    return jnp.sum(x, axis, keepdims=True)


def balanced(w, d, turns=4, most=8.0):
    d2 = d * d
    for _ in range(turns):
        for axis in (1, 0):
            f = sums(d2, axis) / jnp.maximum(sums(w * d2, axis), 1e-37)
            w = w * jnp.clip(f, 1 / most, most)
    return w


def carriers(d, h, reach):
    usual = jnp.sqrt(jnp.mean(d * d))

    def on(G):
        return jnp.where(h > 0, jnp.clip(2 - 2 * h / jnp.maximum(reach * G * usual, 1e-37), 0, 1), 0)

    def halve(_, done):
        low, high = done
        middle = jnp.sqrt(low * high)
        under = middle * jnp.mean(on(middle)) < 1
        return jnp.where(under, middle, low), jnp.where(under, high, middle)

    return on(lax.fori_loop(0, 16, halve, (jnp.float32(1), jnp.float32(1e5)))[1])


def coherence(d):
    """How much more harm than a random error of its size the loss of `d` does, as its singular values tell.

    `R C sum s^6 / (sum s^2)^3`, and what a random matrix has.
    """
    rows, columns = d.shape
    a = d @ d.T if rows <= columns else d.T @ d
    a = a / jnp.maximum(jnp.trace(a), 1e-37)
    return rows * columns * jnp.sum((a @ a) * a), rows / columns + columns / rows + 3


def expected(number, x, width):
    low, high, share = number.around(x)
    return low + jnp.clip((share - 0.5) / jnp.maximum(width, 1e-3) + 0.5, 0, 1) * (high - low)


@partial(jax.jit, static_argnames=("rank", "blocks"))
def envelope(base, tuned, s, native, number, settings, rank=128, blocks=64):
    """Weights. `s` scales and `native` whether the base lies on the grid, spread over `[R, C]`."""
    o = settings
    d = tuned - base
    rows, columns = d.shape
    v = number.round(base / s)
    h = jnp.where(d > 0, number.up(v) - v, v - number.down(v)) * s
    steps = jnp.where(o.by_code > 0, h / s * jnp.sqrt(jnp.mean(s * s)), h)
    w = jnp.where(native & (o.carry > 0), carriers(d, steps, o.reach), jnp.where(h > 0, 1.0, 0.0))
    w = jnp.where(native, balanced(w, d), 1.0)
    width = jnp.where(native, o.width, 0.0)

    def rebalance(_, w):
        for axis in (1, 0):
            got = d * (expected(number, (base + w * d) / s, o.width) * s - base)
            f = sums(d * d, axis) / jnp.maximum(sums(got, axis), 1e-37)
            w = w * jnp.where(native, jnp.clip(f, 0.5, 2), 1)
        return w

    w = lax.fori_loop(0, jnp.where(o.width < 1, 6, 0), rebalance, w)
    x = w * d
    # What moving costs beside rounding to nearest, and what it is worth.
    low, high, share = number.around((base + x) / s)
    p = jnp.clip((share - 0.5) / jnp.maximum(width, 1e-3) + 0.5, 0, 1)
    cost = ((high - low) * s) ** 2 * p * (1 - p) + ((low + p * (high - low)) * s - tuned) ** 2
    nearest = number.round(tuned / s) * s
    extra = jnp.mean(cost - (nearest - tuned) ** 2)
    rho, rho_random = coherence(d)
    rho = jnp.maximum(rho - 1.5 * rho_random, 0) / jnp.maximum(o.doubt, 1e-6)
    keep = jnp.clip(1 - extra / jnp.maximum(2 * rho * jnp.mean(d * d), 1e-37), 0, 1)
    keep = jnp.where((o.doubt > 0) & jnp.any(native), keep, 1.0)
    aim_at = jnp.where(native, base + keep * d, tuned)
    x = jnp.where(native, keep * x, d)
    # Feedback.
    k = min(rank, rows // 2)
    u = leading_directions(d[None], k)[0][0]
    price = jnp.sum(jnp.where(native, jnp.abs(x) * h, 0)) / jnp.maximum(jnp.sum(x * x), 1e-37)
    responses = responses_of(d, u, o.damping * (1 + o.adapt * price), blocks) * o.feedback
    size = rows // blocks
    place = lattice(jnp.arange(rows, dtype=jnp.uint32)[:, None], jnp.arange(columns, dtype=jnp.uint32))
    t = jnp.where(o.random > 0, jax.random.uniform(jax.random.key(0), d.shape), place)
    slack = 1 - 2 * jnp.abs(x) / jnp.maximum(h, 1e-37) * o.free
    limit = jnp.where(
        native, jnp.where(slack > 0.02, o.authority * jnp.abs(x) / jnp.maximum(slack, 0.02), jnp.inf), jnp.inf
    )
    limit = jnp.where(x == 0, jnp.where(native, 0, limit), limit)
    answers = jnp.where(native, w, 1.0)

    def step(i, done):
        out, sofar = done
        take = partial(lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        c = jnp.clip(-take(answers) * (responses[i] @ sofar), -take(limit), take(limit))
        low, high, share = number.around((take(base) + take(x) + c) / take(s))
        q = jnp.where(share > 0.5 + take(width) * (take(t) - 0.5), high, low) * take(s)
        q = jnp.where(take(d) != 0, q, number.round(take(base) / take(s)) * take(s))
        return lax.dynamic_update_slice_in_dim(out, q, i * size, 0), sofar + take(u).T @ (q - take(aim_at))

    start = (jnp.zeros_like(d), jnp.zeros((k, columns)))
    q = lax.fori_loop(0, blocks, step, start)[0]
    return jnp.where(keep > 0, q, nearest), jnp.stack(
        [keep, rho * o.doubt, extra / jnp.maximum(jnp.mean(d * d), 1e-37), price, jnp.mean(cost)]
    )


def native_tiles(grid, base, scale):
    """Whether each tile's base lies on the grid, spread."""
    s = grid.spread(scale, base)
    v = grid.encode(base, scale)
    off = (base / s - v) / grid.power(v)
    share = jnp.mean(grid.cut(off * off), (1, 3))
    return grid.spread(share < 0.01, base)


def make(settings, log=None, rank=128):
    def recipe(base, tuned, grid, scale):
        s = grid.spread(scale, base)
        q, about = envelope(
            base, tuned, s, native_tiles(grid, base, scale), Number.of(grid), settings, rank=rank
        )
        if log is not None:
            log.append([float(a) for a in about])
        return q

    return recipe


DEFAULT = Settings()
_FIRST = DEFAULT._replace(damping=10.0)  # what the last run called "new"; "new_d3" is the recommendation
VARIANTS = {
    "new": _FIRST,
    "new_adapt.3": _FIRST._replace(adapt=0.3),
    "new_adapt0": _FIRST._replace(adapt=0.0),
    "new_d3": _FIRST._replace(damping=3.0),
    "new_d3_adapt0": _FIRST._replace(damping=3.0, adapt=0.0),
    "new_reach5": _FIRST._replace(reach=5.0),
    "new_steps": _FIRST._replace(by_code=0.0),
    "new_nofb": _FIRST._replace(feedback=0.0),
    "new_nogate": _FIRST._replace(doubt=0.0),
    "dither_feedback": _FIRST._replace(carry=0.0, authority=1e9, adapt=0.0, doubt=0.0),
}
