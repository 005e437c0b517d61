"""Linear algebra of stacks of matrices: triangular factors, and leading singular directions.

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

_ITERATIONS = 2  # of the subspace; more changed no result of the behaviour study


def exact(a: Array, b: Array) -> Array:
    """The product of two matrices, or of stacks of them, in full float32 on every machine."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def rough(a: Array, b: Array) -> Array:
    """The product of two matrices, or of stacks of them, as fast as the machine has it.

    TPUs round both factors to bfloat16 first, and many GPUs keep 10 bits of each. For what leads to a choice
    but is in no stored number; all such products go through here, whatever the global flag of JAX says. With
    factors rounded to bfloat16, roundings with error feedback keep as much of a change, to a hundredth
    (`tests/numerics/test_linalg.py`); the error of `UnbiasedSubspace` doubled, whose products are `exact`.
    """
    return jnp.matmul(a, b, precision=lax.Precision.DEFAULT)


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


def leading_directions(
    matrix: Float[Array, "B R C"], rank: int, product: Callable[[Array, Array], Array] = rough
) -> tuple[Float[Array, "B R k"], Float[Array, "B C k"]]:
    """Orthonormal bases of about the leading `rank` left and right singular directions, for each matrix.

    Subspace iteration from a fixed random start.

    Args:
        matrix: float32.
        rank: k.
        product: `rough` or `exact`.
    """

    def turn(_: Array | int, sides: tuple[Array, Array]) -> tuple[Array, Array]:
        left = _orthonormalized(product(matrix, sides[1]))
        return left, _orthonormalized(product(matrix.mT, left))

    start = jax.random.normal(jax.random.key(0), (matrix.shape[-1], rank), jnp.float32)[None]
    # Zeros of products, and so inside `shard_map` as device-varying as the loop makes them.
    zeros = [jnp.zeros_like(x[..., :1] * start[:, :1]) for x in (matrix, matrix.mT)]
    left, right = lax.fori_loop(0, _ITERATIONS, turn, (zeros[0], zeros[1] + start))
    return _orthonormalized(left), _orthonormalized(right)


def _orthonormalized(x: Float[Array, "B n k"]) -> Float[Array, "B n k"]:
    """About orthonormal columns spanning those of `x`, by the triangular factor of their Gram matrix.

    Exactly orthonormal the second time. The shift keeps the factorization alive where columns depend on one
    another, and gives zero for zero.
    """
    gram = exact(x.mT, x)
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    shift = jnp.maximum(1e-6 * size, 1e-37) * jnp.eye(gram.shape[-1], dtype=jnp.float32)[None]
    # The small inverse and a product: solving for all of `x` took three times as long on an H200.
    return exact(x, inverse_factor(gram + shift).mT)
