"""Number formats: which values a code can have, and how a real number becomes the nearest one.

A format is a value that describes itself: its storage dtype, its largest value, and the functions

`round` (a float32 to the float32 value of the nearest code, after clipping; `floor` and `ceil` likewise),
`encode` (such a value to its code) and `decode` (a code to its value, always exact). Any object with these
attributes is as good.

Rounding is done in float32 arithmetic, not by a cast: on a GPU, XLA drops a cast to FP8 and back inside
`jit`, so a search written with casts would score weights that were never quantized.

| name | bits | values | largest | ties |
|---|---|---|---|---|
| `fp8_e4m3fn` | 8 | sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity | 448 | to even |
| `fp8_e5m2` | 8 | sign, 5 exponent bits (bias 15), 2 mantissa bits | 57344 | to even |
| `int8` | 8 | -127 .. 127 | 127 | to even |
| `int4` | 4 | -7 .. 7 | 7 | to even |
| `fp4_e2m1` | 4 | 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives | 6 | to even |
| `nf4` | 4 | the 16 levels of QLoRA | 1 | to the lower code |
| `fp4_bnb` | 4 | 0, 0.0625, 2, 3, 4, 6, 8, 12 and their negatives | 12 | to the lower code |

Sources: arXiv:2209.05433 (FP8), OCP Microscaling Formats v1.0 (FP4), arXiv:2305.14314 (NF4).
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from daq_jax.errors import DaqError
from daq_jax.numerics.arithmetic import multiply


@runtime_checkable
class Format(Protocol):
    """What the rest of the library asks of a number format."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...  # storage dtype, by its ml_dtypes name
    @property
    def largest(self) -> float: ...  # largest finite value, in code units
    def round(self, x: Array) -> Array: ...
    def floor(self, x: Array) -> Array: ...
    def ceil(self, x: Array) -> Array: ...
    def encode(self, x: Array) -> Array: ...
    def decode(self, codes: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class _Cast:
    """A format whose codes are numbers of their storage dtype, so that coding is a cast."""

    name: str
    dtype: str
    largest: float

    def encode(self, x: Float[Array, "..."]) -> Array:
        """Codes of values that `round` returned; exact, because such values are in the dtype."""
        return x.astype(self.dtype)

    def decode(self, codes: Array) -> Float[Array, "..."]:
        """Float32 value of each code."""
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SmallFloat(_Cast):
    """A float of a few bits, with subnormals, that saturates instead of overflowing.

    `mantissa_bits` counts the stored bits; `min_exponent` is the exponent of the smallest normal value.
    """

    mantissa_bits: int
    min_exponent: int

    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Nearest value of the format, ties to even, after clipping to its largest; NaN stays NaN."""
        x = jnp.clip(x, -self.largest, self.largest)
        # Adding 1.5 * 2^23 units in the last place leaves no room for a fraction of a unit, so float32
        # addition itself rounds, to even. `shift` varies by element: XLA folds (x + c) - c for constants.
        shift = self._unit(x) * (1.5 * 2.0**23)
        return (x + shift) - shift

    def floor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Largest value not above each number, after clipping."""
        x, nearest = jnp.clip(x, -self.largest, self.largest), self.round(x)
        return jnp.where(nearest > x, nearest - self._unit(x), nearest)

    def ceil(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Smallest value not below each number, after clipping."""
        x, nearest = jnp.clip(x, -self.largest, self.largest), self.round(x)
        return jnp.where(nearest < x, nearest + self._unit(x), nearest)

    def _unit(self, x: Array) -> Array:
        """Unit in the last place of the format at each number, float32."""
        magnitude = jnp.maximum(jnp.abs(x), 2.0**self.min_exponent)
        bits = lax.bitcast_convert_type(magnitude, jnp.int32) & 0x7F800000  # keeps the power of two
        return lax.bitcast_convert_type(bits, jnp.float32) * 2.0**-self.mantissa_bits


@dataclasses.dataclass(frozen=True)
class Integer(_Cast):
    """Whole numbers from `-largest` to `largest`; the symmetric range leaves the lowest code unused."""

    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Nearest whole number, ties to even, after clipping to the largest; NaN stays NaN."""
        return jnp.round(jnp.clip(x, -self.largest, self.largest))

    def floor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Largest whole number not above each number, after clipping."""
        return jnp.floor(jnp.clip(x, -self.largest, self.largest))

    def ceil(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Smallest whole number not below each number, after clipping."""
        return jnp.ceil(jnp.clip(x, -self.largest, self.largest))


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A short table of levels in ascending order; a code is an index into it, held as uint8."""

    name: str
    levels: tuple[float, ...]
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise DaqError(f"{self.name}: `levels` must be two or more, ascending; got {self.levels}.")

    @property
    def largest(self) -> float:
        """Largest magnitude among the levels."""
        return max(-self.levels[0], self.levels[-1])

    @property
    def _midpoints(self) -> np.ndarray:
        levels = np.asarray(self.levels, np.float32)
        return (levels[:-1] + levels[1:]) / np.float32(2)

    def _index(self, x: Array) -> Array:
        # One comparison a midpoint, no gather: a tie is not above its midpoint and takes the lower code.
        return sum((x > float(m)).astype(jnp.int32) for m in self._midpoints)  # pyright: ignore

    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Nearest level; a tie takes the lower one; NaN stays NaN."""
        # One choice a midpoint, no table: a look-up took ten times as long on a CPU.
        nearest = jnp.full_like(x, self.levels[0])
        for midpoint, level in zip(self._midpoints, self.levels[1:], strict=True):
            nearest = jnp.where(x > float(midpoint), level, nearest)
        return jnp.where(jnp.isnan(x), x, nearest)

    def floor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Highest level not above each number; the lowest level below them all."""
        index = sum((x >= level).astype(jnp.int32) for level in self.levels[1:])
        return jnp.where(jnp.isnan(x), x, self.decode(index))  # pyright: ignore

    def ceil(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Lowest level not below each number; the highest level above them all."""
        index = sum((x > level).astype(jnp.int32) for level in self.levels[:-1])
        return jnp.where(jnp.isnan(x), x, self.decode(index))  # pyright: ignore

    def encode(self, x: Float[Array, "..."]) -> Array:
        """Index of each level that `round` returned."""
        return self._index(x).astype(self.dtype)

    def decode(self, codes: Array) -> Float[Array, "..."]:
        """Float32 level of each index."""
        return jnp.asarray(np.asarray(self.levels, np.float32))[codes.astype(jnp.int32)]


fp8_e4m3fn = SmallFloat("fp8_e4m3fn", "float8_e4m3fn", 448.0, mantissa_bits=3, min_exponent=-6)
fp8_e5m2 = SmallFloat("fp8_e5m2", "float8_e5m2", 57344.0, mantissa_bits=2, min_exponent=-14)
int8 = Integer("int8", "int8", 127.0)
int4 = Integer("int4", "int4", 7.0)
fp4_e2m1 = SmallFloat("fp4_e2m1", "float4_e2m1fn", 6.0, mantissa_bits=1, min_exponent=0)
nf4 = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
fp4_bnb = Codebook(
    "fp4_bnb",
    (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -0.0625, 0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
)

FORMATS: dict[str, Format] = {f.name: f for f in (fp8_e4m3fn, fp8_e5m2, int8, int4, fp4_e2m1, nf4, fp4_bnb)}

_FLOAT16 = SmallFloat("float16", "float16", 65504.0, mantissa_bits=10, min_exponent=-14)


def dither(number: Format, x: Float[Array, "..."], thresholds: Float[Array, "..."]) -> Float[Array, "..."]:
    """The value of a format below each number, or above where its place between the two exceeds a threshold.

    Args:
        number: the format.
        x: float32.
        thresholds: in [0, 1); broadcasts.
    """
    low, high = number.floor(x), number.ceil(x)
    return jnp.where(thresholds * (high - low) < x - low, high, low)


def weights_of(
    values: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero: Float[Array, "..."] | float | None = None,
) -> Float[Array, "..."]:
    """The weights that code values stand for: `(values - zero) * scale`, the product rounded once.

    Every product that a weight is later subtracted from goes through this function. A product and the sum
    after it may otherwise be fused into one rounding: the kept change of a weight that was rounded back to
    its base then comes out as a tiny number in place of 0, and a change that was lost looks kept.

    Args:
        values: of the codes, float32.
        scale: weight units per code unit, float32; broadcasts against `values`.
        zero: code value that stands for weight 0, float32; broadcasts. None for 0.

    >>> weights_of(jnp.array([3.0, -1.0]), jnp.float32(0.5), jnp.float32(1.0))
    Array([ 1., -1.], dtype=float32)
    """
    return multiply(values if zero is None else values - zero, scale)


def round_to_dtype(x: Float[Array, "..."], dtype: np.dtype) -> Float[Array, "..."]:
    """`x.astype(dtype)` that is really rounded, also where a cast back to float32 follows inside `jit`.

    Args:
        x: float32.
        dtype: bfloat16, float16 (saturating) or float32.
    """
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    elif dtype == jnp.float16:
        x = _FLOAT16.round(x)
    return x.astype(dtype)
