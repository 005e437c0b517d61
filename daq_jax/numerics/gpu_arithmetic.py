"""Arithmetic inside a kernel, in the GPU's own instructions where Triton would not choose them by itself.

Every function has a plain form for interpreted kernels, which run on any machine.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.numerics.arithmetic import leading_half, multiply
from daq_jax.numerics.kernel_choice import interpreted


def moved(base: Array, d: Array, gain: Array) -> Array:
    """`base + gain * d`, with two roundings."""
    if interpreted():
        return base + multiply(gain, d)
    from jax.experimental.pallas import triton

    (target,) = triton.elementwise_inline_asm(
        "{ .reg .f32 x; mul.rn.f32 x, $2, $3; add.rn.f32 $0, $1, x; }",
        args=[base, d, jnp.broadcast_to(gain, d.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(d.shape, jnp.float32)],
    )
    return target


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    """`a * b + c`, in one instruction, which Triton does not do here by itself; one rounding."""
    if interpreted():
        return a * b + c
    from jax.experimental.pallas import triton

    (result,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(x, c.shape) for x in (a, b, c)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)],
    )
    return result


def reciprocal(y: Array) -> tuple[Array, Array]:
    """`1 / y` as the sum of two floats, to 2^-46 of itself, for a `y` below 2^100."""
    x = 1 / y
    (y_high, y_low), (x_high, x_low) = ((h, z - h) for z, h in ((y, leading_half(y)), (x, leading_half(x))))
    error = (((1 - y_high * x_high) - y_high * x_low) - y_low * x_high) - y_low * x_low
    return x, error * x
