import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.analysis.sampling import Patches, evenly_spread, plan, scales, take, weights
from daq_jax.tilings import DEFAULT_MATRIX, TileView
from tests.cases import LAYERS, pair, rng_for


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tiling", [daq.Block(16, 32), daq.Channel(), daq.Group(16)], ids=str)
def test_patches_of_any_layout_are_whole_tiles_and_cover_each_element_once(name, tiling):
    shape, matrix = LAYERS[name]
    view = TileView(shape, matrix or DEFAULT_MATRIX, tiling)
    patches = Patches(view)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    seen = [take(numbers, patches.index(i)) for i in range(int(np.prod(patches.grid)))]
    assert sorted(np.concatenate([x.ravel() for x in seen])) == list(range(numbers.size))
    assert patches.size[0] % view.tile[0] == 0 or patches.size[0] == view.rows
    assert patches.size[1] % view.tile[1] == 0 or patches.size[1] == view.columns


def test_a_patch_is_a_piece_of_the_matrix_view():
    numbers = np.arange(300 * 260).reshape(300, 260)
    turned = Patches(TileView((260, 300), ((1,), (0,)), daq.Block()))
    np.testing.assert_array_equal(take(numbers.T, turned.index(4)), numbers[128:256, 128:256])
    np.testing.assert_array_equal(take(numbers.T, turned.index(8)), numbers[256:, 256:])


@pytest.mark.parametrize("name", ["linen DenseGeneral query", "odd"])
def test_elements_of_a_quantized_weight_are_those_of_the_whole(name):
    shape, matrix = LAYERS[name]
    base, tuned = pair(name, shape)
    recipe = daq.Recipe(tiling=daq.Block(16, 32))
    q = daq.quantize(base, tuned, recipe, rules=[daq.use("", matrix=matrix)])
    index = evenly_spread(shape, 100)
    np.testing.assert_array_equal(take(q, index), np.asarray(q.dequantize())[index])
    np.testing.assert_array_equal(weights(q, index), np.asarray(q.dequantize(np.float32))[index])
    spread = np.asarray(q.view.join(q.view.spread(q.scale) + jnp.zeros(q.view.cut(q.codes).shape)))
    np.testing.assert_array_equal(scales(q, index), spread[index])


def test_elements_are_spread_over_all_rows_and_columns():
    rows, columns = evenly_spread((1024, 1024), 4096)
    assert np.histogram(rows, 32, (0, 1024))[0].min() > 100
    assert np.histogram(columns, 32, (0, 1024))[0].min() > 100
    assert len(evenly_spread((3, 5), 100)[0]) == 15


def grid_of(leaves, side):
    return {
        f"layers_{i}": Patches(TileView((side, side), DEFAULT_MATRIX, daq.Block())) for i in range(leaves)
    }


def test_a_plan_is_bounded_and_shares_out_by_size():
    patches = grid_of(3, 1024) | {"large": Patches(TileView((4096, 4096), DEFAULT_MATRIX, daq.Block()))}
    chosen = plan(patches, 2**21)
    assert 100 < sum(map(len, chosen.values())) <= 128
    assert len(chosen["large"]) > 10 * len(chosen["layers_0"])
    assert all(len(numbers) == len(set(numbers)) >= 4 for numbers in chosen.values())
    assert plan(patches, 2**30) == {path: list(range(int(np.prod(x.grid)))) for path, x in patches.items()}


def test_too_many_leaves_for_the_bound_are_looked_at_evenly():
    chosen = plan(grid_of(1000, 256), 2**20)
    assert sum(map(len, chosen.values())) == 64
    assert {"layers_0", "layers_999"} <= set(chosen)
    assert len(plan(grid_of(1000, 256), 1)) == 1


def test_elements_of_a_weight_with_a_zero_are_those_of_the_whole():
    weight = rng_for("with a zero").normal(0.01, 0.02, (70, 6)).astype(np.float32)
    recipe = daq.DensityRecipe(group=32, adjust=None, sweeps=0)
    q = daq.quantize_density({"w": weight}, None, recipe)["w"]
    index = evenly_spread(q.shape, 50)
    assert np.any(np.asarray(q.zero) != 0)
    np.testing.assert_array_equal(take(q, index), np.asarray(q.dequantize())[index])
