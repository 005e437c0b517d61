"""The density twin of tests/test_traps.py: a product that a compiler fuses with the subtraction after it.

Weights here are exactly what some codes stand for, so an error of the codes is 0 and a change back to them is
lost. A fused product and subtraction finds a tiny number in place of each 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.density.groups import AffineMap, Groups
from daq_jax.density.output_rounding import LossBlocks, round_by_output
from tests.cases import rng_for

GROUPS, INPUTS, OUTPUTS = 3, 32, 5


def on_codes(name):
    """Code values `[N, n, C]`, scale and zero `[N, C]`, and the weights they stand for, by NumPy."""
    rng = rng_for(name)
    levels = np.asarray(daq.nf4.levels, np.float32)
    values = levels[rng.integers(0, 16, (GROUPS, INPUTS, OUTPUTS))]
    scale = rng.uniform(1e-3, 2e-3, (GROUPS, OUTPUTS)).astype(np.float32)
    zero = rng.normal(0, 0.1, (GROUPS, OUTPUTS)).astype(np.float32)
    return values, scale, zero, (values - zero[:, None]) * scale[:, None]


def groups_of(weight):
    real = jnp.ones((GROUPS, INPUTS, 1), bool)
    return Groups(weight, real, jnp.tile(jnp.eye(INPUTS), (GROUPS, 1, 1)), daq.nf4, True)


def test_codes_that_stand_for_the_weights_have_no_error():
    values, scale, zero, weight = on_codes("no error")
    obvious = jax.jit(lambda v, s, z, w: w - (v - z[:, None]) * s[:, None])(values, scale, zero, weight)
    assert np.mean(np.asarray(obvious) != 0) > 0.5
    for number in ("error", "loss"):
        ours = jax.jit(lambda v, s, z, w, number=number: getattr(groups_of(w), number)(v, AffineMap(s, z)))
        np.testing.assert_array_equal(ours(values, scale, zero, weight), 0)


def test_rounding_by_the_output_leaves_exact_codes_as_they_are():
    values, scale, zero, weight = on_codes("exact")

    @jax.jit
    def rounded(scale, zero, weight):
        groups = groups_of(weight)
        return round_by_output(groups, LossBlocks.of(groups.gram), AffineMap(scale, zero), sweeps=2)

    found, (new_scale, new_zero) = rounded(scale, zero, weight)
    for got, wanted in ((found, values), (new_scale, scale), (new_zero, zero)):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_a_density_search_sees_that_a_change_is_lost():
    """A base on its own nf4 grid: at the AbsMax scale most of a small change is rounded away."""
    rng = rng_for("sees")
    weight = rng.normal(0, 0.02, (128, 64)).astype(np.float32)
    plain = daq.DensityRecipe(centre=None, shift=False, adjust=None, sweeps=0, damping=0.0)
    base = np.asarray(daq.quantize_density({"k": weight}, None, plain)["k"].dequantize(jnp.float32))
    change = 1 + rng.normal(0, 1e-2, weight.shape).astype(np.float32)
    tuned = np.where(np.abs(base) >= np.abs(base).max(0), base, base * change)
    recipe = dataclasses.replace(plain, adjust=daq.SignSteps(epochs=1), metric=daq.SignRate())
    q = daq.quantize_density({"k": tuned}, None, recipe, base={"k": base})["k"]
    kept = daq.compare({"k": base}, {"k": tuned}, {"k": q}).total
    before = daq.compare(
        {"k": base}, {"k": tuned}, {"k": daq.quantize_density({"k": tuned}, None, plain)["k"]}
    )
    assert before.total.unchanged > 0.9  # a search that does not see this stays near it
    assert kept.sign_rate > 0.48
