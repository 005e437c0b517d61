"""The scale of a tile: what AbsMax gives, and which scales a file or a server can hold.

A scale is float32, weight units per code unit, and always positive.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from daq_jax.errors import DaqError
from daq_jax.formats import FORMATS, Format, fp8_e4m3fn, round_to_dtype  # noqa: F401 (FORMATS: the examples)
from daq_jax.numerics.arithmetic import SMALLEST_NORMAL, divide, multiply


def usable(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scale 1 in place of zero and of scales too small for a normal float32; NaN stays NaN."""
    return jnp.where(scale < SMALLEST_NORMAL, 1.0, scale)


def absmax_scale(tiles: Float[Array, "..."], axes: tuple[int, ...], *, largest: float) -> Float[Array, "..."]:
    """Smallest scale at which no element of a tile saturates: `absmax / largest`, rounded once.

    Args:
        tiles: any shape, float32. Weights, cut into tiles.
        axes: the axes that a tile's elements lie on; they stay with length 1.
        largest: largest value of the format, in code units; 448 for e4m3.

    Returns:
        Float32, weight units per code unit. An all-zero tile gets 1; a tile with NaN or infinity NaN.

    >>> absmax_scale(jnp.array([[2.0, -896.0]]), (1,), largest=448.0)
    Array([[2.]], dtype=float32)
    """
    return scale_reaching(jnp.max(finite_size(tiles), axis=axes, keepdims=True), largest)


def finite_size(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The magnitude of each number; infinity for NaN, which a maximum may drop (XLA's does on CPUs)."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)


def scale_reaching(absmax: Float[Array, "..."], largest: float) -> Float[Array, "..."]:
    """`absmax_scale` of tiles whose largest `finite_size` is known."""
    # Behind the barrier `largest` is no constant, whose reciprocal XLA would multiply with.
    scale = divide(absmax, lax.optimization_barrier(jnp.float32(largest)))
    return jnp.where(jnp.isfinite(absmax), usable(scale), jnp.nan)


@runtime_checkable
class Scales(Protocol):
    """Which scales may be stored: a frozen, hashable value, called with scales and giving those to store.

    A plain function of this signature serves as well.
    """

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of each, float32; positive for a positive one, NaN for NaN."""
        ...


@dataclasses.dataclass(frozen=True)
class AnyScale(Scales):
    """Every positive float32 is a scale."""

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        return scale


# Of each rule: the mantissa of a tile's largest magnitude from which its power of two is the next one.
_ROUNDS_UP_FROM = {"floor": 2.0, "round up from 1.75": 1.75}


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Scales):
    """Powers of two only, for formats and servers that know no other scales.

    | rule | scale of a tile whose largest magnitude is `m * 2^e`, `1 <= m < 2` |
    |---|---|
    | "ceil" | the smallest at which nothing saturates |
    | "floor" | `2^e` over the power of two in the largest code: OCP Microscaling |
    | "round up from 1.75" | as "floor", of `2^(e + 1)` where `m >= 1.75`: compressed-tensors |

    The last two clip: under "floor" a magnitude of up to twice the power of two in the largest code, 8 where
    e2m1 ends at 6, becomes the largest code. All three round any scale that a search tries in the same way,
    as if it were an AbsMax scale. A search has nothing to find: two candidates within an octave give the same
    scale.

    Attributes:
        rule: one of the three.
        format: number format of the codes; only "ceil" needs none.

    Raises:
        DaqError: for another rule, or without the format that a rule needs.

    Source: OCP Microscaling Formats v1.0; compressed-tensors 0.20, `generate_mx_scales`.

    >>> of_4 = jnp.float32(4 / 6)  # AbsMax scale of a tile that reaches to 4, in e2m1
    >>> float(PowerOfTwo()(of_4)), float(PowerOfTwo("floor", FORMATS["fp4_e2m1"])(of_4))
    (1.0, 1.0)
    >>> float(PowerOfTwo("floor", FORMATS["fp4_e2m1"])(jnp.float32(7 / 6)))
    1.0
    """

    rule: str = "ceil"
    format: Format | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("ceil", *_ROUNDS_UP_FROM):
            rules = ", ".join(map(repr, ("ceil", *_ROUNDS_UP_FROM)))
            raise DaqError(f"PowerOfTwo: `rule` must be one of {rules}; got {self.rule!r}.")
        if self.rule != "ceil" and self.format is None:
            raise DaqError(
                f"PowerOfTwo: the rule {self.rule!r} depends on the largest code; pass the format, such as "
                f"PowerOfTwo({self.rule!r}, daq.fp4_e2m1)."
            )

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        bits = lax.bitcast_convert_type(scale, jnp.int32)
        mantissa = bits & 0x007FFFFF
        power = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
        if self.format is None or self.rule == "ceil":
            power = jnp.where(mantissa, power * 2, power)
        else:
            # The magnitude is the scale times the largest code; both mantissas are below 2.
            largest = 2 * math.frexp(self.format.largest)[0]
            for edge in (_ROUNDS_UP_FROM[self.rule], 2 * _ROUNDS_UP_FROM[self.rule]):
                power = jnp.where(mantissa >= _mantissa_of(edge / largest), power * 2, power)
        return jnp.where(jnp.isfinite(scale), power, jnp.nan)


def _mantissa_of(x: float) -> int:
    """The bits of a mantissa from which a number in [1, 2) is at least `x`."""
    if x >= 2:
        return 2**23
    return int(np.float32(max(x, 1.0)).view(np.int32)) & 0x007FFFFF


@dataclasses.dataclass(frozen=True)
class TwoLevel(Scales):
    """Numbers of FP8 (e4m3) times one factor for all tiles: the nearest one, from 2^-9 to 448 of the factor.

    Attributes:
        factor: the factor, or with `divides` its inverse; a float32 number.
        divides: whether a scale is the FP8 number over `factor`, as compressed-tensors has it, in place of
            the product, as ModelOpt has it. The two round differently.

    Raises:
        DaqError: unless `factor` is a positive finite number.
    """

    factor: float
    divides: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise DaqError(f"TwoLevel: `factor` must be a number above 0; got {self.factor!r}.")

    def local(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The FP8 number of each scale, float32."""
        factor = lax.optimization_barrier(jnp.float32(self.factor))  # or XLA multiplies with its reciprocal
        over = multiply(scale, factor) if self.divides else divide(scale, factor)
        return fp8_e4m3fn.round(jnp.where(over < 2.0**-9, 2.0**-9, over))

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        factor, local = lax.optimization_barrier(jnp.float32(self.factor)), self.local(scale)
        return divide(local, factor) if self.divides else multiply(local, factor)


@dataclasses.dataclass(frozen=True)
class InDtype(Scales):
    """Numbers of a narrower float dtype only, for servers that hold scales in it: the nearest one.

    The nearest, not the next: a base whose scales were rounded so is found on its own grid again.
    """

    dtype: str = "bfloat16"

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        return usable(round_to_dtype(scale, np.dtype(self.dtype)).astype(jnp.float32))
