"""`merge`: a base and its LoRA pairs as two trees, held to NumPy in float64 and to the models themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import daq_jax as daq
from tests.hf_folders import normal

BF16 = jnp.bfloat16


def close(found, expected) -> None:
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found), expected, rtol=3e-7, atol=1e-8)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inside = nnx.LoRALinear(24, 48, lora_rank=2, rngs=rngs)
        self.around = nnx.LoRA(48, 3, 24, base_module=nnx.Linear(48, 24, rngs=rngs), rngs=rngs)
        self.plain = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.around(self.inside(x)))


def trained() -> Net:
    net = Net(nnx.Rngs(0))
    net.inside.lora.lora_b[...] = 0.1 * normal(1, 2, 48)
    net.around.lora_b[...] = 0.1 * normal(2, 3, 24)
    return net


def test_the_model_with_merged_weights_computes_what_the_adapted_one_does():
    net = trained()
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    x = jnp.asarray(normal(3, 5, 24))
    base, tuned = daq.merge(params, params)
    before, after = (nnx.merge(graph, tree, rest)(x) for tree in (base, tuned))
    np.testing.assert_allclose(after, net(x), rtol=1e-4, atol=1e-5)
    net.inside.lora.lora_b[...] *= 0
    net.around.lora_b[...] *= 0
    np.testing.assert_array_equal(before, net(x))


def test_pairs_alone_of_nnx_on_the_plain_base():
    pairs = nnx.state(trained(), nnx.LoRAParam)
    kernel = jnp.asarray(normal(4, 24, 48), BF16)
    around = jnp.asarray(normal(5, 48, 24), BF16)
    base = {"inside": {"kernel": kernel}, "around": {"kernel": around}, "plain": {"bias": jnp.ones(3)}}
    wide, tuned = daq.merge(base, pairs)
    net = trained()
    for name, weight, lora in (("inside", kernel, net.inside.lora), ("around", around, net.around)):
        product = np.asarray(lora.lora_a[...], np.float64) @ np.asarray(lora.lora_b[...], np.float64)
        close(tuned[name]["kernel"], np.asarray(weight, np.float64) + product)
        np.testing.assert_array_equal(wide[name]["kernel"], weight.astype(jnp.float32))
    assert tuned["plain"]["bias"] is base["plain"]["bias"]


QWIX = {  # weight, first factor, second factor, einsum: as qwix makes them for the einsums of Tunix
    "q_proj": ((4, 24, 6), (24, 3), (3, 4, 6), "dr,rnh->ndh"),
    "o_proj": ((4, 6, 24), (4, 6, 3), (3, 24), "nhr,rd->nhd"),
    "kv": ((2, 5, 24, 6), (24, 3), (3, 2, 5, 6), "dr,rcnh->cndh"),
    "flat": ((24, 4, 6), (24, 3), (3, 24), None),
    "mlp": ((24, 40), (24, 3), (3, 40), "ir,ro->io"),
    "square": ((24, 24), (24, 3), (3, 24), "ir,ro->io"),
    "stack": ((3, 24, 40), (3, 24, 2), (3, 2, 40), "bir,bro->bio"),
}


@pytest.mark.parametrize("name", QWIX)
@pytest.mark.parametrize("jit", [False, True])
def test_pairs_of_qwix(name, jit):
    shape, *factors, einsum = QWIX[name]
    weight = normal(0, *shape)
    a, b = (0.1 * normal(i, *s) for i, s in enumerate(factors, 1))
    wide = (x.astype(np.float64) for x in (a, b))
    change = np.einsum(einsum, *wide) if einsum else (a.astype(np.float64) @ b).reshape(shape)
    base = {"layers": [{name: {"w": jnp.asarray(weight, BF16)}}]}
    pair = {"layers": [{name: {"w_lora_a": jnp.asarray(a), "w_lora_b": jnp.asarray(b)}}]}
    merge = (
        jax.jit(lambda x, y: daq.merge(x, y, scale=2.0)) if jit else lambda x, y: daq.merge(x, y, scale=2.0)
    )
    before, tuned = merge(base, pair)
    close(tuned["layers"][0][name]["w"], np.asarray(jnp.asarray(weight, BF16), np.float64) + 2 * change)
    assert before["layers"][0][name]["w"].dtype == jnp.float32


def test_names_of_peft():
    a, b = normal(1, 4, 24), normal(2, 40, 4)
    base = {
        "model.q_proj.weight": jnp.asarray(normal(0, 40, 24), BF16),
        "model.k_proj.weight": jnp.ones((2, 2)),
    }
    start = "base_model.model.model.q_proj"
    adapter = {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
    _, tuned = daq.merge(base, adapter, scale={"k_proj": 9.0, "q_proj": 0.5})
    expected = np.asarray(base["model.q_proj.weight"], np.float64) + 0.5 * (b.astype(np.float64) @ a)
    np.testing.assert_allclose(tuned["model.q_proj.weight"], expected, rtol=1e-5, atol=1e-6)


def test_what_merge_gives_is_quantized_and_a_quantized_base_keeps_its_scale():
    weight = jnp.asarray(0.02 * normal(0, 256, 128))
    stored = daq.quantize({"w": weight}, {"w": weight}, daq.recipes.absmax, rules=[])["w"]
    pair = {"w_lora_a": jnp.asarray(normal(1, 256, 2)), "w_lora_b": jnp.asarray(2e-4 * normal(2, 2, 128))}
    base, tuned = daq.merge({"w": stored}, pair, scale=1.0)
    assert base["w"].scale is stored.scale
    assert base["w"].dtype == np.float32
    change = np.asarray(pair["w_lora_a"], np.float64) @ np.asarray(pair["w_lora_b"], np.float64)
    expected = np.asarray(stored.dequantize(jnp.float32), np.float64) + change
    np.testing.assert_allclose(tuned["w"], expected, rtol=1e-6, atol=1e-9)
    q = daq.quantize(base, tuned, daq.recipes.absmax, rules=[])
    assert daq.compare(base, tuned, q).total.elements == weight.size


def test_sharded_weights_stay_sharded():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    base = {"w": jax.device_put(jnp.ones((8, 6), BF16), sharding)}
    pair = {"w_lora_a": jnp.ones((8, 2)), "w_lora_b": jnp.ones((2, 6))}
    _, tuned = daq.merge(base, pair, scale=1.0)
    assert tuned["w"].sharding == sharding


WRONG = {
    "no scale": ({"w_lora_a": (4, 2), "w_lora_b": (2, 6)}, {}, "pass scale=alpha / rank"),
    "half": ({"w_lora_a": (4, 2)}, {"scale": 1.0}, "has no partner 'w_lora_b'"),
    "no weight": ({"v_lora_a": (4, 2), "v_lora_b": (2, 6)}, {"scale": 1.0}, "belongs to no leaf of base"),
    "shape": ({"w_lora_a": (5, 2), "w_lora_b": (2, 6)}, {"scale": 1.0}, "in no way"),
    "rank": ({"w_lora_a": (4, 2), "w_lora_b": (3, 6)}, {"scale": 1.0}, "in no way"),
    "two ways": ({"s_lora_a": (3, 2), "s_lora_b": (2, 3, 4)}, {"scale": 1.0}, "say which axes are inputs"),
    "extra": ({"w_lora_a": (4, 2), "w_lora_b": (2, 6), "z": (3,)}, {"scale": 1.0}, "'z' is no LoRA pair"),
    "nothing": ({}, {}, "it holds no LoRA pair"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_named(kind):
    shapes, options, words = WRONG[kind]
    base = {"w": jnp.ones((4, 6)), "s": jnp.ones((3, 3, 4))}
    with pytest.raises(daq.DaqError, match=words):
        daq.merge(base, {n: jnp.ones(s) for n, s in shapes.items()}, **options)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), {"w": float("nan")}], ids=str)
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(daq.DaqError, match="needed finite real numbers, alpha / rank"):
        daq.merge(
            {"w": jnp.ones((4, 6))}, {"w_lora_a": jnp.ones((4, 2)), "w_lora_b": jnp.ones((2, 6))}, scale=scale
        )


def test_a_pattern_that_matches_no_weight_is_refused_with_the_names_there_are():
    params = nnx.state(trained(), nnx.Param)
    for options in ({"scale": {"typo": 2.0}}, {"inputs": {"inside": (0,), "typo": (0,)}}):
        with pytest.raises(daq.DaqError, match=r"'typo' is found in no path .*inside/kernel") as caught:
            daq.merge(params, params, **options)
        assert next(iter(options)) in str(caught.value)
    with pytest.raises(daq.DaqError, match=r"'.' is not a regular expression"):
        daq.merge(params, params, scale={"(": 2.0})


ONES = np.ones((4, 6), np.float32)
BAD_LEAVES = {
    "int32 base": ("w", ONES.astype(np.int32), "it is int32; needed bfloat16.* dequantize"),
    "float8 base": ("w", jnp.asarray(ONES, jnp.float8_e4m3fn), "it is float8_e4m3fn; .* dequantize"),
    "float64 base": ("w", ONES.astype(np.float64), "it is float64; .* cast it first"),
    "big-endian base": ("w", ONES.astype(">f4"), "it is >f4, .*newbyteorder"),
    "masked base": ("w", np.ma.masked_array(ONES, ONES > 0), "it is a masked array"),
    "shape": ("w", jax.ShapeDtypeStruct((4, 6), np.float32), "it is a shape without numbers"),
    "integer factor": ("w_lora_a", np.ones((4, 2), np.int32), "'w_lora_a' is int32; needed floats"),
    "NaN factor": ("w_lora_b", np.full((2, 6), np.nan, np.float32), "'w_lora_b' holds NaN or infinity"),
    "big-endian factor": ("w_lora_b", np.ones((2, 6), ">f4"), "'w_lora_b' is >f4"),
}


@pytest.mark.parametrize("kind", BAD_LEAVES)
def test_leaves_that_are_no_finite_floats_are_refused_by_name(kind):
    name, leaf, words = BAD_LEAVES[kind]
    leaves = {"w": ONES, "w_lora_a": np.ones((4, 2), np.float32), "w_lora_b": np.ones((2, 6), np.float32)}
    leaves |= {name: leaf}
    with pytest.raises(daq.DaqError, match=f"'w': {words}"):
        daq.merge({"w": leaves.pop("w"), "kept": np.ones(3, np.int32)}, leaves, scale=1.0)


def test_axes_settle_what_shapes_leave_open():
    base = {"s": jnp.zeros((3, 3, 4))}
    a, b = normal(0, 3, 2), normal(1, 2, 3, 4)
    pair = {"s_lora_a": jnp.asarray(a), "s_lora_b": jnp.asarray(b)}
    _, tuned = daq.merge(base, pair, scale=1.0, inputs={"s": (1,)})
    np.testing.assert_allclose(tuned["s"], np.einsum("dr,rnh->ndh", a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["eager", "closed over", "traced"])
@pytest.mark.parametrize("form", ["array", "bfloat16", "numpy", "by pattern"])
def test_a_scale_may_be_an_array(how, form):
    weight, a, b = normal(0, 24, 40), normal(1, 24, 3), normal(2, 3, 40)
    base = {"w": jnp.asarray(weight)}
    pair = {"w_lora_a": jnp.asarray(a), "w_lora_b": jnp.asarray(b)}
    kind = {"bfloat16": BF16, "numpy": np.float32}.get(form, jnp.float32)
    scale = np.asarray(0.75, kind) if form == "numpy" else jnp.asarray(0.75, kind)

    def run(scale):
        return daq.merge(base, pair, scale={"w": scale} if form == "by pattern" else scale)[1]["w"]

    tuned = {"eager": run, "closed over": jax.jit(lambda _: run(scale)), "traced": jax.jit(run)}[how](scale)
    product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(tuned, weight + 0.75 * product, rtol=1e-5, atol=1e-6)
    if how == "eager":
        np.testing.assert_array_equal(tuned, daq.merge(base, pair, scale=0.75)[1]["w"])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("scale", [(3,), (3, 2)], ids=str)
def test_each_layer_of_a_stack_may_have_a_scale_of_its_own(scale, jit):
    """Layers, and experts within layers; as one array for all experts of a layer too."""
    weight, a, b = normal(0, 3, 2, 8, 10), normal(1, 3, 2, 8, 4), normal(2, 3, 2, 4, 10)
    factors = np.abs(normal(3, *scale))
    base, pair = {"w": jnp.asarray(weight)}, {"w_lora_a": jnp.asarray(a), "w_lora_b": jnp.asarray(b)}
    merge = (
        jax.jit(lambda x: daq.merge(base, pair, scale=x)) if jit else lambda x: daq.merge(base, pair, scale=x)
    )
    tuned = merge(jnp.asarray(factors))[1]["w"]
    for i in range(3):
        for e in range(2):
            product = a[i, e].astype(np.float64) @ b[i, e].astype(np.float64)
            factor = np.float64(factors[i] if len(scale) == 1 else factors[i, e])
            np.testing.assert_allclose(tuned[i, e], weight[i, e] + factor * product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("w", (1,), r"'w': its scale is an array \(1,\); needed one number"),
        ("w", (4,), r"'w': its scale is an array \(4,\); needed one number"),
        ("s", (2,), r"'s': its scale is an array \(2,\); needed one number, or one for each .*\(3,\)"),
        ("s", (3, 8), r"'s': its scale is an array \(3, 8\)"),
        ("s", (3, 1), r"'s': its scale is an array \(3, 1\)"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_scale_of_a_wrong_shape_is_refused_by_the_name_of_its_weight(name, shape, words, jit):
    base = {"w": jnp.ones((4, 6)), "s": jnp.ones((3, 8, 6))}
    pair = {"w_lora_a": jnp.ones((4, 2)), "w_lora_b": jnp.ones((2, 6))}
    pair |= {"s_lora_a": jnp.ones((3, 8, 2)), "s_lora_b": jnp.ones((3, 2, 6))}
    scale = {"w": 1.0, "s": 1.0} | {name: jnp.ones(shape)}
    merge = (
        jax.jit(lambda x: daq.merge(base, pair, scale=x)) if jit else lambda x: daq.merge(base, pair, scale=x)
    )
    with pytest.raises(daq.DaqError, match=words):
        merge(scale)


def test_a_traced_scale_on_sharded_weights():
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
        base = {"w": jax.device_put(jnp.ones((8, 6)), sharding)}
        pair = {"w_lora_a": jnp.ones((8, 2)), "w_lora_b": jnp.ones((2, 6))}
        pair = {n: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P())) for n, x in pair.items()}
        scale = jax.device_put(jnp.float32(2.0), jax.sharding.NamedSharding(mesh, jax.P()))
        for merge in (daq.merge, jax.jit(daq.merge)):
            tuned = merge(base, pair, scale=scale)[1]["w"]
            np.testing.assert_array_equal(tuned, np.full((8, 6), 5.0))
