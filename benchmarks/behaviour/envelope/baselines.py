"""What is known: roundings of one matrix `[R, C]`, each `(base, tuned, grid, scale) -> weights`.

`scale` is the base's, one per tile. Gains and today's default are the library's own.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

import daq_jax as daq
from benchmarks.behaviour.envelope.grids import Grid
from daq_jax.formats import fp4_e2m1, fp8_e4m3fn, int4, int8
from daq_jax.numerics.linalg import leading_directions
from daq_jax.roundings.feedback import UnbiasedFeedback
from daq_jax.roundings.feedback_plan import lattice
from daq_jax.roundings.gains import UnbiasedGain
from daq_jax.tiles import Tiles


def number_of(grid: Grid):
    if grid.integer:
        return int8 if grid.largest == 127 else int4
    return fp8_e4m3fn if grid.mantissa == 3 else fp4_e2m1


def weights(grid: Grid, values: Array, scale: Array) -> Array:
    return jax.lax.reduce_precision(values * grid.spread(scale, values), 8, 23)


def absmax_fresh(base, tuned, grid, scale, rule=None):
    s = grid.absmax(tuned, rule)
    return weights(grid, grid.encode(tuned, s), s)


def at_base_scale(base, tuned, grid, scale):
    return weights(grid, grid.encode(tuned, scale), scale)


def stochastic(base, tuned, grid, scale, seed=0):
    x = tuned / grid.spread(scale, tuned)
    return weights(grid, grid.dither(x, jax.random.uniform(jax.random.key(seed), x.shape)), scale)


def _tiles(base, tuned, grid, scale):
    return Tiles(grid.cut(base), grid.cut(tuned), None, (1, 3), (0, 2), number_of(grid)), scale[
        :, None, :, None
    ]


def gains(base, tuned, grid, scale):
    tiles, s = _tiles(base, tuned, grid, scale)
    return weights(grid, UnbiasedGain("row")(tiles, s).reshape(base.shape), scale)


def gain_feedback(base, tuned, grid, scale, damping=10.0):
    tiles, s = _tiles(base, tuned, grid, scale)
    return weights(grid, UnbiasedFeedback(damping=damping)(tiles, s).reshape(base.shape), scale)


def places(shape) -> Array:
    rows, columns = (jnp.arange(n, dtype=jnp.uint32) for n in shape)
    return lattice(rows[:, None], columns)


def dither_feedback(base, tuned, grid, scale, damping=10.0, rank=128):
    """Feedback with evenly spread thresholds and no gain."""
    d, s_all = tuned - base, grid.spread(scale, tuned)
    rows, columns = d.shape
    k = min(rank, rows // 2)
    u = leading_directions(d[None], k)[0][0]
    responses = responses_of(d, u, damping, 64)
    size = rows // 64
    thresholds = places(d.shape)

    def step(i, done):
        out, s = done
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        aim = take(tuned) - jnp.where(jnp.any(d != 0), responses[i] @ s, 0)
        q = grid.dither(aim / take(s_all), take(thresholds)) * take(s_all)
        return jax.lax.dynamic_update_slice_in_dim(out, q, i * size, 0), s + take(u).T @ (q - take(tuned))

    return jax.lax.fori_loop(0, 64, step, (jnp.zeros_like(d), jnp.zeros((k, columns))))[0]


def responses_of(d, u, damping, blocks):
    rows, k = u.shape
    seen = u.T @ d
    gram = seen @ seen.T
    total, captured = jnp.sum(d * d), jnp.trace(gram)
    unit = jnp.maximum(captured, 1e-37)
    root = jnp.linalg.cholesky(gram / unit + 1e-6 * jnp.eye(k))
    rest = jnp.maximum(total - captured, 0) / (rows - k) / unit
    mean = jnp.maximum(damping * rest, 1e-5)
    parts = u.reshape(blocks, rows // blocks, k)
    left = jnp.cumsum((parts.mT @ parts)[::-1], 0)[::-1] + 0.03 * jnp.eye(k)

    def one(g):
        return root @ jnp.linalg.solve(mean * jnp.eye(k) + root.T @ g @ root, root.T)

    return parts @ jax.vmap(one)(left)


def default(base, tuned, grid, scale):
    """Today's default of the library, fresh: search and all."""
    r, c = grid.tiles(base)
    tiling = (
        daq.Block(r, c) if grid.tile == (128, 128) else daq.Channel() if grid.tile[0] == 0 else daq.Group(r)
    )
    scales = daq.PowerOfTwo() if grid.rule == "pow2" else daq.AnyScale()
    recipe = dataclasses.replace(daq.recipes.default, format=number_of(grid), tiling=tiling, scales=scales)
    return daq.quantize(base, tuned, recipe).dequantize()


BASELINES = {
    "absmax": absmax_fresh,
    "base_scale": at_base_scale,
    "stochastic": stochastic,
    "gains": gains,
    "dither_feedback": dither_feedback,
    "default": default,
}
