"""Density-aware quantization: the zero of a QTensor, the stages, the losses, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng_for

import daq_jax as daq
from daq_jax.grams import KernelInputs

FORMATS = [daq.nf4, daq.fp4_e2m1, daq.fp4_bnb, daq.int4]
OFF = daq.DensityRecipe(centre=None, adjust=None, sweeps=0)


def weight_and_grams(name, shape=(300, 20), tokens=900):
    """A skewed float32 weight, and joint Gram matrices of correlated inputs that are off centre."""
    rng = rng_for(name)
    weight = (rng.standard_t(5, shape) * 0.02 + 0.01).astype(np.float32)
    mixing = np.eye(shape[0]) + rng.normal(0, 0.1, (shape[0], shape[0]))
    inputs = rng.normal(0.2, 1, (tokens, shape[0])) @ mixing
    gram = (inputs.T @ inputs / tokens).astype(np.float32)
    return weight, daq.Grams(
        {"kernel": jnp.asarray(gram)}, (KernelInputs("kernel", (0,), shape[0]),), joint=True
    )


def quantized(weight, grams=None, recipe=OFF, **options):
    return daq.quantize_density({"kernel": weight}, grams, recipe, **options)["kernel"]


def row_loss(weight, q, gram):
    """Float64 e' G e, summed over outputs."""
    error = np.float64(q.dequantize()) - np.float64(weight)
    return np.sum(error * (np.float64(gram) @ error))


def group_loss(weight, q, gram, n):
    """The same with no product between groups."""
    blocks = np.kron(np.eye(-(-len(gram) // n)), np.ones((n, n)))[: len(gram), : len(gram)]
    return row_loss(weight, q, np.float64(gram) * blocks)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("group", [32, None])
def test_without_any_stage_it_is_absmax(fmt, group):
    weight, grams = weight_and_grams("off")
    q = quantized(weight, grams, dataclasses.replace(OFF, format=fmt, group=group))
    tiling = daq.Channel() if group is None else daq.Group(group)
    plain = daq.quantize(weight, weight, daq.Recipe(format=fmt, tiling=tiling))
    np.testing.assert_array_equal(q.scale, plain.scale)
    np.testing.assert_array_equal(q.dequantize(), plain.dequantize())
    assert (q.tiling, q.format, q.zero.shape) == (plain.tiling, fmt, q.scale.shape)
    assert not q.zero.any()


def test_a_weight_is_code_less_zero_times_scale_everywhere():
    weight, grams = weight_and_grams("zero", (70, 6))
    q = quantized(weight.astype(jnp.bfloat16), grams, daq.DensityRecipe(group=32, adjust=None, sweeps=1))
    levels = np.asarray(daq.nf4.levels, np.float32)[np.asarray(q.codes)]
    zero, scale = (np.repeat(np.asarray(x), 32, axis=0)[:70] for x in (q.zero, q.scale))
    wanted = ((levels - zero) * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(q.dequantize(), wanted)
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(q), wanted)
    assert len(jax.tree.leaves(q)) == 3
    assert q.nbytes == 70 * 6 + 2 * 4 * 3 * 6
    table = daq.compare(weight * 0, weight, {"": q} and q).total
    error = np.float64(np.float32(zero * 0) + (levels - zero) * scale) - weight
    np.testing.assert_allclose(table.mse, np.mean(error**2), rtol=1e-5)


def test_the_base_of_a_comparison_may_have_a_zero():
    weight, grams = weight_and_grams("on grid", (64, 6))
    base = quantized(weight, grams, daq.DensityRecipe(group=32, adjust=None, sweeps=1))
    again = daq.quantize(
        base, base, daq.Recipe(format=daq.nf4, tiling=daq.Group(32), search=daq.WithBaseScale(daq.AbsMax()))
    )
    assert daq.compare(base, base, again).total.on_grid == 1


SMALL = daq.LeastSquares(coarse=2, fine=2, turns=1)


@pytest.mark.parametrize(("fmt", "group"), [(daq.nf4, 32), (daq.fp4_e2m1, None)], ids=["nf4", "fp4"])
def test_each_stage_lowers_the_loss(fmt, group):
    weight, grams = weight_and_grams("stages", (96, 8))
    n, gram = group or 96, grams.products["kernel"]
    recipe = daq.DensityRecipe(format=fmt, group=group, damping=0.0, adjust=SMALL, sweeps=1)
    stages = [
        dataclasses.replace(recipe, adjust=None, sweeps=0),
        dataclasses.replace(recipe, sweeps=0),
        recipe,
    ]
    losses = [group_loss(weight, quantized(weight, grams, r), gram, n) for r in stages]
    assert losses[0] > losses[1] > losses[2]
    row = quantized(weight, grams, dataclasses.replace(recipe, loss="row"))
    assert row_loss(weight, row, gram) < losses[1]
