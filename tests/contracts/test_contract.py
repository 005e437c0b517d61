"""One contract: what holds for every format, tiling, metric, search, rounding, scales and recipe."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import daq_jax as daq
from daq_jax import leaves
from daq_jax.tilings import DEFAULT_MATRIX
from tests.cases import assert_same_bits
from tests.compilations import compilations
from tests.contracts.members import BY_PRODUCTS, MEMBERS, SHAPE, TILE, a_pair, twin

# Those that take long to compile are in the slow tests, but for the first check.
HEAVY = ("UnbiasedSubspace", "recipes.default")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in MEMBERS]
)
BASE, TUNED = map(jnp.asarray, a_pair())


def run(recipe: daq.Recipe, base: jax.Array = BASE, tuned: jax.Array = TUNED) -> daq.QTensor:
    return daq.quantize(base, tuned, recipe, rules=())


@functools.cache
def eager(name: str) -> daq.QTensor:
    return run(MEMBERS[name])


def assert_same(name: str, q: daq.QTensor, expected: daq.QTensor) -> None:
    """Bit for bit, but for members that sum products of matrices: there the kept change is as good."""
    if name not in BY_PRODUCTS:
        assert_same_bits((q.codes, q.scale), (expected.codes, expected.scale))
        return
    assert_same_bits(q.scale, expected.scale)
    found, wanted = (daq.compare(BASE, TUNED, x).total for x in (q, expected))
    assert float(found.projection) == pytest.approx(float(wanted.projection), abs=2e-3)
    assert float(found.mse) == pytest.approx(float(wanted.mse), rel=2e-2)


@pytest.mark.parametrize("name", MEMBERS)
def test_jit_gives_the_bits_of_an_eager_call(name):
    assert_same(name, jax.jit(functools.partial(run, MEMBERS[name]))(BASE, TUNED), eager(name))


@EACH
def test_an_interpreted_call_gives_the_bits_of_a_compiled_one(name):
    """On a corner of the pair, as `jax.disable_jit` runs one operation at a time."""
    corner = BASE[64:, :40], TUNED[64:, :40]
    compiled = run(MEMBERS[name], *corner)
    with jax.disable_jit():
        interpreted = run(MEMBERS[name], *corner)
    assert_same_bits((interpreted.codes, interpreted.scale), (compiled.codes, compiled.scale))


@EACH
def test_an_exported_program_gives_the_bits_of_an_eager_call(name):
    def arrays(base, tuned):
        q = run(MEMBERS[name], base, tuned)
        return q.codes, q.scale

    program = jax.export.export(jax.jit(arrays))(BASE, TUNED)
    codes, scale = jax.export.deserialize(program.serialize()).call(BASE, TUNED)
    expected = eager(name)
    assert_same(name, daq.QTensor(codes, scale, expected.format, expected.tiling, expected.dtype), expected)


@EACH
def test_eval_shape_tells_codes_and_scales(name):
    shapes, expected = jax.eval_shape(lambda: run(MEMBERS[name])), eager(name)
    for got, wanted in ((shapes.codes, expected.codes), (shapes.scale, expected.scale)):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


@EACH
def test_the_zero_tile_stays_zero_and_the_frozen_tile_gets_nearest_codes_under_absmax(name):
    recipe, q = MEMBERS[name], eager(name)
    weight, (r, c) = np.asarray(q.dequantize()), TILE
    assert np.isfinite(weight).all()
    assert (np.asarray(q.scale) > 0).all()
    np.testing.assert_array_equal(weight[:r, :c], 0)
    plain = run(recipe.replace(search=daq.AbsMax(), rounding=daq.Nearest(), metric=daq.cosine))
    if (
        name.startswith("BaseScale") or name == "recipes.default"
    ):  # the frozen tile stays on the grid of its base
        np.testing.assert_array_equal(weight[:r, c : 2 * c], np.asarray(BASE)[:r, c : 2 * c])
        return
    tiled_alone = recipe.tiling.tile(*SHAPE) == TILE
    released = name == "recipes.released_cosine"  # clips a tile without change, as the released program does
    if tiled_alone and not released and name != "Stochastic":
        frozen = (slice(0, r), slice(c, 2 * c))
        np.testing.assert_array_equal(weight[frozen], np.asarray(plain.dequantize())[frozen])


@EACH
def test_64_bits_change_nothing(name):
    expected = eager(name)
    with jax.enable_x64(True):
        q = run(MEMBERS[name])
        assert q.scale.dtype == jnp.float32
        assert_same(name, q, expected)


@EACH
def test_strict_promotion_of_ranks_changes_nothing(name):
    expected = eager(name)  # dtypes are strict in all tests
    with jax.numpy_rank_promotion("raise"):
        q = jax.jit(functools.partial(run, MEMBERS[name]))(BASE, TUNED)
        assert_same(name, q, expected)
        jax.eval_shape(lambda: daq.compare(BASE, TUNED, q).total)
        jax.eval_shape(q.dequantize)


@EACH
def test_a_second_call_compiles_nothing(name):
    eager(name)
    assert compilations(lambda: jax.block_until_ready(run(MEMBERS[name]))) == 0


@EACH
def test_recipes_are_values(name):
    recipe = MEMBERS[name]
    copy = pickle.loads(pickle.dumps(recipe))
    assert (copy, hash(copy)) == (recipe, hash(recipe))


@EACH
def test_the_result_survives_pickle_and_a_tree(name):
    q = eager(name)
    assert_same_bits(pickle.loads(pickle.dumps(q)), q)
    assert_same_bits(jax.tree.map(jnp.asarray, q), q)


@EACH
def test_a_caller_s_own_parts_give_the_bits_of_ours(name):
    assert_same(name, run(twin(MEMBERS[name])), eager(name))


@EACH
def test_a_sharded_weight_gets_the_codes_of_a_whole_one(name):
    mesh = jax.make_mesh((3, 2), ("x", "y"), (AxisType.Explicit,) * 2, devices=jax.devices()[:6])
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    q = run(MEMBERS[name], *jax.device_put((BASE, TUNED), sharding))
    assert q.codes.sharding.is_equivalent_to(sharding, 2)
    assert_same(name, jax.tree.map(np.asarray, q), eager(name))


# One of each kind of rounding, search, metric and tiling that a CPU takes in parts.
IN_PARTS = (
    "fp8_e4m3fn",
    "Channel",
    "Group",
    "a function",
    "CoarseToFine",
    "WithBaseScale",
    "BaseScale",
    "OffGrid",
    "Stochastic",
    "UnbiasedGain row",
    "UnbiasedGain column",
    "UnbiasedGain tile",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PARTS)
def test_a_weight_taken_in_parts_gets_the_codes_of_a_whole_one(name):
    base, tuned = (jnp.tile(x, (8, 8)) for x in (BASE, TUNED))  # more than one part holds
    stream = np.uint32(0) if MEMBERS[name].rounding.draws else None

    def codes(one_device):
        program = leaves.lowered(
            base, tuned, recipe=MEMBERS[name], matrix=DEFAULT_MATRIX, one_device=one_device
        )
        return program.compile()(base, tuned, stream)[0]

    parts, whole = codes(True), codes(False)
    assert_same_bits((parts.codes, parts.scale), (whole.codes, whole.scale))
