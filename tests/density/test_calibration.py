"""Calibration: the Gram matrices of Linen, NNX and other models against NumPy, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import daq_jax as daq
from tests.cases import rng_for, slow_after


def inputs(name, *shape):
    return rng_for(name).normal(0.3, 1, shape).astype(np.float32)


def gram(*vectors):
    """Mean of x x' over all vectors, float64; vectors are `[..., R]`."""
    x = np.concatenate([np.float64(v).reshape(-1, v.shape[-1]) for v in vectors])
    return x.T @ x / len(x)


def blocks(whole, n):
    """Its diagonal blocks, the last one filled up with zeros."""
    count = -(-len(whole) // n)
    padded = np.pad(whole, [(0, count * n - len(whole))] * 2)
    return np.stack([padded[i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(count)])


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(10, name="up")(x))
        return nn.Dense(4, name="lm_head")(nn.remat(nn.Dense)(6, name="down")(x))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(12, 10, rngs=rngs), nnx.Linear(10, 6, rngs=rngs)])
        self.norm = nnx.BatchNorm(10, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.norm(jax.nn.relu(self.layers[0](x))))


def test_linen_kernels_get_the_gram_matrices_of_their_inputs():
    batches = [inputs(name, 2, 5, 12) for name in "ab"]
    params = Mlp().init(jax.random.key(0), batches[0])["params"]
    grams = daq.calibrate(Mlp(), params, batches, 5)
    hidden = [np.maximum(x @ params["up"]["kernel"] + params["up"]["bias"], 0) for x in batches]
    assert set(grams.products) == {"up/kernel", "down/kernel"}  # a head is kept: nobody asks
    np.testing.assert_allclose(grams.products["up/kernel"], blocks(gram(*batches), 5), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grams.products["down/kernel"], blocks(gram(*hidden), 5), rtol=1e-5, atol=1e-6)
    whole = daq.calibrate(Mlp(), {"params": params}, iter(batches), joint=True)
    np.testing.assert_allclose(whole.products["params/up/kernel"], gram(*batches), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_nnx_kernels_get_the_gram_matrices_of_their_inputs():
    batches = [inputs("nnx", 7, 12)]
    model = NnxMlp(nnx.Rngs(0))
    model.eval()
    params = nnx.state(model, nnx.Param)
    grams = daq.calibrate(model, params, batches, None)
    hidden = model.norm(jax.nn.relu(model.layers[0](batches[0])))
    np.testing.assert_allclose(grams.products["layers/0/kernel"][0], gram(batches[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grams.products["layers/1/kernel"][0], gram(hidden), rtol=1e-5, atol=1e-6)
    q = daq.quantize_density(params, grams, daq.DensityRecipe(group=None, adjust=None, sweeps=0))
    assert isinstance(daq.dequantize(q), nnx.State)


@pytest.mark.parametrize("model", slow_after(1, ["nnx", "linen"]))
def test_attention_kernels_contract_what_their_matrix_view_says(model):
    x = inputs("attention", 2, 3, 12)
    if model == "linen":
        module = nn.MultiHeadDotProductAttention(num_heads=2)
        params = module.init(jax.random.key(0), x)["params"]
    else:
        module = nnx.MultiHeadAttention(num_heads=2, in_features=12, decode=False, rngs=nnx.Rngs(0))
        params = nnx.state(module, nnx.Param)
    grams = daq.calibrate(module, params, [x], 8)
    assert {k.path: (k.axes, k.size) for k in grams.inputs} == {
        "query/kernel": ((0,), 12),
        "key/kernel": ((0,), 12),
        "value/kernel": ((0,), 12),
        "out/kernel": ((0, 1), 12),
    }
    q = daq.quantize_density(params, grams, daq.DensityRecipe(group=8, adjust=None, sweeps=0))
    assert (
        len(
            [
                x
                for x in jax.tree.leaves(q, is_leaf=lambda x: isinstance(x, daq.QTensor))
                if hasattr(x, "zero")
            ]
        )
        == 4
    )


def test_any_function_will_do_however_it_uses_a_kernel():
    x = inputs("function", 9, 12)
    params = {"hf": inputs("hf", 5, 12), "twice": inputs("twice", 5, 5), "heads": inputs("heads", 5, 2, 3)}
    params |= {"out": inputs("out", 2, 3, 4), "unused": inputs("unused", 4, 4), "mean": inputs("mean", 12)}

    @jax.jit
    def apply(params, x):
        y = (x - params["mean"]).astype(jnp.bfloat16) @ params["hf"].T.astype(jnp.bfloat16)
        y = jnp.tanh(y.astype(jnp.float32))
        z = y @ params["twice"]
        heads = jnp.einsum("td,dhk->thk", z @ params["twice"], params["heads"])
        return jnp.einsum("thk,hkd->td", heads, params["out"])

    grams = daq.calibrate_from(apply, params, [{"x": x}["x"]], 12)
    assert {k.path: k.axes for k in grams.inputs} == {"hf": (1,), "twice": (0,), "heads": (0,), "out": (0, 1)}
    low = np.asarray((x - params["mean"]).astype(jnp.bfloat16))
    y = np.tanh(np.float32(low) @ np.float32(params["hf"].T.astype(jnp.bfloat16)))
    z = y @ params["twice"]
    heads = np.einsum("td,dhk->thk", z @ params["twice"], params["heads"])
    for path, wanted, rtol in (
        ("hf", gram(low), 1e-5),
        ("twice", gram(y, z), 0.05),
        ("out", gram(heads.reshape(-1, 6)), 0.05),
    ):
        size = np.abs(wanted).max()
        np.testing.assert_allclose(grams.products[path][0] / size, wanted / size, atol=rtol)
    for rules in ([], [daq.use("unused")]):  # asked for by name, it cannot be kept
        with pytest.raises(
            ValueError, match=r"'hf': the model contracts its axes \(1,\).*use\(pattern"
        ) as told:
            daq.quantize_density(params, grams, daq.DensityRecipe(group=12), rules=[daq.keep("mean"), *rules])
        assert ("'unused': there is no Gram" in str(told.value)) == bool(rules)


def test_one_at_a_time_makes_the_same_matrices_when_asked():
    batches = [inputs(name, 5, 12) for name in "cd"]
    params = Mlp().init(jax.random.key(0), batches[0])["params"]
    whole = daq.calibrate(Mlp(), params, batches, 4)
    lazy = daq.calibrate(Mlp(), params, batches, 4, one_at_a_time=True)
    assert lazy.inputs == whole.inputs
    assert set(lazy.products) == set(whole.products)
    for path, product in whole.products.items():
        np.testing.assert_allclose(lazy.products[path], product, rtol=1e-6)
    with pytest.raises(ValueError, match="pass a list"):
        daq.calibrate(Mlp(), params, iter(batches), one_at_a_time=True)
    with pytest.raises(ValueError, match="no batches"):
        daq.calibrate(Mlp(), params, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_and_params_give_the_same(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    x, weight = inputs("sharded", 8, 4, 12), inputs("sharded weight", 12, 6)

    def place(x, *names):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    def calibrated(weight, x):
        return daq.calibrate_from(lambda params, x: x @ params["w"], {"w": weight}, [x], 4)

    recipe = daq.DensityRecipe(group=4, adjust=None, sweeps=1)
    spread = place(weight, None, "model")
    grams = calibrated(spread, place(x, "data"))
    np.testing.assert_allclose(grams.products["w"], blocks(gram(x), 4), rtol=1e-5, atol=1e-6)
    q = daq.quantize_density({"w": spread}, grams, recipe)["w"]
    alone = daq.quantize_density({"w": weight}, calibrated(weight, x), recipe)["w"]
    assert q.codes.sharding.spec == PartitionSpec(None, "model")
    assert np.mean(np.asarray(q.codes) == np.asarray(alone.codes)) > 0.9  # sums differ in their last digits
