"""Which elements share a scale, for every tiling and matrix view, sizes that do not divide included."""

import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import oracles
from tests.cases import LAYERS, TILINGS, Stored, pair

NUMBER = oracles.FORMATS["fp8_e4m3fn"]


def quantized(base, tuned, tiling, matrix=None):
    recipe = daq.Recipe(tiling=tiling, search=daq.AbsMax())
    return daq.quantize(base, tuned, recipe, rules=[daq.use("", matrix=matrix)])


@pytest.mark.parametrize(("tiling", "tile"), TILINGS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("layer", LAYERS)
def test_each_tile_has_its_own_absmax_scale(layer, tiling, tile):
    shape, matrix = LAYERS[layer]
    base, tuned = pair(layer, shape)
    q = quantized(base, tuned, tiling, matrix)
    stored = Stored.of(q)
    assert stored.codes.shape == shape
    assert q.shape == shape
    wanted = oracles.absmax_scales(tuned, NUMBER, tile, matrix)
    assert stored.scale.dtype == np.float32
    assert stored.scale.shape == wanted.shape
    np.testing.assert_array_equal(stored.scale, wanted)
    view = oracles.matrix_view(tuned, matrix).astype(np.float32)
    codes = NUMBER.round(view / oracles.spread(wanted, view.shape, tile))
    np.testing.assert_array_equal(NUMBER.decode(oracles.matrix_view(stored.codes, matrix)), codes)


@pytest.mark.parametrize(
    ("tiling", "tile", "scales"),
    [
        (daq.Block(128, 128), (128, 128), (2, 3)),
        (daq.Channel(), (None, 1), (1, 257)),
        (daq.PerTensor(), (None, None), (1, 1)),
        (daq.Group(128), (128, 1), (2, 257)),
        (daq.Block(1, 1), (1, 1), (130, 257)),
        (daq.Block(1000, 1000), (1000, 1000), (1, 1)),
    ],
    ids=lambda t: str(t) if isinstance(t, tuple) else type(t).__name__,
)
def test_partial_tiles_at_the_edge_are_tiles(tiling, tile, scales):
    base, tuned = pair("edges", (130, 257))
    stored = Stored.of(quantized(base, tuned, tiling))
    assert stored.scale.shape == scales
    np.testing.assert_array_equal(stored.scale, oracles.absmax_scales(tuned, NUMBER, tile))


@pytest.mark.parametrize("shape", [(1, 1), (128, 1), (1, 130), (129, 129), (2, 3, 5, 7)])
def test_the_default_tiling_takes_any_size(shape):
    base, tuned = pair("any size", shape)
    stored = Stored.of(quantized(base, tuned, daq.Block(128, 128)))
    np.testing.assert_array_equal(stored.scale, oracles.absmax_scales(tuned, NUMBER, (128, 128)))


def test_padding_does_not_reach_the_scale_of_an_edge_tile():
    tuned = np.full((5, 5), -3.0, np.float32)
    tuned[4, 4] = -0.5
    q = quantized(tuned * np.float32(0.9), tuned, daq.Block(4, 4))
    assert float(q.scale[1, 1]) == np.float32(0.5) / np.float32(448)


def test_a_matrix_is_the_same_however_its_axes_are_written():
    base, tuned = pair("axes", (24, 4, 10))
    a = quantized(base, tuned, daq.Block(8, 8), ((0,), (1, 2)))
    b = quantized(base, tuned, daq.Block(8, 8), ((-3,), (-2, -1)))
    flat = quantized(base.reshape(24, 40), tuned.reshape(24, 40), daq.Block(8, 8))
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.scale, flat.scale)
    np.testing.assert_array_equal(Stored.of(a).codes.view(np.uint8), Stored.of(b).codes.view(np.uint8))
    np.testing.assert_array_equal(
        Stored.of(a).codes.view(np.uint8).reshape(24, 40), Stored.of(flat).codes.view(np.uint8)
    )


def test_a_transposed_leaf_gets_the_transposed_codes():
    base, tuned = pair("transposed", (40, 24))
    q = quantized(base, tuned, daq.Group(16))
    t = quantized(base.T.copy(), tuned.T.copy(), daq.Group(16), ((1,), (0,)))
    np.testing.assert_array_equal(t.scale, q.scale)  # both in the matrix view
    np.testing.assert_array_equal(jnp.asarray(t.codes, jnp.float32).T, jnp.asarray(q.codes, jnp.float32))


@pytest.mark.parametrize(
    "wrong", [lambda: daq.Block(0, 128), lambda: daq.Block(128, -1), lambda: daq.Group(0)]
)
def test_sizes_are_checked_when_made(wrong):
    with pytest.raises(ValueError, match=r"got (0|-1)"):
        wrong()


def test_tilings_are_values():
    assert daq.Block(128, 128) == daq.Block(128, 128) != daq.Block(128, 64)
    assert len({daq.Channel(), daq.Channel(), daq.PerTensor(), daq.Group(32), daq.Group(32)}) == 3
