"""Triangular factors of stacks of small matrices.

On a CPU one matrix is taken after another. jaxlib 0.10 hands the matrices of a stack to a pool of threads and
waits for them on a thread of that same pool, so that stacks of several devices, or of several programs, could
wait for one another for ever.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def factor(gram: Float[Array, "*B n n"]) -> Float[Array, "*B n n"]:
    """Lower triangular `L` with `L L' = gram`; NaN where a matrix is not positive definite."""
    return _each(jnp.linalg.cholesky, gram)


def inverse_factor(gram: Float[Array, "*B n n"]) -> Float[Array, "*B n n"]:
    """The inverse of `factor(gram)`."""

    def invert(gram: Array) -> Array:
        identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
        return lax.linalg.triangular_solve(jnp.linalg.cholesky(gram), identity, left_side=True, lower=True)

    with jax.default_matmul_precision("highest"):
        return _each(invert, gram)


def _each(function: Callable[[Array], Array], stack: Array) -> Array:
    """`function` of each matrix of a stack."""

    def in_turn(stack: Array) -> Array:
        flat = stack.reshape(-1, *stack.shape[-2:])
        return lax.map(function, flat).reshape(stack.shape)

    if math.prod(stack.shape[:-2]) == 1:
        return function(stack)
    return lax.platform_dependent(stack, cpu=in_turn, default=function)
