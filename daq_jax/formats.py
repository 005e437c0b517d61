"""Number formats: which values a code can have, and how a real number becomes the nearest one.

`Format` says what the library asks of a format. The formats here are values of it; one of your own is a
frozen dataclass with the same members, or a `SmallFloat`, `Integer` or `Codebook` with other numbers.

Rounding is done in float32 arithmetic, not by a cast: on a GPU, XLA drops a cast to FP8 and back inside
`jit`, so a search written with casts would score weights that were never quantized.

| name | bits | values | largest | ties |
|---|---|---|---|---|
| `fp8_e4m3fn` | 8 | sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity | 448 | to even |
| `fp8_e5m2` | 8 | sign, 5 exponent bits (bias 15), 2 mantissa bits | 57344 | to even |
| `int8` | 8 | -127 .. 127 | 127 | to even |
| `int4` | 4 | -7 .. 7 | 7 | to even |
| `int8_full`, `int4_full` | 8, 4 | -128 .. 127, -8 .. 7 | 127, 7 | to even |
| `fp4_e2m1` | 4 | 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives | 6 | to even |
| `nf4` | 4 | the 16 levels of QLoRA | 1 | to the lower code |
| `fp4_bnb` | 4 | 0, 0.0625, 2, 3, 4, 6, 8, 12 and their negatives | 12 | to the lower code |

Sources: arXiv:2209.05433 (FP8), OCP Microscaling Formats v1.0 (FP4), arXiv:2305.14314 (NF4).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from daq_jax.errors import DaqError, check_dtype
from daq_jax.numerics.arithmetic import multiply, traced_once

_FEW_LEVELS = 32  # that codes are decoded by a choice for each
_NOT_IN_XLA = ("float6_e2m3fn", "float6_e3m2fn")  # dtypes that ml_dtypes has and no array of JAX can have


@runtime_checkable
class Format(Protocol):
    """What the library asks of a number format: a frozen, hashable value with these members.

    Values are float32, in code units, in arrays of any shape. Every function works element by element.

    Attributes:
        name: for messages and files.
        dtype: storage dtype of the codes, by its ml_dtypes name; one that JAX arrays can have.
        largest: largest finite value, in code units.
    """

    name: str
    dtype: str
    largest: float

    def round(self, x: Array) -> Array:
        """The value of the code nearest to each number, after clipping to `largest`; NaN stays NaN."""
        ...

    def encode(self, x: Array) -> Array:
        """The code, in the storage dtype, of each value that `round`, `floor` or `ceil` returned."""
        ...

    def decode(self, codes: Array) -> Array:
        """The float32 value of each code, exactly."""
        ...

    def floor(self, x: Array) -> Array:
        """The largest value not above each number, after clipping. A subclass of `Format` inherits this."""
        values = jnp.asarray(code_values(self))
        below = jnp.searchsorted(values, x, side="right") - 1
        return jnp.where(jnp.isnan(x), x, values[jnp.clip(below, 0, len(values) - 1)])

    def ceil(self, x: Array) -> Array:
        """The smallest value not below each number, after clipping. A subclass of `Format` inherits this."""
        values = jnp.asarray(code_values(self))
        above = jnp.searchsorted(values, x, side="left")
        return jnp.where(jnp.isnan(x), x, values[jnp.clip(above, 0, len(values) - 1)])


@functools.cache
def code_values(number: Format) -> np.ndarray:
    """`[V]` float32: every value that a code of the format can have, ascending.

    Raises:
        DaqError: if the storage dtype has more than 8 bits.
    """
    dtype = np.dtype(jnp.dtype(number.dtype))
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        bits, codes = info.bits, np.arange(info.min, info.max + 1).astype(dtype)
    else:
        bits = jnp.finfo(dtype).bits
        codes = np.arange(2**bits).astype(np.uint8).view(dtype) if bits <= 8 else np.zeros(0)
    if bits > 8:
        raise DaqError(f"{number.name}: a format of {bits} bits needs `floor` and `ceil` of its own.")
    with jax.ensure_compile_time_eval():
        values = np.asarray(number.decode(jnp.asarray(codes)))
    with jax.ensure_compile_time_eval():
        reached = np.asarray(number.round(jnp.asarray(values))) == values  # not NaN, nor what is never taken
    return np.unique(values[reached] + 0.0)  # -0 becomes 0


@functools.cache
def codes_are_values(number: Format) -> bool:
    """Whether a code, cast to float32, is its own value, so that codes can be multiplied as they are."""
    with jax.ensure_compile_time_eval():
        values = number.round(jnp.linspace(-number.largest, number.largest, 1001, dtype=jnp.float32))
        return bool(jnp.all(number.encode(values).astype(jnp.float32) == values))


@dataclasses.dataclass(frozen=True)
class _Cast(Format):
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
    """A float of at most 8 bits (16 for weights), with subnormals, that saturates instead of overflowing.

    Attributes:
        name: for messages and files.
        dtype: storage dtype. Of a dtype that XLA lacks, such as "float6_e3m2fn", codes are stored as uint8:
            the bit pattern in the lowest bits.
        largest: largest finite value.
        mantissa_bits: stored bits of the mantissa.
        min_exponent: exponent of the smallest normal value.

    >>> SmallFloat("fp6_e3m2", "float6_e3m2fn", 28.0, mantissa_bits=2, min_exponent=-2).dtype
    'uint8'
    """

    mantissa_bits: int
    min_exponent: int

    def __post_init__(self) -> None:
        if not (0 < self.largest < math.inf):
            raise DaqError(f"{self.name}: `largest` must be a number above 0; got {self.largest!r}.")
        check_dtype(self.name, self.dtype)
        if self.dtype in _NOT_IN_XLA:
            object.__setattr__(self, "dtype", "uint8")

    @property
    def _exponent_bits(self) -> int:
        exponents = math.frexp(self.largest)[1] - self.min_exponent + 1  # subnormals are one of them
        return (exponents - 1).bit_length()

    def encode(self, x: Float[Array, "..."]) -> Array:
        """Codes of values that `round` returned; exact, because such values are in the format."""
        if self.dtype != "uint8":
            return x.astype(self.dtype)
        bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
        exponent = (bits >> 23) - 127 - self.min_exponent + 1
        normal = (exponent << self.mantissa_bits) | ((bits & 0x7FFFFF) >> (23 - self.mantissa_bits))
        units = (jnp.abs(x) * 2.0 ** (self.mantissa_bits - self.min_exponent)).astype(jnp.int32)
        magnitude = jnp.where(exponent > 0, normal, units)
        sign = jnp.signbit(x).astype(jnp.int32) << (self._exponent_bits + self.mantissa_bits)
        return (sign | magnitude).astype(jnp.uint8)

    def decode(self, codes: Array) -> Float[Array, "..."]:
        """Float32 value of each code."""
        if self.dtype != "uint8":
            return codes.astype(jnp.float32)
        bits, width = codes.astype(jnp.int32), self._exponent_bits + self.mantissa_bits
        mantissa, exponent = bits & ((1 << self.mantissa_bits) - 1), (bits >> self.mantissa_bits)
        exponent = exponent & ((1 << self._exponent_bits) - 1)
        units = jnp.where(exponent > 0, mantissa + (1 << self.mantissa_bits), mantissa).astype(jnp.float32)
        # A power of two made of its bits: exact on every backend.
        power = jnp.maximum(exponent, 1) + (self.min_exponent - 1 - self.mantissa_bits + 127)
        size = units * lax.bitcast_convert_type(power << 23, jnp.float32)
        return jnp.where((bits >> width) & 1, -size, size)

    @traced_once
    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Nearest value of the format, ties to even, after clipping to its largest; NaN stays NaN."""
        x = jnp.clip(x, -self.largest, self.largest)
        # Adding 1.5 * 2^23 units in the last place leaves no room for a fraction of a unit, so float32
        # addition itself rounds, to even. `shift` varies by element: XLA folds (x + c) - c for constants.
        shift = self._unit(x) * (1.5 * 2.0**23)
        return (x + shift) - shift

    @traced_once
    def floor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Largest value not above each number, after clipping."""
        x, nearest = jnp.clip(x, -self.largest, self.largest), self.round(x)
        return jnp.where(nearest > x, nearest - self._unit(x), nearest)

    @traced_once
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
    """Whole numbers from `-largest` to `largest`; the symmetric range leaves the lowest code unused.

    Attributes:
        name: for messages and files.
        dtype: storage dtype, such as "int8".
        largest: largest whole number.
        uses_lowest: whether `-largest - 1` is a code too, as compressed-tensors writes it. An AbsMax scale
            does not count on it.
    """

    uses_lowest: bool = False

    def _clip(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.clip(x, -self.largest - self.uses_lowest, self.largest)

    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Nearest whole number, ties to even, after clipping to the range; NaN stays NaN."""
        return jnp.round(self._clip(x))

    def floor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Largest whole number not above each number, after clipping."""
        return jnp.floor(self._clip(x))

    def ceil(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Smallest whole number not below each number, after clipping."""
        return jnp.ceil(self._clip(x))


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """A short table of levels in ascending order; a code is an index into it, held as uint8.

    Attributes:
        name: for messages and files.
        levels: the values of the codes, in code units, ascending.
        dtype: storage dtype.
        largest: largest magnitude among the levels.

    Raises:
        DaqError: unless there are two levels or more, ascending.
    """

    name: str
    levels: tuple[float, ...]
    dtype: str = "uint8"
    largest: float = dataclasses.field(init=False, repr=False)  # largest magnitude among the levels

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise DaqError(f"{self.name}: `levels` must be two or more, ascending; got {self.levels}.")
        object.__setattr__(self, "largest", max(-self.levels[0], self.levels[-1]))

    @property
    def _midpoints(self) -> np.ndarray:
        levels = np.asarray(self.levels, np.float32)
        return (levels[:-1] + levels[1:]) / np.float32(2)

    def _last(self, passed: Iterable[Array]) -> Array:
        """The last level whose threshold is passed, given for each level but the first whether it is."""
        # A choice for each level, no table: that takes ten times as long on a CPU, and more on a TPU.
        level: Any = self.levels[0]
        for value, is_passed in zip(self.levels[1:], passed, strict=True):
            level = jnp.where(is_passed, jnp.float32(value), level)
        return level

    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Nearest level; a tie takes the lower one; NaN stays NaN."""
        return jnp.where(jnp.isnan(x), x, self._last(x > float(m) for m in self._midpoints))

    def floor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Highest level not above each number; the lowest level below them all."""
        return jnp.where(jnp.isnan(x), x, self._last(x >= level for level in self.levels[1:]))

    def ceil(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Lowest level not below each number; the highest level above them all."""
        return jnp.where(jnp.isnan(x), x, self._last(x > level for level in self.levels[:-1]))

    def encode(self, x: Float[Array, "..."]) -> Array:
        """Index of each level that `round` returned."""
        # One comparison a midpoint, no gather: a tie is not above its midpoint and takes the lower code.
        return sum((x > float(m)).astype(jnp.int32) for m in self._midpoints).astype(self.dtype)  # pyright: ignore

    def decode(self, codes: Array) -> Float[Array, "..."]:
        """Float32 level of each index."""
        index = codes.astype(jnp.int32)
        if len(self.levels) > _FEW_LEVELS:
            return jnp.asarray(np.asarray(self.levels, np.float32))[index]
        return self._last(index >= i for i in range(1, len(self.levels)))


fp8_e4m3fn = SmallFloat("fp8_e4m3fn", "float8_e4m3fn", 448.0, mantissa_bits=3, min_exponent=-6)
fp8_e5m2 = SmallFloat("fp8_e5m2", "float8_e5m2", 57344.0, mantissa_bits=2, min_exponent=-14)
int8 = Integer("int8", "int8", 127.0)
int4 = Integer("int4", "int4", 7.0)
int8_full = Integer("int8_full", "int8", 127.0, uses_lowest=True)
int4_full = Integer("int4_full", "int4", 7.0, uses_lowest=True)
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

FORMATS: dict[str, Format] = {
    f.name: f for f in (fp8_e4m3fn, fp8_e5m2, int8, int4, int8_full, int4_full, fp4_e2m1, nf4, fp4_bnb)
}

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


def step_towards(x: Float[Array, "..."], up: Bool[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """Distance from the code nearest to `x` to the next one above, or below it; 0 beyond the last code."""
    here = fmt.round(x)
    nudge = jnp.maximum(jnp.abs(here) * 2.0**-12, fmt.largest * 2.0**-40)  # less than any step
    return jnp.where(up, fmt.ceil(here + nudge) - here, here - fmt.floor(here - nudge))


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
