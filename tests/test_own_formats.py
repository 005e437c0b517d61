"""Formats of a caller's own: floats of 6 bits that XLA lacks, and what a subclass of Format inherits."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import daq_jax as daq

SIXES = {
    "float6_e3m2fn": daq.SmallFloat("fp6_e3m2", "float6_e3m2fn", 28.0, mantissa_bits=2, min_exponent=-2),
    "float6_e2m3fn": daq.SmallFloat("fp6_e2m3", "float6_e2m3fn", 7.5, mantissa_bits=3, min_exponent=0),
}


@pytest.mark.parametrize("name", SIXES)
def test_a_float_of_six_bits_is_stored_as_its_bit_pattern(name):
    number, codes = SIXES[name], np.arange(64, dtype=np.uint8)
    values = codes.view(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(number.decode(jnp.asarray(codes)), values)
    np.testing.assert_array_equal(number.encode(jnp.asarray(values)), codes)  # signed zeros too
    x = np.random.default_rng(0).normal(0, number.largest / 2, 10_000).astype(np.float32)
    clipped = np.clip(x, -number.largest, number.largest)
    nearest = clipped.astype(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(number.round(jnp.asarray(x)), nearest)


@pytest.mark.parametrize("name", SIXES)
def test_a_weight_in_six_bits_is_within_half_a_step(name):
    number = SIXES[name]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32)
    q = daq.quantize(weight, weight, daq.Recipe(format=number, tiling=daq.Channel()), rules=())
    assert q.codes.dtype == jnp.uint8
    step = np.max(np.abs(weight), 0) / number.largest * 4.0  # the widest step of E3M2, eight of E2M3's
    assert (np.abs(np.asarray(q.dequantize() - weight)) <= step / 2 + 1e-6).all()


@pytest.mark.parametrize(
    "number", [daq.fp8_e4m3fn, daq.fp8_e5m2, daq.int8, daq.int4, daq.fp4_e2m1, daq.nf4, daq.fp4_bnb]
)
def test_the_inherited_floor_and_ceil_are_those_that_formats_have_of_their_own(number):
    x = np.random.default_rng(2).normal(0, number.largest * 0.6, 2000).astype(np.float32)
    x = jnp.asarray(np.concatenate([x, np.asarray(number.round(jnp.asarray(x))), [np.nan, np.inf, -np.inf]]))
    for name in ("floor", "ceil"):
        inherited = getattr(daq.Format, name)(number, x)
        np.testing.assert_array_equal(inherited, getattr(number, name)(x))
