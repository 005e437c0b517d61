"""Products with quantized weights, against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import daq_jax as daq

# Shape of x, shape of the weight, its matrix, and the product in words of einsum.
PRODUCTS = {
    "matrix": ((2, 5, 24), (24, 16), ((-2,), (-1,)), "bti,io->bto"),
    "stored [out, in]": ((5, 24), (16, 24), ((1,), (0,)), "ti,oi->to"),
    "vector": ((24,), (24, 16), ((-2,), (-1,)), "i,io->o"),
    "into heads": ((5, 24), (24, 4, 6), ((-3,), (-2, -1)), "ti,inh->tnh"),
    "out of heads": ((5, 4, 6), (4, 6, 24), ((-3, -2), (-1,)), "tnh,nho->to"),
    "experts": ((3, 5, 24), (3, 24, 16), ((-2,), (-1,)), "eti,eio->eto"),
}
RECIPES = {
    "block": daq.Recipe(tiling=daq.Block(8, 8)),
    "channel": daq.Recipe(tiling=daq.Channel()),
    "int8 tensor": daq.Recipe(format=daq.int8, tiling=daq.PerTensor()),
    "wide block": daq.Recipe(tiling=daq.Block(64, 5)),
    "nf4 channel": daq.Recipe(format=daq.nf4, tiling=daq.Channel()),
}


def operands(name, recipe, dtype=np.float32):
    x_shape, shape, matrix, words = PRODUCTS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x_shape), dtype)
    w = jnp.asarray(rng.normal(size=shape), dtype)
    return x, daq.quantize(w, w, RECIPES[recipe], rules=[daq.use("", matrix=matrix)]), words


@pytest.mark.parametrize(
    "name", ["into heads", *(pytest.param(n, marks=pytest.mark.slow) for n in PRODUCTS if n != "into heads")]
)
def test_a_product_is_that_of_the_dequantized_weight(name):
    for recipe in RECIPES if name == "matrix" else ("channel", "block"):
        x, q, words = operands(name, recipe)
        wanted = np.einsum(words, np.asarray(x, np.float64), np.asarray(q.dequantize(), np.float64))
        np.testing.assert_allclose(jax.jit(daq.dot)(x, q), wanted, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_product_on_codes_is_rounded_once():
    x, q, words = operands("matrix", "channel", ml_dtypes.bfloat16)
    got = jax.jit(daq.dot)(x, q)
    weight = np.asarray(q.dequantize(jnp.float32), np.float64)  # not rounded to bfloat16 first
    wanted = np.einsum(words, np.asarray(x, np.float64), weight)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-8, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matrix", "out of heads", "experts"])
def test_activations_are_rounded_row_by_row(name):
    x, q, words = operands(name, "channel")
    got = jax.jit(lambda x, q: daq.dot(x, q, activations=daq.fp8_e4m3fn))(x, q)
    rows = np.asarray(x).reshape(-1, 24)
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(448)
    rounded = ((rows / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(x.shape)
    wanted = np.einsum(words, rounded, np.asarray(q.dequantize(), np.float64))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    x, q, _ = operands("matrix", "block")
    with pytest.raises(ValueError, match=r"x is \(2, 5, 23\); for this weight it must be \('...', 24\)"):
        daq.dot(x[..., :-1], q)
    with pytest.raises(ValueError, match="needs a weight in Channel"):
        daq.dot(x, q, activations=daq.fp8_e4m3fn)
