"""Sums, maxima and the like over axes of large arrays: as accurate and as quick as each machine has them.

XLA's CPU compiler hands a reduction, with the arithmetic before it, to a library that took up to forty times
as long as the arithmetic alone (4M elements in groups of 32, jaxlib 0.10.2). There, numbers that lie side by
side are reduced by a loop over the axis, whose operand is computed first.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from daq_jax.numerics.arithmetic import LARGEST

_WIDE = 32  # numbers side by side that are worth a loop
_RUN = 128  # elements summed before partial sums are combined
_UNTOUCHED_RUN = 32  # the longest that XLA's CPU compiler does not break up into runs of its own


class Reduction(NamedTuple):
    """What makes one of many numbers.

    Attributes:
        of_axes: the reduction of an array over axes, as JAX has it.
        of_two: the same of two numbers.
        nothing: changes no result.
    """

    of_axes: Callable[..., Array]
    of_two: Callable[[Array, Array], Array]
    nothing: float | bool


SUM = Reduction(jnp.sum, jnp.add, 0)
MOST = Reduction(jnp.max, jnp.maximum, -jnp.inf)
LEAST = Reduction(jnp.min, jnp.minimum, jnp.inf)
ANY = Reduction(jnp.any, jnp.logical_or, False)


def reduced(x: Array, axes: tuple[int, ...], reduction: Reduction) -> Array:
    """A reduction over `axes`, which stay with length 1.

    Args:
        x: any shape, without an axis of length 0.
        axes: not negative.
        reduction: one of those above.
    """
    return lax.platform_dependent(
        x,
        cpu=lambda x: functools.reduce(lambda x, axis: _in_turn(x, axis, reduction), axes, x),
        default=lambda x: reduction.of_axes(x, axes, keepdims=True).astype(x.dtype),
    )


@functools.partial(jax.jit, static_argnames=("axis", "reduction"))  # traced once for arrays of one shape
def _in_turn(x: Array, axis: int, reduction: Reduction) -> Array:
    """A reduction over an axis, by a loop over it if enough numbers lie side by side."""
    if math.prod(x.shape[axis + 1 :]) < _WIDE:
        return reduction.of_axes(x, axis, keepdims=True).astype(x.dtype)

    def step(i: Array | int, done: Array) -> Array:
        return reduction.of_two(done, lax.dynamic_index_in_dim(x, i, axis))

    return lax.fori_loop(1, x.shape[axis], step, lax.index_in_dim(x, 0, axis))


def total(x: Array, axes: tuple[int, ...]) -> Array:
    """Sum over `axes`, which stay with length 1, in runs of at most 128 elements.

    A plain float32 sum of 64M terms can be wrong in the third digit. Short runs, and then runs of their
    sums, keep the relative error near 1e-7 of the sum of absolute values.

    Args:
        x: any shape; float32 or int32.
        axes: the axes to sum over, not negative.
    """
    for axis in axes:
        while x.shape[axis] > 1:
            x = sum_of_runs(x, axis)
    return x


def sum_as_computed(x: Float[Array, "..."], axis: int, local: bool) -> Float[Array, "..."]:
    """Sum along an axis, which stays with length 1, in runs of at most 32 elements, in order; for CPUs.

    XLA's CPU code writes the terms of a sum that it knows to memory, for code of its own: two to three times
    the time for terms that take rounding. It does not know this one, and adds each term as it computes it.
    The smaller of a sum and the largest float is the sum, up to 3.4e38, and keeps a product in a term from
    being fused with it.

    Args:
        x: any shape; float32.
        axis: not negative.
        local: whether the axis lies on one device; where not, a loop adds in the same order.
    """

    def add(total: Array, term: Array) -> Array:
        return jnp.minimum(total + jnp.minimum(term, LARGEST), LARGEST)

    def add_next(i: Array | int, total: Array) -> Array:
        return add(total, lax.dynamic_index_in_dim(runs, i, axis + 1, keepdims=False))

    while x.shape[axis] > 1:
        runs = in_runs(x, axis, min(x.shape[axis], _UNTOUCHED_RUN))
        if local:
            x = lax.reduce(runs, np.float32(0), add, (axis + 1,))
        else:
            zeros = jnp.zeros_like(lax.index_in_dim(runs, 0, axis + 1, keepdims=False))
            x = lax.fori_loop(0, runs.shape[axis + 1], add_next, zeros)
    return x


def in_runs(x: Array, axis: int, run: int) -> Array:
    """An axis as two, (runs, elements of a run), filled up with zeros."""
    n = x.shape[axis]
    runs = -(-n // run)
    if n % run:
        x = jnp.pad(x, [(0, runs * run - n if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], runs, run, *x.shape[axis + 1 :])


def sum_of_runs(x: Array, axis: int) -> Array:
    """Sums over runs of at most 128 elements of an axis, which becomes as long as there are runs."""
    x = jnp.squeeze(reduced(in_runs(x, axis, min(x.shape[axis], _RUN)), (axis + 1,), SUM), axis + 1)
    # Without a barrier XLA merges the sums into one long run again.
    return lax.optimization_barrier(x)
