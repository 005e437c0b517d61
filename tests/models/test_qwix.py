"""qwix holds the same codes and scales, and computes with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import daq_jax as daq
from daq_jax.tilings import TileView
from tests.cases import BF16, assert_same_bits, rng_for

qwix = pytest.importorskip("qwix")
pytestmark = pytest.mark.peers

FORMATS = (daq.fp8_e4m3fn, daq.fp8_e5m2, daq.int8, daq.int4, daq.nf4)
TILINGS = (daq.Block(16, 8), daq.Channel(), daq.Group(16), daq.PerTensor())
# Shape, matrix, and a rule's pattern that gives that matrix.
VIEWS = {
    "plain": ((32, 48), ((-2,), (-1,))),
    "stored [out, in]": ((48, 32), ((1,), (0,))),
    "experts": ((3, 32, 48), ((-2,), (-1,))),
    "query": ((32, 4, 8), ((-3,), (-2, -1))),
    "out": ((4, 8, 48), ((-3, -2), (-1,))),
    "scanned query": ((32, 3, 4, 8), ((0,), (2, 3))),
}


def weight(shape, matrix, number, tiling):
    """A float32 QTensor of random codes and scales."""
    rng = rng_for(f"{shape} {number.name} {tiling}")
    codes = number.encode(number.round(jnp.asarray(rng.uniform(-1, 1, shape) * number.largest, jnp.float32)))
    scale = jnp.asarray(rng.uniform(0.1, 1, TileView(shape, matrix, tiling).grid), jnp.float32)
    return daq.QTensor(codes, scale, number, tiling, np.dtype(np.float32), matrix)


def with_zero(q, zero):
    return dataclasses.replace(q, zero=jnp.full_like(q.scale, zero))


@pytest.mark.parametrize("name", VIEWS)
def test_qwix_gives_the_same_values_and_the_way_back_the_same_bits(name):
    shape, matrix = VIEWS[name]
    for number in FORMATS if name == "plain" else (daq.fp8_e4m3fn,):
        for tiling in TILINGS:
            q = {"layers": [weight(shape, matrix, number, tiling)], "bias": jnp.ones(3)}
            there = daq.to_qwix(q)
            assert isinstance(there["layers"][0], qwix.QArray)
            assert there["layers"][0].scale.dtype == jnp.float32
            with jax.numpy_dtype_promotion("standard"):
                got = qwix.dequantize(there["layers"][0])
            np.testing.assert_array_equal(got, daq.dequantize(q)["layers"][0], strict=True)
            assert_same_bits(daq.from_qwix(there, rules=[daq.use("layers", matrix=matrix)]), q)


def test_a_matrix_product_of_qwix_takes_the_weight():
    x = jax.random.normal(jax.random.key(0), (4, 32))
    for tiling in TILINGS:
        q = weight((32, 48), ((-2,), (-1,)), daq.fp8_e4m3fn, tiling)
        with jax.numpy_dtype_promotion("standard"):
            got = qwix.dot_general(x, daq.to_qwix(q), (((1,), (0,)), ((), ())))
        wanted = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_an_array_that_qwix_quantized_becomes_a_qtensor():
    w = jax.random.normal(jax.random.key(1), (32, 48))
    for array, tiling in (
        (qwix.quantize(w, jnp.int8, channelwise_axes=[1]), daq.Channel()),
        (qwix.quantize(w, jnp.float8_e4m3fn, channelwise_axes=[1], tiled_axes={0: 16}), daq.Group(16)),
    ):
        q = daq.from_qwix({"w": array}, dtype=jnp.bfloat16)["w"]
        assert (q.tiling, q.dtype) == (tiling, BF16)
        np.testing.assert_array_equal(q.dequantize(jnp.float32), qwix.dequantize(array))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("tiled", [{}, {0: 16}], ids=["channel", "group"])
def test_zero_points_of_qwix_stay_what_they_are_there_and_back(dtype, tiled):
    w = jax.random.uniform(jax.random.key(2), (32, 48), minval=-0.2, maxval=1)
    with jax.numpy_dtype_promotion("standard"):
        array = qwix.quantize(w, dtype, channelwise_axes=[1], tiled_axes=tiled, calibration_method="minmax")
        wanted = qwix.dequantize(array)
    assert np.asarray(array.zero_point, np.int32).any()
    q = daq.from_qwix({"w": array})
    assert q["w"].tiling == (daq.Group(16) if tiled else daq.Channel())
    np.testing.assert_array_equal(q["w"].dequantize(), wanted)
    assert_same_bits(daq.to_qwix(q)["w"], array)


@pytest.mark.parametrize("name", ["plain", "stored [out, in]", "scanned query"])
def test_whole_zeros_become_zero_points_in_any_layout(name):
    shape, matrix = VIEWS[name]
    for tiling in (daq.Block(16, 8), daq.Group(16)):
        q = with_zero(weight(shape, matrix, daq.int8, tiling), rng_for(name).integers(-128, 128))
        there = daq.to_qwix({"w": q})
        assert there["w"].zero_point.dtype == jnp.int8
        with jax.numpy_dtype_promotion("standard"):
            np.testing.assert_array_equal(qwix.dequantize(there["w"]), q.dequantize(), strict=True)
        assert_same_bits(daq.from_qwix(there, rules=[daq.use("w", matrix=matrix)]), {"w": q})


def test_a_zero_point_that_scales_share_is_given_to_each():
    codes = jnp.asarray(rng_for("shared zero").integers(-128, 128, (32, 48)), jnp.int8)
    array = qwix.QArray(codes, jnp.full((2, 48), 0.5), jnp.full((1, 48), 3, jnp.int8))
    q = daq.from_qwix(array)
    assert q.zero.shape == q.scale.shape == (2, 48)
    np.testing.assert_array_equal(q.dequantize(), (np.asarray(codes, np.float32) - 3) / 2)


def test_a_zero_between_codes_is_refused_and_one_of_another_tiling_too():
    plain = weight((32, 48), ((-2,), (-1,)), daq.int8, daq.Channel())
    for zero in (0.5, 200.0):
        with pytest.raises(ValueError, match="'w': its zero is no int8, which qwix needs"):
            daq.to_qwix({"w": with_zero(plain, zero)})
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda q: daq.to_qwix(q).scale)(with_zero(plain, 1.0))
    fine = qwix.QArray(plain.codes, jnp.ones((1, 48)), jnp.ones((2, 48), jnp.int8))
    with pytest.raises(ValueError, match=r"its zero points \(2, 48\) are not one for each scale"):
        daq.from_qwix({"w": fine})


def test_variables_of_a_model_keep_their_boxes():
    q = nnx.State({"kernel": nnx.Param(weight((32, 48), ((-2,), (-1,)), daq.int8, daq.Channel()))})
    there = daq.to_qwix(q)
    assert isinstance(there["kernel"], nnx.Param)
    assert isinstance(there["kernel"].get_raw_value(), qwix.QArray)
    assert_same_bits(daq.from_qwix(there), q)


def test_what_has_no_such_form_is_named():
    heads = ((-3,), (-2, -1))
    tree = {
        "partial": weight((33, 48), ((-2,), (-1,)), daq.int8, daq.Block(16, 16)),
        "across": weight((32, 4, 10), heads, daq.int8, daq.Block(16, 8)),
        "levels": weight((32, 48), ((-2,), (-1,)), daq.fp4_bnb, daq.Channel()),
        "fine": weight((32, 48), ((-2,), (-1,)), daq.int8, daq.Channel()),
    }
    with pytest.raises(ValueError, match="3 of the leaves") as caught:
        daq.to_qwix(tree)
    for name, why in {"partial": "whole tiles of 16", "across": "cut across", "levels": "no fp4_bnb"}.items():
        assert f"{name!r}: " in str(caught.value)
        assert why in str(caught.value)
    codes = jnp.ones((4, 32, 48), jnp.int8)
    bad = {
        "shared": qwix.QArray(codes, jnp.ones((2, 1, 48))),
        "type": qwix.QArray(jnp.ones((4, 4), jnp.int2), jnp.ones((1, 1))),
    }
    with pytest.raises(ValueError, match="2 of the leaves") as caught:
        daq.from_qwix(bad)
    for why in ("'shared': part of its axis 0", "'type': daq_jax has no int2"):
        assert why in str(caught.value)
