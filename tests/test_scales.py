"""Rules of scales against their definitions, written with NumPy and `math` alone."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.scales import TwoLevel
from tests.cases import rng_for
from tests.native_folders import FP8


def power(largest_weight: float, rule: str, largest_code: float) -> float:
    """The scale of a tile by the definition of each rule."""
    if rule == "ceil":
        return 2.0 ** math.ceil(math.log2(largest_weight / largest_code))
    mantissa, exponent = math.frexp(largest_weight)  # mantissa in [1/2, 1)
    exponent -= 1
    if rule == "round up from 1.75" and 2 * mantissa >= 1.75:
        exponent += 1
    return 2.0 ** (exponent - math.floor(math.log2(largest_code)))


@pytest.mark.parametrize("number", [daq.fp4_e2m1, daq.fp8_e4m3fn], ids=lambda x: x.name)
@pytest.mark.parametrize("rule", ["ceil", "floor", "round up from 1.75"])
def test_powers_of_two_follow_their_rule(rule, number):
    random = np.abs(rng_for("powers").normal(size=500)).astype(np.float32) * 2.0 ** rng_for("e").integers(
        -20, 20, 500
    )
    edges = np.array(
        [m * 2.0**e for m in (1, 1.25, 1.5, 1.7421875, 1.75, 1.7578125, 1.9921875) for e in range(-4, 4)]
    )
    weights = np.concatenate([random.astype(np.float32).astype(jnp.bfloat16).astype(np.float32), edges])
    scale = (weights.astype(np.float32) / np.float32(number.largest)).astype(np.float32)
    found = daq.PowerOfTwo(rule, number)(jnp.asarray(scale))
    np.testing.assert_array_equal(found, [power(float(w), rule, number.largest) for w in weights])


@pytest.mark.parametrize("divides", [False, True])
def test_two_levels_give_the_nearest_number_of_fp8_times_the_factor(divides):
    factor = 17321.5 if divides else 5.77e-5
    unit = 1 / np.float32(factor) if divides else np.float32(factor)
    scale = (np.exp(rng_for("two").uniform(-6, 6, 300)) * unit).astype(np.float32)
    known = np.unique(FP8[np.isfinite(FP8) & (FP8 > 0) & (FP8 <= 448)])
    nearest = known[np.abs(scale.astype(np.float64)[:, None] / unit - known).argmin(1)]
    expected = nearest / np.float32(factor) if divides else nearest * np.float32(factor)
    np.testing.assert_array_equal(TwoLevel(factor, divides)(jnp.asarray(scale)), expected)


def test_rules_without_what_they_need_are_refused():
    with pytest.raises(ValueError, match="depends on the largest code; pass the format"):
        daq.PowerOfTwo("floor")
    with pytest.raises(ValueError, match="`rule` must be one of 'ceil'"):
        daq.PowerOfTwo("nearest")
    with pytest.raises(ValueError, match="`factor` must be a number above 0"):
        TwoLevel(0.0)
