"""Round to nearest, AWQ and GPTQ at 4 bits: what density-aware quantization is measured against.

All give back one effective matrix in float32. A scale is AbsMax where symmetric; where not, the line runs
from the smallest to the largest weight of a group, its zero a real number, which favours int4: files hold
whole zeros. AWQ is `Q(diag(factor) W) / factor`, as if every division could be folded into the layer before.
GPTQ is that of arXiv:2210.17323 with its usual damping of 1 %, groups fitted as they are reached, inputs in
their own order; a test holds it against the elimination that it is a shortcut for.

Letters: `R` inputs and `C` outputs of a matrix, `n` inputs of a group.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from daq_jax.formats import Format

AWQ_STEPS = 20  # powers of the mean activation that are tried: 0, 1/20, .. 19/20, as in the released code


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a group is laid out: the format, the inputs of a group (None: all), and whether it has a zero."""

    format: Format
    group: int | None
    symmetric: bool

    def line(self, group: Array) -> tuple[Array, Array]:
        """Scale and zero of `[n, ...]` weights; each `[...]`."""
        top = self.format.largest
        if self.symmetric:
            scale = jnp.max(jnp.abs(group), axis=0) / top
            zero = jnp.zeros_like(scale)
        else:
            low, high = jnp.min(group, axis=0), jnp.max(group, axis=0)
            scale = (high - low) / (2 * top)
            zero = top - high / jnp.where(scale > 0, scale, 1)
        return jnp.where(scale > 0, scale, 1), zero

    def nearest(self, weight: Array, scale: Array, zero: Array) -> Array:
        """Weights rounded to the nearest code of a line."""
        return (self.format.round(weight / scale + zero) - zero) * scale


class Inputs(NamedTuple):
    """What a matrix's inputs looked like on the calibration text."""

    gram: Array  # [R, R] float32, mean of x x' over the text
    size: Array  # [R] root of the mean of x^2, which AWQ raises to a power in place of the mean of |x|

    @classmethod
    def of(cls, gram: Array) -> "Inputs":
        """All there is to know, from the Gram matrix."""
        return cls(gram, jnp.sqrt(jnp.diag(gram)))


def round_to_nearest(weight: Array, inputs: Inputs, grid: Grid) -> Array:
    """Each group on its own line, each weight to the nearest code."""
    rows, columns = weight.shape
    n = min(grid.group or rows, rows)
    groups = weight.reshape(rows // n, n, columns).swapaxes(0, 1)
    return grid.nearest(groups, *grid.line(groups)).swapaxes(0, 1).reshape(weight.shape)


def awq(weight: Array, inputs: Inputs, grid: Grid) -> Array:
    """The power of the mean activation that gives the least error of the output. Source: arXiv:2306.00978."""

    def attempt(alpha: Array) -> tuple[Array, Array]:
        factor = jnp.maximum(inputs.size**alpha, 1e-4)
        factor = (factor / jnp.sqrt(factor.max() * factor.min()))[:, None]
        result = round_to_nearest(weight * factor, inputs, grid) / factor
        error = result - weight
        return jnp.sum(error * jnp.matmul(inputs.gram, error, precision="highest")), result

    def better(best: tuple[Array, Array], alpha: Array) -> tuple[tuple[Array, Array], None]:
        trial = attempt(alpha)
        return jax.tree.map(lambda a, b: jnp.where(trial[0] < best[0], a, b), trial, best), None

    start = jnp.float32(jnp.inf), weight
    return lax.scan(better, start, jnp.arange(AWQ_STEPS, dtype=jnp.float32) / AWQ_STEPS)[0][1]


def gptq(weight: Array, inputs: Inputs, grid: Grid) -> Array:
    """Inputs one after another, each error made up for by those to come. Source: arXiv:2210.17323."""
    rows = len(weight)
    n = min(grid.group or rows, rows)
    hessian = inputs.gram
    dead = jnp.diag(hessian) == 0
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0) + 0.01 * jnp.mean(jnp.diag(hessian)))
    with jax.default_matmul_precision("highest"):
        inverse = jnp.linalg.inv(hessian)
        factor = jnp.linalg.cholesky((inverse + inverse.T) / 2).T  # upper: later inputs given earlier ones

    def step(state: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], Array]:
        weight, scale, zero = state
        fresh = grid.line(lax.dynamic_slice_in_dim(weight, i // n * n, n))
        begins = i % n == 0
        scale, zero = (jnp.where(begins, a, b) for a, b in zip(fresh, (scale, zero), strict=True))
        row = grid.nearest(weight[i], scale, zero)
        error = (weight[i] - row) / factor[i, i]
        later = jnp.where(jnp.arange(rows) > i, factor[i], 0)
        return (weight - later[:, None] * error, scale, zero), row

    nothing = jnp.ones_like(weight[0])
    return lax.scan(step, (weight, nothing, nothing), jnp.arange(rows))[1]


BASELINES = {"round to nearest": round_to_nearest, "awq": awq, "gptq": gptq}


@partial(jax.jit, static_argnames=("name", "grid"))
def baseline(weight: Array, inputs: Inputs, *, name: str, grid: Grid) -> Array:
    """A method's effective matrix. R is a multiple of the group."""
    return BASELINES[name](weight, inputs, grid)
