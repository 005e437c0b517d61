"""Triangular factors of stacks of matrices, against NumPy's in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.numerics import linalg
from daq_jax.numerics.linalg import factor, inverse_factor
from daq_jax.roundings import carriers, dithered, row_blocks

SHAPES = [(8, 8), (1, 16, 16), (5, 8, 8), (2, 3, 16, 16)]


def positive(shape):
    x = np.random.default_rng(0).normal(size=(*shape[:-1], 2 * shape[-1])).astype(np.float32)
    return (x @ x.mT / shape[-1]).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_those_of_numpy(shape):
    gram = positive(shape)
    expected = np.linalg.cholesky(gram.astype(np.float64))
    np.testing.assert_allclose(factor(jnp.asarray(gram)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(inverse_factor(jnp.asarray(gram)), np.linalg.inv(expected), rtol=0, atol=1e-4)


def test_a_matrix_that_is_not_positive_definite_gives_nan_and_leaves_the_others():
    gram = positive((3, 8, 8))
    gram[1] = -gram[1]
    for found in (factor(jnp.asarray(gram)), inverse_factor(jnp.asarray(gram))):
        assert np.isnan(np.tril(found[1])).any()
        assert np.isfinite(found[0]).all()
        assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("function", [factor, inverse_factor])
def test_a_cpu_never_gets_a_stack(function):
    """The calls of jaxlib 0.10 for stacks wait for threads that may all be waiting in such calls."""
    program = jax.jit(function).lower(jnp.zeros((4, 2, 8, 8))).compile().as_text()
    calls = re.findall(
        r"f32\[([\d,]*)\]\S* custom-call.*lapack|\(f32\[([\d,]*)\].*custom-call.*lapack", program
    )
    shapes = {a or b for a, b in calls}
    assert shapes == {"8,8"}, program


ROUNDINGS = {
    "dithered": daq.DitheredFeedback(rank=16),
    "feedback": daq.UnbiasedFeedback(rank=16),
    "subspace": daq.UnbiasedSubspace(rank=16),
}


def products(jaxpr):
    """Precision of each product of matrices in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_product_states_its_precision(name):
    weight = jnp.zeros((64, 48), jnp.bfloat16)
    recipe = daq.Recipe(rounding=ROUNDINGS[name])
    program = jax.make_jaxpr(lambda w: daq.quantize({"w": w}, {"w": w}, recipe, rules=()))(weight)
    found = list(products(program.jaxpr))
    assert len(found) > 5
    stated = {(p, p) for p in (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)}
    assert set(found) <= stated


@pytest.mark.parametrize("grid", ["fp8", "mxfp4"])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_rough_products_may_be_as_rough_as_those_of_a_tpu(name, grid, monkeypatch):
    """Error in the leading directions of the change, and its projection, with factors in bfloat16."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(256, 192)).astype(np.float32)
    more = (
        {"format": daq.fp4_e2m1, "tiling": daq.Group(32), "scales": daq.PowerOfTwo()}
        if grid == "mxfp4"
        else {}
    )
    base = daq.quantize({"w": weight}, {"w": weight}, daq.Recipe(**more), rules=())["w"].dequantize(
        jnp.float32
    )
    u, v = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in weight.shape)
    change = 0.02 * np.linalg.norm(weight) / np.sqrt(8) * u @ v.T
    pair = [{"w": np.asarray(x, np.float32)} for x in (base, base + change)]
    recipe = daq.Recipe(rounding=ROUNDINGS[name], **more)

    def figures():
        kept = np.asarray(daq.quantize(*pair, recipe, rules=())["w"].dequantize(jnp.float32)) - np.asarray(
            base
        )
        error = u.T @ (kept - change) @ v
        return np.sum(kept * change) / np.sum(change**2), np.linalg.norm(error) / np.linalg.norm(change)

    exact = figures()

    def in_bfloat16(a, b):
        return linalg.exact(*(jax.lax.reduce_precision(x, 8, 7) for x in (a, b)))

    for module in (linalg, carriers, dithered, row_blocks):
        monkeypatch.setattr(module, "rough", in_bfloat16)
    jax.clear_caches()
    rounded = figures()
    jax.clear_caches()
    assert rounded[0] == pytest.approx(exact[0], abs=0.01)
    assert rounded[1] == pytest.approx(exact[1], abs=0.01)
