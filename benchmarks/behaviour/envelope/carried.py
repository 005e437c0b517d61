"""Carriers, dither and feedback that carriers alone answer to."""

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.behaviour.envelope.baselines import responses_of
from benchmarks.behaviour.envelope.sampled import carriers2, step_of, thresholds
from daq_jax.numerics.linalg import leading_directions


def width_dither(grid, x, t, width):
    """Between neighbours, with thresholds within `width` about the middle."""
    low = grid.floor(x)
    high = grid.up(low)
    share = (jnp.clip(x, -grid.largest, grid.largest) - low) / jnp.where(high > low, high - low, 1)
    return jnp.where(share > 0.5 + width * (t - 0.5), high, low)


def carried(
    base,
    tuned,
    grid,
    scale,
    damping=10.0,
    rank=128,
    reach=2.0,
    authority=None,
    adapt=False,
    width=1.0,
    how="lattice",
):
    d, s_all = tuned - base, grid.spread(scale, tuned)
    rows, columns = d.shape
    k = min(rank, rows // 2)
    u = leading_directions(d[None], k)[0][0]
    h = step_of(base, grid, scale, d)
    w = carriers2(d, h, reach, hmodel=False)
    x = w * d
    if adapt:  # a correction costs its size times the step, not its square
        mean = jnp.sum(w * jnp.abs(d) * h) / jnp.sum(w * d * d)
        damping = damping * (1 + adapt * mean)
    responses = responses_of(d, u, damping, 64)
    size = rows // 64
    t = thresholds(d.shape, how)

    def step(i, done):
        out, s = done
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        c = -take(w) * (responses[i] @ s)
        if authority:
            c = jnp.clip(c, -authority * jnp.abs(take(x)), authority * jnp.abs(take(x)))
        q = width_dither(grid, (take(base) + take(x) + c) / take(s_all), take(t), width) * take(s_all)
        q = jnp.where(take(d) != 0, q, take(base))
        return jax.lax.dynamic_update_slice_in_dim(out, q, i * size, 0), s + take(u).T @ (q - take(tuned))

    return jax.lax.fori_loop(0, 64, step, (jnp.zeros_like(d), jnp.zeros((k, columns))))[0]
