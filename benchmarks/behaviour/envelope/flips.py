"""Descent by flips in a two-sided metric: the exploratory form, with dense factors."""

import jax
import jax.numpy as jnp

from benchmarks.behaviour.envelope.baselines import places, weights


def flips(base, tuned, grid, scale, A, B, turns=24, most=32.0, start="nearest"):
    """Minimizes `tr(e' A e B)` over codes by flips to the next code, dearest benefit first.

    A turn flips where `|G| > level * step * A_ii B_jj / 2`, `G = A e B`, the level falling from `most` to 1; where all
    of them together would overshoot, only a share, evenly spread.
    """
    s = grid.spread(scale, tuned)
    v = grid.encode(tuned if start == "nearest" else base, scale)
    diag = jnp.diag(A)[:, None] * jnp.diag(B)[None, :]
    spots = places(tuned.shape)
    levels = jnp.geomspace(most, 1.0, turns)

    def turn(i, done):
        v, e, G = done
        up, down = (grid.up(v) - v) * s, (grid.down(v) - v) * s
        step = jnp.where(G > 0, down, up)
        wanted = (jnp.abs(G) > levels[i] * jnp.abs(step) * diag / 2) & (step != 0)
        f = jnp.where(wanted, step, 0.0)
        Hf = A @ f @ B
        best = -jnp.sum(G * f) / jnp.maximum(jnp.sum(f * Hf), 1e-37)
        chosen = wanted & ((spots + i * 0.381966) % 1.0 < best)
        f = jnp.where(chosen, step, 0.0)
        v = jnp.where(chosen, jnp.where(G > 0, grid.down(v), grid.up(v)), v)
        return v, e + f, G + A @ f @ B

    e = weights(grid, v, scale) - tuned
    v, e, G = jax.lax.fori_loop(0, turns, turn, (v, e, A @ e @ B))
    return weights(grid, v, scale)


def damped(M, damping):
    """Normalized to mean diagonal 1, plus damping."""
    n = M.shape[0]
    mean = jnp.trace(M) / n
    return jnp.where(mean > 0, M / jnp.maximum(mean, 1e-37), 0) + damping * jnp.eye(n)


def by_change(base, tuned, grid, scale, damping=1.0, both=True, power=1.0, **kw):
    d = tuned - base
    A, B = damped(d @ d.T, damping), damped(d.T @ d, damping)
    if not both:
        B = jnp.eye(d.shape[1])
    return flips(base, tuned, grid, scale, A, B, **kw)


class ByMoments:
    """With the true factors."""

    wants_path = True

    def __init__(self, moments, damping=0.01, **kw):
        self.moments, self.damping = moments, damping
        self.f = jax.jit(
            lambda b, t, s, A, B, grid: flips(b, t, grid, s, damped(A, damping), damped(B, damping), **kw),
            static_argnums=5,
        )

    def __call__(self, path, base, tuned, grid, scale):
        A, B = self.moments[path]
        return self.f(base, tuned, scale, jnp.asarray(A), jnp.asarray(B), grid)
