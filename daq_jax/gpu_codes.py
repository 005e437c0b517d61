"""FP8 codes inside a kernel for NVIDIA GPUs, by the chip's own conversion instructions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.formats import Format, fp8_e4m3fn, fp8_e5m2, weights_of
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.gpu_arithmetic import reciprocal
from daq_jax.numerics.kernel_choice import interpreted

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


def kept(base: Array, tuned: Array, scale: Array, number: Format) -> Array:
    """The kept change of the nearest codes."""
    if interpreted():
        return weights_of(number.round(divide(tuned, scale)), scale) - base
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
