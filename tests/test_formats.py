"""Every code, every bfloat16 number and ten million float32 numbers round as the formats' definitions say."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from daq_jax import DaqError
from daq_jax.formats import SmallFloat
from tests.cases import BF16, FORMATS

FAMILIES = pytest.mark.parametrize(("fmt", "number"), FORMATS, ids=lambda f: getattr(f, "name", None))
STORAGE = {"fp8_e4m3fn": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "int8": np.int8}
RUNS = pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])


def cast(x, number):
    """Round in float32 -> float32 by the storage type's own cast, after clipping."""
    clipped = np.clip(x, -np.float32(number.largest), np.float32(number.largest))
    return (
        np.rint(clipped) if number.name == "int8" else clipped.astype(STORAGE[number.name]).astype(np.float32)
    )


def many_floats(number, total=10_000_000):
    """Chunks of finite float32: midpoints and codes with neighbours, random bits, the format's range."""
    rng = np.random.default_rng(0)
    special = np.concatenate([number.midpoints(), number.grid()[0]]).astype(np.float32)
    yield np.concatenate(
        [special, np.nextafter(special, np.float32(-np.inf)), np.nextafter(special, np.float32(np.inf))]
    )
    chunk = 1_000_000
    for i in range(total // chunk):
        if i % 2:
            bits = rng.integers(0, 2**32, chunk, np.uint32).view(np.float32)
            yield np.where(np.isfinite(bits), bits, np.float32(0))
        else:  # from below the smallest code to twice the largest, all octaves alike
            size = np.exp2(rng.uniform(-20, np.log2(2 * number.largest), chunk))
            yield (size * rng.choice([-1, 1], chunk)).astype(np.float32)


def all_bfloat16():
    """Every bfloat16 number but NaN, as float32; both infinities are among them."""
    numbers = np.arange(2**16, dtype=np.uint16).view(BF16).astype(np.float32)
    return numbers[~np.isnan(numbers)]


@FAMILIES
def test_facts(fmt, number):
    assert float(fmt.largest) == number.largest
    assert np.dtype(fmt.dtype) == STORAGE[number.name]


@FAMILIES
def test_all_256_codes_decode_to_their_values(fmt, number):
    codes = np.arange(256, dtype=np.uint8).view(fmt.dtype)
    values = fmt.decode(jnp.asarray(codes))
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, number.values)
    np.testing.assert_array_equal(jax.jit(fmt.decode)(codes), number.values)


@FAMILIES
def test_every_usable_value_is_a_fixed_point_and_encodes_to_its_code(fmt, number):
    values = number.grid()[0].astype(np.float32)
    np.testing.assert_array_equal(fmt.round(jnp.asarray(values)), values)
    codes = fmt.encode(jnp.asarray(values))
    assert codes.dtype == fmt.dtype
    np.testing.assert_array_equal(number.decode(np.asarray(codes)), values)


@FAMILIES
@RUNS
def test_all_bfloat16_numbers_round_as_defined(fmt, number, run):
    x = all_bfloat16()
    rounded = run(fmt.round)(jnp.asarray(x))
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, number.round(x))
    np.testing.assert_array_equal(cast(x, number), number.round(x))  # the cast below is as good a witness


@FAMILIES
def test_ten_million_float32_numbers_round_as_the_cast_does(fmt, number):
    jitted = jax.jit(fmt.round)
    for x in many_floats(number):
        wanted = cast(x, number)
        np.testing.assert_array_equal(fmt.round(jnp.asarray(x)), wanted)
        np.testing.assert_array_equal(jitted(x), wanted)


@FAMILIES
@RUNS
def test_codes_are_those_of_the_rounded_values(fmt, number, run):
    x = next(many_floats(number))
    codes = run(lambda x: fmt.encode(fmt.round(x)))(jnp.asarray(x))
    np.testing.assert_array_equal(number.decode(np.asarray(codes)), number.round(x))


@FAMILIES
@RUNS
def test_nothing_rounds_to_infinity_or_nan(fmt, number, run):
    x = jnp.array([464.0, 465.0, 61440.0, 1e30, jnp.inf, 3.4e38], jnp.float32)
    for sign in (1.0, -1.0):
        codes = run(lambda x: fmt.encode(fmt.round(x)))(x * jnp.float32(sign))
        wanted = sign * np.minimum(np.asarray(x), number.largest)
        np.testing.assert_array_equal(number.decode(np.asarray(codes)), number.round(wanted))


def test_formats_are_values():
    for fmt, _ in FORMATS:
        assert hash(fmt) == hash(fmt)
        assert fmt == fmt
    assert len({fmt for fmt, _ in FORMATS}) == len(FORMATS)


def test_a_dtype_that_does_not_exist_is_refused_when_the_format_is_made():
    with pytest.raises(DaqError, match=r"fp6: `dtype` must be one of NumPy or ml_dtypes.*'float6_e3m2'"):
        SmallFloat("fp6", "float6_e3m2", 28.0, mantissa_bits=2, min_exponent=-2)
