"""Kernels against the plain functions that define them: here in interpret mode, which runs anywhere.

What only a GPU can show, `python -m benchmarks exactness` checks there.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import daq_jax as daq
from daq_jax import leaves
from daq_jax.metrics import as_metric
from daq_jax.numerics import kernel_choice
from daq_jax.numerics.arithmetic import multiply
from daq_jax.numerics.machine import Machine
from daq_jax.roundings import gains, gains_gpu
from daq_jax.roundings.rounding import as_rounding
from daq_jax.searches import gpu_kernel
from daq_jax.tiles import Tiles
from daq_jax.tilings import TileView
from tests import rounding_oracles
from tests.cases import slow_after

PAPER = daq.CoarseToFine(0.8, 1.5, 5, 10)
COSINE = daq.Recipe(search=PAPER)


def feedback_recipe(rank=128, per="row", **settings):
    return dataclasses.replace(daq.recipes.default, rounding=daq.UnbiasedFeedback(rank, per), **settings)


def pair(shape, seed=0, native=False):
    """A pair of bfloat16 weights; one tile without change, one that is all zero."""
    rng = np.random.default_rng(seed)
    base = jnp.asarray(rng.normal(size=shape) * 0.02, jnp.bfloat16)
    if native:
        base = daq.dequantize(daq.quantize(base, base, daq.recipes.absmax, rules=()))
    tuned = (base.astype(jnp.float32) + jnp.asarray(rng.normal(size=shape) * 4e-4, jnp.float32)).astype(
        jnp.bfloat16
    )
    base = base.at[..., :128, 128:256].set(0)
    tuned = tuned.at[..., :128, 128:256].set(0).at[..., :128, :128].set(base[..., :128, :128])
    return base, tuned


def cut(base, tuned, recipe, matrix=((-2,), (-1,))):
    view = TileView(base.shape, matrix, recipe.tiling)
    tiles = Tiles(
        view.cut(base), view.cut(tuned), None, view.tile_axes, view.grid_axes, recipe.format, Machine(True)
    )
    return view, tiles


@pytest.fixture
def kernels():
    """`quantize` takes the kernels, interpreted, wherever it would on a GPU."""
    with kernel_choice.kernels("interpreted") as taken:
        yield taken


def search(recipe, tiles):
    """Codes and scales by the search's kernel."""
    with kernel_choice.kernels("interpreted"):
        return gpu_kernel.search_tiles(recipe.search, recipe.metric, tiles)


def applies(recipe, tiles):
    metric, rounding = as_metric(recipe.metric), as_rounding(recipe.rounding)
    return gpu_kernel.applies(recipe.search, metric, rounding, recipe.scales, tiles)


def assert_same(q, expected, most_codes=0):
    np.testing.assert_array_equal(q.scale, expected.scale)
    codes, wanted = (np.asarray(x.codes).view(np.uint8) for x in (q, expected))
    assert np.sum(codes != wanted) <= most_codes


@pytest.mark.parametrize(
    "recipe",
    [
        daq.recipes.absmax,
        pytest.param(COSINE, marks=pytest.mark.slow),
        pytest.param(daq.recipes.paper_sign, marks=pytest.mark.slow),
        pytest.param(daq.recipes.mse, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(COSINE, search=daq.Grid(0.7, 2.0, 21)), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(COSINE, format=daq.fp8_e5m2), marks=pytest.mark.slow),
        daq.Recipe(search=daq.OffGrid()),
    ],
)
def test_search_kernel_picks_the_scales_and_codes_of_the_plain_search(recipe):
    base, tuned = pair((2, 128, 384))
    view, tiles = cut(base, tuned, recipe)
    assert applies(recipe, tiles)
    codes, scale = search(recipe, tiles)
    expected = daq.quantize(base, tuned, recipe, rules=())
    np.testing.assert_array_equal(view.gather(scale), expected.scale)
    np.testing.assert_array_equal(
        np.asarray(view.join(codes)).view(np.uint8), np.asarray(expected.codes).view(np.uint8)
    )


@pytest.mark.parametrize("stored", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [2e-5, pytest.param(4e-4, marks=pytest.mark.slow)])
def test_search_kernel_finds_the_grid_of_a_base(change, stored, request):
    rng = np.random.default_rng(1)
    base = jnp.asarray(rng.normal(size=(256, 384)) * 0.02, jnp.float32)
    base = daq.quantize(
        base, base, dataclasses.replace(daq.recipes.absmax, scales=daq.PowerOfTwo()), rules=()
    )
    tuned = base.dequantize() + jnp.asarray(rng.normal(size=base.shape) * change, jnp.float32)
    arrays, recipe = (base if stored else base.dequantize(), tuned), daq.Recipe(search=daq.OffGrid())
    expected = daq.quantize(*arrays, recipe, rules=())
    taken = request.getfixturevalue("kernels")
    assert_same(daq.quantize(*arrays, recipe, rules=()), expected)
    assert taken
    found = np.mean(np.asarray(expected.scale) == np.asarray(base.scale))
    assert found == (stored and change < 1e-4)


def test_search_kernel_gives_a_tile_that_is_not_finite_the_scale_nan():
    base, tuned = pair((128, 384))
    base, tuned = base.at[5, 200].set(jnp.inf), tuned.at[7, 300].set(jnp.nan)
    _, tiles = cut(base, tuned, daq.recipes.absmax)
    _, scale = search(daq.recipes.absmax, tiles)
    np.testing.assert_array_equal(np.isnan(np.ravel(scale)), [False, True, True])


@pytest.mark.parametrize("per", [pytest.param("row", marks=pytest.mark.slow), "column"])
@pytest.mark.parametrize("matrix", [((-2,), (-1,)), pytest.param(((-1,), (-2,)), marks=pytest.mark.slow)])
def test_gains_kernel_ends_with_the_brackets_of_the_plain_bisection(per, matrix):
    base, tuned = pair((128, 256), native=True)
    _, tiles = cut(base, tuned, daq.Recipe(), matrix)
    sets = gains.Sets.of(per, tiles)
    assert gains_gpu.applies(tiles, sets.axes, sets.run)
    scale = jnp.full([1 if i in tiles.axes else n for i, n in enumerate(tiles.shape)], 2e-4, jnp.float32)

    def kept(gain):
        return tiles.kept(gains.round_towards(tiles, scale, jnp.asarray(gain, jnp.float32)), scale)

    expected = gains.bracket(tiles.change, kept, sets.total)
    arrays = (tiles.stored_base, tiles.stored_tuned, scale)
    with kernel_choice.kernels("interpreted"):
        found = gains_gpu.per_set(gains.bracket, tiles.format, sets.axes, *arrays)
    for name, x, y in zip(expected._fields, found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-12, err_msg=name)  # sums in another order


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(COSINE, tiling=daq.Block(64, 64)),
        dataclasses.replace(COSINE, tiling=daq.Channel()),
        dataclasses.replace(COSINE, format=daq.int8),
        dataclasses.replace(COSINE, metric=lambda d, q: jnp.sum(d * q, -1)),
        dataclasses.replace(COSINE, scales=daq.PowerOfTwo()),
        dataclasses.replace(COSINE, rounding=daq.Stochastic()),
        dataclasses.replace(COSINE, search=daq.WithBaseScale(PAPER)),
    ],
)
def test_search_kernel_leaves_other_recipes_to_the_plain_search(recipe):
    assert not applies(recipe, cut(*pair((128, 256)), recipe)[1])


@pytest.mark.slow
@pytest.mark.parametrize("per", ["column", pytest.param("row", marks=pytest.mark.slow)])
def test_unbiased_rounding_by_the_kernel_is_that_without(per, request):
    recipe, arrays = daq.Recipe(rounding=daq.UnbiasedGain(per)), pair((128, 256), native=True)
    expected = daq.quantize(*arrays, recipe, rules=())
    taken = request.getfixturevalue("kernels")
    assert_same(daq.quantize(*arrays, recipe, rules=()), expected, most_codes=3)  # a gain's last bit
    assert taken


def few_directions(shape, change, dtype=jnp.float32):
    """A pair whose base is on a grid of FP8, and whose change has 16 directions; one tile did not change."""
    base, tuned = rounding_oracles.native(0, shape, change, rank=16)
    tuned[:128, :128] = base[:128, :128]
    return jnp.asarray(base, dtype), jnp.asarray(tuned, dtype)


def by_kernel_and_by_loop(base, tuned, recipe, wrap=lambda f: f):
    """What error feedback keeps of a pair, under AbsMax scales."""

    def kept(base, tuned):
        view, tiles = cut(base, tuned, recipe)
        scale = jnp.max(jnp.abs(tiles.tuned), tiles.axes, keepdims=True) / recipe.format.largest
        return view.join(multiply(recipe.rounding(tiles, scale), scale))

    found = []
    for use in ("interpreted", "never"):
        with kernel_choice.kernels(use) as taken:
            found.append(jax.jit(wrap(kept))(base, tuned))
            assert bool(taken) == (use == "interpreted")
    return found


@pytest.mark.parametrize(
    ("shape", "change", "dtype", "recipe"),
    slow_after(
        2,
        [
            ((1024, 256), 0.01, jnp.float32, feedback_recipe()),
            ((1100, 256), 0.003, jnp.bfloat16, feedback_recipe()),  # dithered; the last block is not full
            ((2200, 256), 0.01, jnp.float32, feedback_recipe()),  # a block is taken in two turns
            ((2, 1024, 128), 0.01, jnp.float32, feedback_recipe()),
            ((1024, 256), 0.03, jnp.bfloat16, feedback_recipe(rank=32, per="column")),
            ((1024, 256), 0.01, jnp.float32, feedback_recipe(tiling=daq.Channel())),
            ((1024, 256), 0.01, jnp.float32, feedback_recipe(tiling=daq.Group(32))),
            ((1024, 256), 0.01, jnp.float32, feedback_recipe(format=daq.fp8_e5m2)),
            ((1024, 256), 0.01, jnp.float32, daq.Recipe(rounding=daq.DitheredFeedback())),
            ((1100, 128), 0.003, jnp.bfloat16, daq.Recipe(rounding=daq.DitheredFeedback(32))),
        ],
    ),
)
def test_feedback_kernel_does_what_the_plain_loop_does(shape, change, dtype, recipe):
    base, tuned = few_directions(shape[-2:], change, dtype)
    if len(shape) > 2:
        base, tuned = jnp.stack([base, base + 0.01]), jnp.stack([tuned, tuned + 0.01])
    kept = by_kernel_and_by_loop(base, tuned, recipe)
    assert_as_good(*kept, base, tuned)


def assert_as_good(q, expected, base, tuned):
    """Nearly the same weights, and the same of what matters: projection, and error along the change."""
    q, expected, base, tuned = (np.asarray(x, np.float64) for x in (q, expected, base, tuned))
    assert np.mean(q != expected) < 1e-3  # sums have another order, and one code changes those after it
    u = np.linalg.svd(tuned - base, full_matrices=False)[0][..., :8].swapaxes(-1, -2)
    projections = [rounding_oracles.projection(base, tuned, x) for x in (q, expected)]
    assert projections[0] == pytest.approx(projections[1], abs=1e-3)
    along = [np.mean((u @ (x - tuned)) ** 2) for x in (q, expected)]
    assert along[0] == pytest.approx(along[1], rel=0.02)


def test_feedback_kernel_leaves_a_tile_without_change_as_it_is_under_vmap():
    base, tuned = (x.reshape(1024, 2, 128).swapaxes(0, 1) for x in few_directions((1024, 256), 0.01))
    q, expected = by_kernel_and_by_loop(base, tuned, feedback_recipe(rank=16), jax.vmap)
    np.testing.assert_array_equal(q[0, :128], base[0, :128])
    assert_as_good(q, expected, base, tuned)


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        ((1024, 192), feedback_recipe(tiling=daq.Block(128, 64))),  # no whole strips
        ((512, 128), feedback_recipe()),  # blocks of 8 rows
        ((1024, 128), feedback_recipe(rank=24)),
        ((1024, 128), feedback_recipe(rank=256)),
        ((1024, 128), feedback_recipe(format=daq.int8)),
        ((1024, 128), feedback_recipe(tiling=daq.Group(8))),
    ],
)
def test_feedback_kernel_leaves_the_rest_to_the_plain_loop(shape, recipe, kernels):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(base, tuned):
        _, tiles = cut(base, tuned, recipe)
        scale = jnp.ones([1 if i in tiles.axes else n for i, n in enumerate(tiles.shape)])
        return recipe.rounding(tiles, scale)

    jax.eval_shape(run, x, x)
    names = [getattr(kernel, "func", kernel).__qualname__ for kernel in kernels]  # that of gains is partial
    assert not any(name.startswith("UnbiasedFeedback") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_default_by_kernels_is_as_good_as_without(dtype, request):
    arrays = few_directions((1024, 256), 0.01, dtype)
    expected = daq.quantize(*arrays, rules=())
    taken = request.getfixturevalue("kernels")
    q = daq.quantize(*arrays, rules=())
    assert len(taken) >= 1  # for the feedback
    np.testing.assert_array_equal(q.scale, expected.scale)
    weights = (x.dequantize(jnp.float32) for x in (q, expected))
    assert_as_good(*weights, *arrays)


@pytest.mark.slow
def test_kernel_runs_under_jit_and_vmap(request):
    arrays = pair((3, 128, 256))
    expected = daq.quantize(*arrays, COSINE, rules=())
    taken = request.getfixturevalue("kernels")
    run = functools.partial(daq.quantize, recipe=COSINE, rules=())
    with jax.disable_jit(False):
        # Under a trace arrays may lie on several devices: only where there is one may a kernel run.
        q = jax.vmap(run)(*arrays)
    assert not taken
    assert_same(q, expected)
    assert_same(jax.vmap(functools.partial(_alone, COSINE))(*arrays), expected)


def _alone(recipe, base, tuned):
    view, tiles = cut(base, tuned, recipe)
    codes, scale = gpu_kernel.search_tiles(recipe.search, recipe.metric, tiles)
    return daq.QTensor(
        view.join(codes), view.gather(scale), recipe.format, recipe.tiling, np.dtype(tuned.dtype)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_kernel_runs_on_the_shards_of_each_device(kind, request):
    arrays = pair((512, 256))
    expected = daq.quantize(*arrays, COSINE, rules=())
    taken = request.getfixturevalue("kernels")
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])
    shards = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", None))) for x in arrays]
    q = daq.quantize(*shards, COSINE, rules=())
    assert taken
    assert q.codes.sharding.spec[0] == "x"
    assert_same(q, expected)


@pytest.mark.parametrize("kind", slow_after(1, [AxisType.Explicit, AxisType.Auto]))
@pytest.mark.parametrize(
    "recipe", slow_after(2, [daq.recipes.absmax, daq.Recipe(rounding=daq.UnbiasedGain()), COSINE])
)
def test_devices_do_not_wait_for_one_another(recipe, kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    where = NamedSharding(mesh, PartitionSpec("x", "y"))
    base, tuned = (jax.device_put(x, where) for x in pair((256, 512)))
    program = leaves.lowered(base, tuned, recipe=recipe, matrix=((-2,), (-1,))).compile().as_text()
    assert not re.search("all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", program)


def both(x):
    return kernel_choice.kernel_or_plain(lambda x: [jnp.sin(x)], lambda x: [jnp.cos(x)], x)[0]


@pytest.mark.parametrize(
    ("function", "shape", "kernel"),
    [
        (both, (2**31 - 1,), True),
        (both, (2**16, 2**15), False),  # a kernel counts elements in 32 bits
        (jax.vmap(both), (2**15, 2**15), True),
        (jax.vmap(both), (2**16, 2**15), False),
        (jax.vmap(jax.vmap(both)), (2**15, 2, 2**15), False),
    ],
)
def test_kernel_is_not_for_arrays_too_large_for_its_addresses(function, shape, kernel):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = jax.jit(function).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.sine" in program) == kernel
    assert ("stablehlo.cosine" in program) != kernel


@pytest.mark.parametrize(
    ("recipe", "count"),
    [(daq.recipes.default, 1), (daq.Recipe(search=daq.OffGrid(), rounding=daq.UnbiasedFeedback()), 3)],
)
def test_kernels_of_the_default_trace_with_64_bits(recipe, count, kernels):
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    with jax.enable_x64(True):
        program = leaves.lowered(x, x, recipe=recipe, matrix=((-2,), (-1,)), one_device=True)
    assert len(kernels) >= count
    assert program.out_info[0].scale.dtype == jnp.float32
