"""One program however it runs: eager, jitted, exported or sharded; and no program is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import daq_jax as daq
from daq_jax import leaves
from tests.cases import LAYERS, Stored, assert_same_bits, is_qtensor, native, pair, slow_after
from tests.compilations import compilations

SEARCH = daq.CoarseToFine(0.8, 1.5, 5, 10)
EXACT = {
    "absmax": daq.Recipe(tiling=daq.Block(16, 16), search=daq.AbsMax()),
    "sign_rate": daq.Recipe(tiling=daq.Block(16, 16), search=SEARCH, metric=daq.SignRate()),
    "int8 channel": daq.Recipe(format=daq.int8, tiling=daq.Channel(), search=SEARCH, metric=daq.SignRate()),
}
COSINE = daq.Recipe(tiling=daq.Block(16, 16), search=SEARCH)


def tree(*names):
    """A base and a tuned tree of small layers, and the rules that give their matrices."""
    pairs = {name: pair(name, LAYERS[name][0]) for name in names}
    base, tuned = ({name: jnp.asarray(both[i]) for name, both in pairs.items()} for i in (0, 1))
    return base, tuned, [daq.use(f"^{name}$", matrix=LAYERS[name][1]) for name in names]


# --- jit, eval_shape, export --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_after(1, EXACT))
def test_jit_and_eager_agree_bit_for_bit(name):
    base, tuned, rules = tree("odd", "maxtext scanned query")
    run = lambda b, t: daq.quantize(b, t, EXACT[name], rules=rules)  # noqa: E731
    assert_same_bits(jax.jit(run)(base, tuned), run(base, tuned))


def test_jit_and_eager_dequantize_agree_bit_for_bit():
    base, tuned, rules = tree("odd", "maxtext scanned query")
    q = daq.quantize(base, tuned, EXACT["absmax"], rules=rules)
    assert_same_bits(jax.jit(daq.dequantize)(q), daq.dequantize(q))
    whole = jax.jit(lambda b, t: daq.dequantize(daq.quantize(b, t, EXACT["absmax"], rules=rules)))
    assert_same_bits(whole(base, tuned), daq.dequantize(q))


def test_eval_shape_tells_the_result_without_any_work():
    base, tuned, rules = tree("odd", "qwen3_moe experts", "linen DenseGeneral out")
    shapes = jax.eval_shape(lambda b, t: daq.quantize(b, t, EXACT["absmax"], rules=rules), base, tuned)
    q = daq.quantize(base, tuned, EXACT["absmax"], rules=rules)
    assert jax.tree.structure(shapes) == jax.tree.structure(q)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), q)
    assert shapes["odd"].shape == (33, 70)
    assert shapes["odd"].ndim == 2


@pytest.mark.parametrize("name", slow_after(1, ["absmax", "sign_rate", "default"]))
def test_export_for_cpu_cuda_and_tpu(name):
    pytest.importorskip("flatbuffers")
    base, tuned, rules = tree("maxtext scanned query")

    def run(b, t):
        q = daq.quantize(b, t, {"default": daq.recipes.default, **EXACT}[name], rules=rules)
        table = daq.compare(b, t, q)
        return jax.tree.leaves(q), jax.tree.leaves(daq.dequantize(q)), table.total.cosine

    exported = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(base, tuned)
    again = jax.export.deserialize(exported.serialize())
    assert set(again.platforms) == {"cpu", "cuda", "tpu"}
    got, wanted = again.call(base, tuned), jax.jit(run)(base, tuned)
    assert_same_bits(got[:2], wanted[:2])


def test_the_codes_survive_a_jit_that_uses_them_at_once():
    """A compiler may drop a cast to a narrow type and back, which would score and keep unrounded weights."""
    base, tuned = native("at once", (32, 32))
    weight = jax.jit(lambda b, t: daq.quantize(b, t, EXACT["absmax"]).dequantize())(base, tuned)
    wanted = daq.quantize(base, tuned, EXACT["absmax"]).dequantize()
    np.testing.assert_array_equal(weight, wanted)
    assert len(np.unique(np.asarray(weight)[:16, :16])) < 200


def test_quantize_works_inside_a_scan_over_layers():
    """Layers that arrive one at a time inside a scan get the codes that they get alone."""
    base, tuned = (jnp.asarray(x) for x in pair("scan", (3, 32, 16)))
    run = lambda b, t: daq.quantize(b, t, EXACT["absmax"])  # noqa: E731
    _, q = jax.lax.scan(lambda carry, x: (carry, run(*x)), None, (base, tuned))
    alone = run(base[1], tuned[1])
    np.testing.assert_array_equal(q.scale[1], alone.scale)
    np.testing.assert_array_equal(Stored.of(q).codes[1].view(np.uint8), Stored.of(alone).codes.view(np.uint8))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", slow_after(2, daq.recipes.RECIPES))
def test_gradients_through_codes_are_zero_and_those_straight_through_are_of_the_weight(name, jit):
    base, tuned = (jnp.asarray(x, jnp.float32) for x in pair("gradient", (32, 16)))
    deq = lambda b, t: daq.quantize(b, t, daq.recipes.RECIPES[name]).dequantize()  # noqa: E731
    loss = lambda w: jnp.sum(w * w)  # noqa: E731
    run = jax.jit if jit else lambda f: f
    for found in run(jax.grad(lambda b, t: loss(deq(b, t)), (0, 1)))(base, tuned):
        np.testing.assert_array_equal(found, 0 * base)
    through = lambda t: loss(t + jax.lax.stop_gradient(deq(base, t) - t))  # noqa: E731
    np.testing.assert_allclose(run(jax.grad(through))(tuned), 2 * deq(base, tuned), rtol=1e-5, atol=1e-7)


def test_gradients_leave_the_codes_as_they_are():
    base, tuned = (jnp.asarray(x, jnp.float32) for x in pair("gradient", (32, 16)))

    def loss(tuned):
        q = daq.quantize(base, tuned)
        return jnp.sum(q.dequantize() ** 2), q

    assert_same_bits(jax.grad(loss, has_aux=True)(tuned)[1], daq.quantize(base, tuned))


# --- Sharded arrays -----------------------------------------------------------------------------------------


def mesh_of(axis_type):
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("needs eight CPU devices")
    return Mesh(np.array(devices[:8]).reshape(2, 4), ("x", "y"), axis_types=(axis_type, axis_type))


# Shapes, how they are sharded, and their matrix.
LAYOUTS = {
    "tiles across devices": ((36, 72), P("x", "y"), None),
    "heads": ((32, 8, 10), P("x", "y", None), ((0,), (1, 2))),
    "head size": ((32, 2, 8), P(None, "x", "y"), ((0,), (1, 2))),
    "layers": ((4, 24, 40), P("x", None, "y"), None),
    "both on one": ((32, 40), P(("x", "y"), None), None),
}
AXIS_TYPES = pytest.mark.parametrize(
    "axis_type", slow_after(1, [AxisType.Explicit, AxisType.Auto]), ids=["Explicit", "Auto"]
)
RUNS = {
    "absmax": ("absmax", ["tiles across devices", "layers"]),
    "absmax, other layouts": ("absmax", ["heads", "head size", "both on one"]),
    "sign_rate": ("sign_rate", ["tiles across devices"]),
}


@AXIS_TYPES
@pytest.mark.parametrize(("recipe", "names"), slow_after(1, RUNS.values()), ids=RUNS)
def test_sharded_arrays_keep_their_sharding_and_give_the_same_codes(recipe, names, axis_type):
    mesh = mesh_of(axis_type)
    pairs = {name: pair(name, LAYOUTS[name][0]) for name in names}
    shardings = {name: NamedSharding(mesh, LAYOUTS[name][1]) for name in names}
    rules = [daq.use(f"^{name}$", matrix=LAYOUTS[name][2]) for name in names]
    base, tuned = ({name: jnp.asarray(both[i]) for name, both in pairs.items()} for i in (0, 1))
    sharded = jax.device_put(base, shardings), jax.device_put(tuned, shardings)
    run = lambda b, t: daq.quantize(b, t, EXACT[recipe], rules=rules)  # noqa: E731
    both = lambda b, t: (run(b, t), daq.dequantize(run(b, t)))  # noqa: E731
    wanted = both(base, tuned)
    for jit in (False, True):
        got, params = (jax.jit(both) if jit else both)(*sharded)
        assert_same_bits((got, params), wanted)
        if jit and axis_type is AxisType.Auto:
            continue  # there the compiler chooses, unless the caller gives out_shardings
        for name, sharding in shardings.items():
            assert got[name].codes.sharding.is_equivalent_to(sharding, got[name].ndim), name
            assert got[name].scale.sharding.device_set == sharding.device_set, name
            assert params[name].sharding.is_equivalent_to(sharding, got[name].ndim), name


@AXIS_TYPES
def test_sharded_comparison_and_cosine_search_agree_with_the_unsharded(axis_type):
    mesh = mesh_of(axis_type)
    base, tuned = (jnp.asarray(x) for x in native("sharded search", (64, 128)))
    sharded = jax.device_put((base, tuned), NamedSharding(mesh, P("x", "y")))
    with jax.set_mesh(mesh):
        got = daq.quantize(*sharded, COSINE)
        table = daq.compare(*sharded, got)
    wanted = daq.quantize(base, tuned, COSINE)
    assert np.mean(np.asarray(got.scale) == np.asarray(wanted.scale)) > 0.95  # all but near-ties
    np.testing.assert_allclose(table.total.cosine, daq.compare(base, tuned, wanted).total.cosine, rtol=1e-3)


# --- Compilation --------------------------------------------------------------------------------------------


def layers(count, dtype=np.float32):
    """Trees of `count` layers of three distinct shapes, which no other test uses."""
    shapes = {"up": (19, 23), "down": (23, 19), "out": (29, 31)}
    trees = []
    for i in (0, 1):
        trees.append(
            [{k: jnp.asarray(pair(k, s, dtype)[i]) for k, s in shapes.items()} for _ in range(count)]
        )
    return trees


def test_one_program_for_each_distinct_leaf_and_one_for_the_finite_check():
    base, tuned = layers(32)
    recipe = daq.Recipe(tiling=daq.Block(8, 8), search=daq.Grid(0.9, 1.1, 3), metric=daq.SignRate(2e-5))
    run = lambda: daq.quantize(base, tuned, recipe, rules=[])  # noqa: E731
    assert compilations(run) == 3 + 1
    assert compilations(run) == 0
    equal = daq.Recipe(tiling=daq.Block(8, 8), search=daq.Grid(0.9, 1.1, 3), metric=daq.SignRate(2e-5))
    assert compilations(lambda: daq.quantize(base, tuned, equal, rules=[])) == 0
    other = daq.Recipe(tiling=daq.Block(8, 4), search=daq.Grid(0.9, 1.1, 3), metric=daq.SignRate(2e-5))
    assert compilations(lambda: daq.quantize(base, tuned, other, rules=[])) == 3
    shorter = base[:5], tuned[:5]
    assert (
        compilations(lambda: daq.quantize(*shorter, recipe, rules=[])) <= 1
    )  # another tree, the same leaves


def test_the_second_call_compiles_nothing_for_any_entry_point():
    base, tuned = (jnp.asarray(x) for x in pair("entry", (21, 27)))
    q = daq.quantize({"w": base}, {"w": tuned}, COSINE)
    for run in (
        lambda: daq.dequantize(q)["w"],
        lambda: jax.tree.leaves(daq.compare({"w": base}, {"w": tuned}, q).total.cosine),
        lambda: jax.tree.leaves(daq.quantize({"w": base}, {"w": tuned}, COSINE)),
    ):
        compilations(run)
        assert compilations(run) == 0


def test_the_result_of_jit_is_a_tree_of_qtensors():
    base, tuned, rules = tree("odd")
    q = jax.jit(lambda b, t: daq.quantize(b, t, COSINE, rules=rules))(base, tuned)
    assert is_qtensor(q["odd"])
    assert q["odd"].tiling == daq.Block(16, 16)


@pytest.mark.parametrize(("option", "known"), [(leaves._OWN_PRODUCTS, True), ("xla_gpu_of_old", False)])
def test_an_option_that_xla_does_not_know_is_left_out(option, known):
    program = leaves.quick_to_compile(leaves._quantize, option)
    assert (program is not leaves._quantize) == known
    base, tuned = np.ones((128, 128), np.float32), np.full((128, 128), 1.25, np.float32)
    how = leaves._How.of(tuned, daq.recipes.absmax, ((-2,), (-1,)))
    q, _ = program(base, tuned, None, how=how)
    np.testing.assert_array_equal(q.dequantize(), tuned)
