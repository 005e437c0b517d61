"""Dither that lets weights with small steps carry the change of their neighbours."""

import jax
import jax.numpy as jnp

from benchmarks.behaviour.envelope.baselines import places, weights


def size_model(d):
    """`[R, C]`: the size of the change by row and column, as if those were independent."""
    d2 = d * d
    row, column = jnp.mean(d2, 1, keepdims=True), jnp.mean(d2, 0, keepdims=True)
    return jnp.sqrt(row * column / jnp.maximum(jnp.mean(d2), 1e-37))


def step_of(base, grid, scale, d):
    """The step from the base's code the way the change goes, weight units."""
    s = grid.spread(scale, base)
    v = grid.encode(base, scale)
    return jnp.where(d > 0, grid.up(v) - v, v - grid.down(v)) * s


def total(x, sets):
    r, c = sets[0] or x.shape[0], sets[1] or x.shape[1]
    r, c = min(r, x.shape[0]), min(c, x.shape[1])
    y = x.reshape(x.shape[0] // r, r, x.shape[1] // c, c).sum((1, 3), keepdims=True)
    return jnp.broadcast_to(y, (x.shape[0] // r, r, x.shape[1] // c, c)).reshape(x.shape)


def carriers(d, h, sets=(0, 1), reach=2.0, halvings=16, most=1e4):
    """The factor of each element: `G` where the step is below `reach G` times the usual change, none well above."""
    usual = size_model(d)
    d2 = d * d
    want = total(d2, sets)

    def factor(G):
        return jnp.where(h > 0, G * jnp.clip(2 - 2 * h / jnp.maximum(reach * G * usual, 1e-37), 0, 1), 0)

    def halve(_, done):
        low, high = done
        middle = jnp.sqrt(low * high)
        under = total(factor(middle) * d2, sets) < want
        return jnp.where(under, middle, low), jnp.where(under, high, middle)

    low, high = jax.lax.fori_loop(0, halvings, halve, (jnp.ones_like(d), jnp.full_like(d, most)))
    f = factor(high)
    # No more than the whole: G = 1 with all on.
    return f * want / jnp.maximum(total(f * d2, sets), 1e-37)


def thresholds(shape, how):
    return jax.random.uniform(jax.random.key(0), shape) if how == "random" else places(shape)


def sampled(base, tuned, grid, scale, sets=(0, 1), reach=2.0, how="lattice"):
    d = tuned - base
    x = carriers(d, step_of(base, grid, scale, d), sets, reach) * d
    s = grid.spread(scale, base)
    return weights(grid, grid.dither((base + x) / s, thresholds(d.shape, how)), scale)


def lattice_dither(base, tuned, grid, scale):
    return weights(grid, grid.dither(tuned / grid.spread(scale, base), places(base.shape)), scale)


def rank_one(x):
    """`[R, C]`: row means times column means over the mean."""
    return jnp.mean(x, 1, keepdims=True) * jnp.mean(x, 0, keepdims=True) / jnp.maximum(jnp.mean(x), 1e-37)


def balanced(w, d, turns=4, most=8.0):
    """`a_i b_j w` such that rows and columns of `w a b d^2` add up to those of `d^2`."""
    d2 = d * d
    for _ in range(turns):
        for axis in (1, 0):
            f = jnp.sum(d2, axis, keepdims=True) / jnp.maximum(jnp.sum(w * d2, axis, keepdims=True), 1e-37)
            w = w * jnp.clip(f, 1 / most, most)
    return w


def carriers2(d, h, reach=2.0, halvings=16, hmodel=True):
    """Weights with a small step for their row and column carry the change: by step alone, never by change.

    `G` in those with a step below `reach G |d|` for the matrix's own mean change; `G` such that all is kept.
    """
    usual = jnp.sqrt(jnp.mean(d * d))
    hm = rank_one(h) if hmodel else jnp.mean(h)
    rel = h / jnp.maximum(hm, 1e-37) * jnp.mean(h)  # steps, as if all rows and columns had the same

    def on(G):
        return jnp.where(h > 0, jnp.clip(2 - 2 * rel / (reach * G * usual), 0, 1), 0)

    def halve(_, done):
        low, high = done
        middle = jnp.sqrt(low * high)
        under = middle * jnp.mean(on(middle)) < 1
        return jnp.where(under, middle, low), jnp.where(under, high, middle)

    low, high = jax.lax.fori_loop(0, halvings, halve, (jnp.float32(1), jnp.float32(1e5)))
    return balanced(on(high), d)


def sampled2(base, tuned, grid, scale, reach=2.0, how="lattice", hmodel=True):
    d = tuned - base
    x = carriers2(d, step_of(base, grid, scale, d), reach, hmodel=hmodel) * d
    s = grid.spread(scale, base)
    return weights(grid, grid.dither((base + x) / s, thresholds(d.shape, how)), scale)
