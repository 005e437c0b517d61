"""Arithmetic that a compiler must not improve on.

XLA rewrites float32 expressions in ways that are right for training and wrong for a search that has to
score exactly what it stores. Each function here is an ordinary operation written so that it keeps its IEEE
meaning on every backend, inside and outside `jax.jit`.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

SMALLEST_NORMAL = 2.0**-126  # float32; anything below may be flushed to zero by the hardware
LARGEST = float(jnp.finfo(jnp.float32).max)
LARGEST_SQUARED = 1e15  # 1e8 squares of such weights have a sum in float32


_Method = TypeVar("_Method", bound=Callable[..., Array])


def traced_once(method: _Method) -> _Method:
    """A method of a hashable object that is traced once for each shape: a program rounds in many places."""
    return cast(_Method, jax.jit(method, static_argnums=0))


def leading_half(x: Array) -> Array:
    """The upper 12 bits of a float32's 24; products of such halves are exact."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)


@jax.jit  # traced once for all that a program divides in these shapes
def divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x / y`, rounded once. Broadcasts; float32; `y` is positive, normal, and shared by many `x`.

    Plain division is not that everywhere: XLA turns a division by a broadcast value into a multiplication by
    its reciprocal, and on NVIDIA GPUs it divides approximately. Either is one unit in the last place off in a
    third of all quotients. So: an approximate quotient, its exact remainder by products of half-length
    numbers (Dekker, doi:10.1007/BF01397083), and one correction. All that concerns `y` alone is done once
    per tile; a search was a sixth slower for it on an H200, and no slower on a CPU.
    """
    shrink = reciprocal_power(y)  # exact, and keeps what follows in range
    x, y = x * shrink, y * shrink
    reciprocal = 1 / y
    y_high = leading_half(y)
    y_low = y - y_high
    quotient = x * reciprocal
    high = leading_half(quotient)
    low = quotient - high
    remainder = (((x - high * y_high) - high * y_low) - low * y_high) - low * y_low
    return quotient + remainder * reciprocal


def divide_short(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x / y` for an `x` of at most 8 significant bits, as a bfloat16 has: two products, to 2^-38 of itself.

    That is the rounded quotient but for one in eight thousand, which is one unit in the last place off. Only
    if that unit also decides a tie between two codes is another code chosen: in fewer than 1 of 10^10. Good
    for scoring candidates, not for codes that are stored. Broadcasts; float32; `y` as in `divide`.
    """
    x_high = lax.bitcast_convert_type(lax.bitcast_convert_type(1 / y, jnp.int32) & ~0xFF, jnp.float32)
    high, y_high = leading_half(x_high), leading_half(y)  # x_high has 16 bits: a product with x is exact
    low, y_low = x_high - high, y - y_high
    rest = (((1 - high * y_high) - high * y_low) - low * y_high) - low * y_low
    return x * x_high + x * (rest / y)


def multiply(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * y`, rounded once even where a sum follows. Broadcasts; float32.

    A product and the sum after it may be fused into one rounding. `code * scale - base` is then not zero
    where the stored weight equals the base, and a change that was lost looks kept. Taking the smaller of
    the product and the largest float stands between the two and changes no finite product.
    """
    return jnp.minimum(x * y, LARGEST)


@jax.jit
def is_finite(tree: Any) -> Array:
    """No NaN, no infinity, in any array of a tree; a scalar bool array."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def largest_size(tree: Any) -> Array:
    """The largest magnitude in a tree of arrays, float32; infinity where there is NaN or infinity."""
    sizes = [jnp.abs(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)]
    return jnp.stack([jnp.max(jnp.where(jnp.isfinite(x), x, jnp.inf), initial=0) for x in sizes]).max()


def is_staged() -> bool:
    """Whether JAX only records what is computed here: then nobody can look at numbers that are at hand."""
    return isinstance(jnp.zeros(()), Tracer)


def power_below(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The largest power of two that is not above |x|; zero for zero and for what is below 2^-126."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000, jnp.float32)


def reciprocal_power(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / power_below(x)`, but never below 2^-126; by its bits, which no machine rounds.

    2^127 for zero and for what is below 2^-126; 2^-126 for what is not finite.
    """
    bits = 0x7F000000 - (lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000)
    return lax.bitcast_convert_type(jnp.maximum(bits, 1 << 23), jnp.float32)
