"""One leaf: exact codes and scales, what a QTensor is, and every kind of input that stands for a weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import oracles
from tests.cases import (
    BF16,
    DTYPES,
    FORMATS,
    LAYERS,
    TILINGS,
    Stored,
    assert_same_bits,
    hard_matrix,
    native,
    pair,
    slow_after,
)

ABSMAX = daq.Recipe(search=daq.AbsMax())
SMALL = daq.Recipe(tiling=daq.Block(16, 16), search=daq.CoarseToFine(0.8, 1.5, 5, 10))
E4M3 = oracles.FORMATS["fp8_e4m3fn"]


@pytest.mark.parametrize(("fmt", "number"), FORMATS, ids=lambda f: getattr(f, "name", None))
@pytest.mark.parametrize("dtype", DTYPES)
def test_absmax_codes_and_scales_are_exact(dtype, fmt, number):
    base, tuned = pair(f"exact {dtype}", (130, 70), DTYPES[dtype])
    q = daq.quantize(base, tuned, daq.Recipe(format=fmt, tiling=daq.Block(32, 32), search=daq.AbsMax()))
    scale = oracles.absmax_scales(tuned, number, (32, 32))
    np.testing.assert_array_equal(q.scale, scale)
    wanted = number.round(tuned.astype(np.float32) / oracles.spread(scale, tuned.shape, (32, 32)))
    np.testing.assert_array_equal(number.decode(np.asarray(q.codes)), wanted)
    assert q.codes.dtype == fmt.dtype
    assert q.dtype == DTYPES[dtype]


@pytest.mark.parametrize(("fmt", "number"), FORMATS, ids=lambda f: getattr(f, "name", None))
def test_absmax_is_exact_on_hard_tiles(fmt, number):
    base, tuned, _ = hard_matrix()
    q = daq.quantize(base, tuned, daq.Recipe(format=fmt, tiling=daq.Block(16, 16), search=daq.AbsMax()))
    scale = oracles.absmax_scales(tuned, number, (16, 16))
    np.testing.assert_array_equal(q.scale, scale)
    wanted = number.round(tuned / oracles.spread(scale, tuned.shape, (16, 16)))
    np.testing.assert_array_equal(number.decode(np.asarray(q.codes)), wanted)


def test_codes_are_exact_for_the_searched_scale():
    base, tuned = native("searched", (50, 70))
    q = daq.quantize(base, tuned, SMALL)
    wanted = E4M3.round(tuned / oracles.spread(np.asarray(q.scale), tuned.shape, (16, 16)))
    np.testing.assert_array_equal(E4M3.decode(np.asarray(q.codes)), wanted)


@pytest.mark.parametrize(("tiling", "tile"), TILINGS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("layer", ["linen DenseGeneral query", "maxtext scanned query", "odd"])
def test_dequantize_is_code_times_scale_and_one_cast(layer, tiling, tile):
    shape, matrix = LAYERS[layer]
    base, tuned = pair(layer, shape)
    recipe = daq.Recipe(tiling=tiling, search=daq.AbsMax())
    q = daq.quantize(base, tuned, recipe, rules=[daq.use("", matrix=matrix)])
    stored = Stored.of(q)
    wanted = oracles.dequantized(stored.codes, stored.scale, E4M3, tile, matrix)
    for dtype, cast in ((None, BF16), (jnp.float32, np.float32), (jnp.bfloat16, BF16)):
        for weight in (q.dequantize(dtype), daq.dequantize(q, dtype=dtype)):
            assert weight.shape == shape
            assert weight.dtype == cast
            np.testing.assert_array_equal(
                oracles.matrix_view(np.asarray(weight), matrix), wanted.astype(cast)
            )


def test_a_qtensor_is_a_pytree_that_stands_for_an_array():
    base, tuned = pair("stands for", (40, 24))
    q = daq.quantize(base, tuned, ABSMAX)
    assert isinstance(q, daq.QTensor)
    assert (q.shape, q.ndim, q.size) == ((40, 24), 2, 960)
    assert q.nbytes == 960 + 4
    assert (q.format, q.tiling) == (daq.fp8_e4m3fn, daq.Block(128, 128))
    assert q.matrix == ((-2,), (-1,))
    assert {x.dtype for x in jax.tree.leaves(q)} == {np.dtype(daq.fp8_e4m3fn.dtype), np.dtype(np.float32)}
    assert_same_bits(jax.jit(lambda q: q)(q), q)
    np.testing.assert_array_equal(jnp.asarray(q), q.dequantize())
    x = jnp.ones((3, 40), jnp.bfloat16)
    np.testing.assert_array_equal(jnp.dot(x, q), jnp.dot(x, q.dequantize()))
    np.testing.assert_array_equal(jax.jit(jnp.dot)(x, q), jax.jit(jnp.dot)(x, q.dequantize()))


def test_dequantize_leaves_other_leaves_alone_and_casts_floats_when_told():
    base, tuned = pair("mixed", (16, 16))
    tree = {"w": tuned, "scale": np.ones(4, np.float32), "steps": np.arange(3), "none": None}
    q = daq.quantize({**tree, "w": base}, tree, ABSMAX, rules=[])
    params = daq.dequantize(q)
    assert params["w"].dtype == BF16
    assert params["none"] is None
    np.testing.assert_array_equal(params["scale"], tree["scale"])
    np.testing.assert_array_equal(params["steps"], tree["steps"])
    assert daq.dequantize(q, dtype=jnp.float32)["w"].dtype == jnp.float32


# --- Inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", slow_after(1, DTYPES))
def test_numpy_leaves_are_as_good_as_jax_leaves(dtype):
    base, tuned = pair("numpy", (33, 40), DTYPES[dtype])
    assert_same_bits(
        daq.quantize({"w": base}, {"w": tuned}, SMALL),
        daq.quantize({"w": jnp.asarray(base)}, {"w": jnp.asarray(tuned)}, SMALL),
    )


@pytest.mark.parametrize("recipe", slow_after(1, [ABSMAX, SMALL]), ids=["absmax", "search"])
def test_a_qtensor_in_the_base_stands_for_its_weight(recipe):
    base, tuned = pair("q base", (40, 48))
    qbase = daq.quantize(base, base, daq.Recipe(tiling=daq.Block(16, 16), search=daq.AbsMax()))
    assert_same_bits(
        daq.quantize({"w": qbase}, {"w": tuned}, recipe),
        daq.quantize({"w": qbase.dequantize()}, {"w": tuned}, recipe),
    )


def test_a_qtensor_in_tuned_stands_for_its_weight():
    base, tuned = pair("q tuned", (40, 48))
    stored = daq.quantize(base, tuned, daq.Recipe(format=daq.int8, tiling=daq.Channel()))
    q = daq.quantize({"w": base}, {"w": stored}, SMALL)
    assert_same_bits(q, daq.quantize({"w": base}, {"w": stored.dequantize()}, SMALL))
    assert q["w"].dtype == BF16
    assert q["w"].format == daq.fp8_e4m3fn


def test_d_is_taken_in_float32():
    """A bfloat16 difference would round every change to the base's own spacing of the difference."""
    base = np.full((16, 16), 1.0, np.float32)
    tuned = (base + np.float32(2.0**-20)).astype(np.float32)
    q = daq.quantize(base, tuned, ABSMAX)
    table = daq.compare(base, tuned, q)
    assert float(table.total.unchanged) == 0.0
    assert int(table.total.elements) == 256


def test_donate_deletes_the_quantized_inputs_alone():
    pairs = {name: pair(name, (32, 16)) for name in "wb"}
    base, tuned = ({name: jnp.asarray(both[i]) for name, both in pairs.items()} for i in (0, 1))
    plain = daq.quantize(base, tuned, ABSMAX, rules=[daq.keep("b")])
    assert not any(x.is_deleted() for x in jax.tree.leaves((base, tuned)))
    q = daq.quantize(base, tuned, ABSMAX, rules=[daq.keep("b")], donate=True)
    assert base["w"].is_deleted()
    assert tuned["w"].is_deleted()
    np.testing.assert_array_equal(q["b"], pairs["b"][1])  # the kept leaf is still there
    assert_same_bits(q["w"], plain["w"])


def test_donating_one_array_twice_is_harmless():
    array = jnp.asarray(pair("twice", (16, 16))[0])
    q = daq.quantize({"a": array, "b": array}, {"a": array, "b": array}, ABSMAX, donate=True)
    assert array.is_deleted()
    assert_same_bits(q["a"], q["b"])


def test_nan_in_a_trace_gives_a_nan_scale_and_harms_no_other_tile():
    base, tuned = pair("nan", (32, 32), DTYPES["f32"])
    bad = tuned.copy()
    bad[3, 4], bad[20, 30] = np.nan, np.inf
    recipe = daq.Recipe(tiling=daq.Block(16, 16), search=daq.Grid(0.8, 1.5, 3))
    q = jax.jit(lambda b, t: daq.quantize(b, t, recipe))(base, bad)
    clean = daq.quantize(base, tuned, recipe)
    assert np.isnan(q.scale[0, 0])
    assert np.isnan(q.scale[1, 1])
    np.testing.assert_allclose(
        [q.scale[0, 1], q.scale[1, 0]], [clean.scale[0, 1], clean.scale[1, 0]], rtol=1e-6
    )
    unchecked = daq.quantize(base, bad, recipe, check_finite=False)
    np.testing.assert_array_equal(np.isnan(unchecked.scale), np.isnan(q.scale))


@pytest.mark.parametrize("recipe", [ABSMAX, SMALL], ids=["absmax", "search"])
@pytest.mark.parametrize(("before", "after"), [(BF16, np.float32), (np.float32, BF16), (np.float16, BF16)])
def test_a_pair_may_mix_dtypes(before, after, recipe):
    base, tuned = (
        x.astype(t) for x, t in zip(pair("mix", (40, 48), np.float32), (before, after), strict=True)
    )
    q = daq.quantize(base, tuned, recipe)
    assert q.dtype == q.dequantize().dtype == after
    same = daq.quantize(base.astype(np.float32), tuned.astype(np.float32), recipe)
    assert_same_bits(q.codes, same.codes)
    assert_same_bits(q.scale, same.scale)
    before64, after64, kept = (np.asarray(x, np.float64) for x in (base, tuned, q.dequantize(jnp.float32)))
    d, k = after64 - before64, kept - before64
    projection = daq.compare(base, tuned, same).total.to_dict()["projection"]
    np.testing.assert_allclose(projection, (d * k).sum() / (d * d).sum(), rtol=1e-4)


def test_a_qtensor_is_an_array_for_numpy_and_equal_to_itself_alone():
    weight = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    q, same = (daq.quantize(weight, weight, daq.recipes.absmax) for _ in range(2))
    assert np.asarray(q).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(q), np.asarray(q.dequantize()))
    np.testing.assert_array_equal(np.asarray(q, np.float32), np.asarray(q.dequantize(), np.float32))
    assert q == dataclasses.replace(q)
    assert q != same
    assert q != dataclasses.replace(q, dtype=np.dtype(np.float32))
    assert q != weight
    assert len({q, dataclasses.replace(q), same}) == 2
    assert jax.eval_shape(lambda: q) == jax.eval_shape(lambda: same)
    assert jax.eval_shape(lambda: q) != q


def test_a_qtensor_says_what_it_is_in_a_line():
    weight = jnp.ones((256, 384), jnp.bfloat16)
    q = daq.quantize(weight, weight, daq.recipes.absmax)
    words = (
        "QTensor(codes=float8_e4m3fn[256, 384], scale=float32[2, 3], format=fp8_e4m3fn, "
        "tiling=Block(r=128, c=128), dtype=bfloat16)"
    )
    assert repr(q) == words
    assert repr(jax.eval_shape(lambda: q)) == words
    turned = dataclasses.replace(q, matrix=((1,), (0,)), zero=jnp.zeros((2, 3)))
    assert "scale=float32[2, 3], zero=float32[2, 3], format=" in repr(turned)
    assert repr(turned).endswith("dtype=bfloat16, matrix=((1,), (0,)))")
    assert repr(jax.tree.map(lambda _: "here", q)).startswith("QTensor(codes='here', scale='here', format=")
