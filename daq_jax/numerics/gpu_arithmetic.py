"""Arithmetic inside a kernel, in the GPU's own instructions where Triton would not choose them by itself.

Every function has a plain form, which `interpret` asks for: it runs anywhere, for tests.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.formats import Format, fp8_e4m3fn, fp8_e5m2
from daq_jax.numerics.arithmetic import divide, leading_half, multiply

INSTRUCTION: dict[Format, str] = {fp8_e4m3fn: "e4m3x2", fp8_e5m2: "e5m2x2"}

# Two elements at a time: the quotient by a reciprocal in two parts, the code, its value, and the kept change.
# `.rn` also says that a product and the sum after it must not be fused. Saturates, as `Format.round` does.
_KEPT = """{{
.reg .f32 x, y;
.reg .b16 pair, low, high;
.reg .b32 both;
mul.rn.f32 x, $2, $8;
mul.rn.f32 y, $3, $9;
fma.rn.f32 x, $2, $6, x;
fma.rn.f32 y, $3, $7, y;
cvt.rn.satfinite.{0}.f32 pair, y, x;
cvt.rn.f16x2.{0} both, pair;
mov.b32 {{low, high}}, both;
cvt.f32.f16 x, low;
cvt.f32.f16 y, high;
mul.rn.f32 x, x, $10;
mul.rn.f32 y, y, $11;
sub.rn.f32 $0, x, $4;
sub.rn.f32 $1, y, $5;
}}"""


def kept(base: Array, tuned: Array, scale: Array, number: Format, interpret: bool) -> Array:
    """The kept change of the nearest codes."""
    if interpret:
        return multiply(number.round(divide(tuned, scale)), scale) - base
    from jax.experimental.pallas import triton

    whole, rest = reciprocal(scale)
    (change,) = triton.elementwise_inline_asm(
        _KEPT.format(INSTRUCTION[number]),
        args=[tuned, base, *(jnp.broadcast_to(x, base.shape) for x in (whole, rest, scale))],
        constraints="=f,=f" + ",f" * 10,
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(base.shape, jnp.float32)],
    )
    return change


def moved(base: Array, d: Array, gain: Array, interpret: bool) -> Array:
    """`base + gain * d`, with two roundings."""
    if interpret:
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


def multiply_add(a: Array, b: Array, c: Array, interpret: bool) -> Array:
    """`a * b + c`, in one instruction, which Triton does not do here by itself; one rounding."""
    if interpret:
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
