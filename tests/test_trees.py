"""Trees of every kind, the rules that choose leaves, and errors that name each bad leaf."""

import dataclasses
import re
import types
import warnings

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import daq_jax as daq
from daq_jax import batches, leaves
from tests.cases import Stored, assert_same_bits, is_qtensor, leaves_of, pair

ABSMAX = daq.Recipe(search=daq.AbsMax())
BASE, TUNED = (jnp.asarray(x) for x in pair("trees", (24, 16)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array | None = None


# Each kind of tree as a function of its one weight, and the path of that weight.
TREES = {
    "bare array": (lambda w: w, ""),
    "dict": (lambda w: {"layer": {"kernel": w}}, "layer/kernel"),
    "list": (lambda w: [{"kernel": w}], "0/kernel"),
    "tuple": (lambda w: (None, (w,)), "1/0"),
    "dataclass": (lambda w: {"mlp": Layer(w)}, "mlp/kernel"),
    "FrozenDict": (lambda w: flax.core.freeze({"layer": {"kernel": w}}), "layer/kernel"),
    "nnx.State": (lambda w: nnx.State({"layers": {0: {"kernel": nnx.Param(w)}}}), "layers/0/kernel"),
    "nn.Partitioned": (
        lambda w: {"layer": {"kernel": nn.Partitioned(w, names=("in", "out"))}},
        "layer/kernel",
    ),
}


def quantized_paths(tree_base, tree_tuned, recipe=ABSMAX, rules=None):
    """Paths of the quantized leaves, as the comparison names them."""
    q = daq.quantize(tree_base, tree_tuned, recipe, **({} if rules is None else {"rules": rules}))
    return set(daq.compare(tree_base, tree_tuned, q).leaves)


def two(tree_of):
    """The base and the tuned tree of one shape of tree."""
    return tree_of(BASE), tree_of(TUNED)


def flat(*names):
    """A base and a tuned dict whose every leaf is the same weight."""
    return dict.fromkeys(names, BASE), dict.fromkeys(names, TUNED)


# --- Trees and paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_keeps_its_structure_and_its_leaf_has_a_path(kind):
    tree_of, path = TREES[kind]
    base, tuned = two(tree_of)
    q = daq.quantize(base, tuned, ABSMAX, rules=[])
    alone = daq.quantize(BASE, TUNED, ABSMAX)
    assert type(q) is type(tuned) or kind == "bare array"
    assert jax.tree.structure(q, is_leaf=is_qtensor) == jax.tree.structure(tuned)
    assert len(leaves_of(q)) == 1
    assert_same_bits(leaves_of(q)[0], alone)
    assert set(daq.compare(base, tuned, q).leaves) == {path}
    params = daq.dequantize(q)
    assert jax.tree.structure(params) == jax.tree.structure(tuned)
    np.testing.assert_array_equal(jax.tree.leaves(params)[0], alone.dequantize())


@pytest.mark.parametrize("kind", TREES)
def test_rules_see_that_path_and_no_more(kind):
    tree_of, path = TREES[kind]
    base, tuned = two(tree_of)
    assert quantized_paths(base, tuned, rules=[daq.keep(f"^{path}$")]) == set()


def test_none_leaves_pass_and_the_rest_is_untouched():
    base = {"w": BASE, "none": None, "bias": jnp.ones(4), "step": jnp.int32(3)}
    tuned = {"w": TUNED, "none": None, "bias": jnp.full(4, 2.0), "step": jnp.int32(9)}
    q = daq.quantize(base, tuned, ABSMAX)
    assert isinstance(q["w"], daq.QTensor)
    assert q["none"] is None
    np.testing.assert_array_equal(q["bias"], tuned["bias"])
    assert int(q["step"]) == 9


def test_a_real_nnx_model_can_be_quantized_and_run():
    model = nnx.Linear(24, 16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    tuned = jax.tree.map(lambda w: w * jnp.asarray(1.01, w.dtype), state)
    params = daq.dequantize(daq.quantize(state, tuned, ABSMAX))
    x = jnp.ones((2, 24))
    wanted = nnx.merge(graph, tuned)(x)
    np.testing.assert_allclose(nnx.merge(graph, params)(x), wanted, rtol=0.3, atol=0.1)


# --- Rules --------------------------------------------------------------------------------------------------


def test_the_first_match_wins():
    base, tuned = flat("a/x", "a/y", "b/x")
    int8 = daq.Recipe(format=daq.int8, tiling=daq.Channel())
    rules = [daq.keep("^a/y$"), daq.use("^a/", int8), daq.use("x$", daq.Recipe(format=daq.fp8_e5m2))]
    q = daq.quantize(base, tuned, ABSMAX, rules=rules)
    assert (q["a/x"].format, q["a/x"].tiling) == (daq.int8, daq.Channel())
    assert q["b/x"].format == daq.fp8_e5m2
    np.testing.assert_array_equal(q["a/y"], tuned["a/y"])


def test_use_without_a_recipe_takes_the_argument_and_sets_the_matrix():
    base, tuned = flat("hf", "flax")
    recipe = daq.Recipe(tiling=daq.Channel())
    q = daq.quantize(base, tuned, recipe, rules=[daq.use("hf", matrix=((1,), (0,)))])
    assert q["hf"].tiling == q["flax"].tiling == daq.Channel()
    assert q["hf"].scale.shape == (1, 24)
    assert q["flax"].scale.shape == (1, 16)
    assert q["hf"].codes.shape == (24, 16)


def test_patterns_search_and_mind_the_case():
    base, tuned = flat("Layer/kernel", "layer/kernel", "other")
    assert quantized_paths(base, tuned, rules=[daq.keep("ayer/k")]) == {"other"}
    assert quantized_paths(base, tuned, rules=[daq.keep("layer")]) == {"Layer/kernel", "other"}


def test_rules_replace_the_default_ones_and_can_be_put_before_them():
    base, tuned = flat("embed_tokens/embedding", "mlp/up_proj/kernel")
    assert quantized_paths(base, tuned) == {"mlp/up_proj/kernel"}
    assert quantized_paths(base, tuned, rules=[]) == set(base)
    rules = [daq.keep("mlp"), *daq.DEFAULT_RULES]
    assert quantized_paths(base, tuned, rules=rules) == set()
    rules = [daq.use("embed"), *daq.DEFAULT_RULES]
    assert quantized_paths(base, tuned, rules=rules) == set(base)


def test_default_rules_keep_what_is_not_a_plain_weight():
    kept = [
        "model/embed_tokens/embedding",
        "token_embedder/embedding",
        "position_embedding/embedding",
        "layers/input_layernorm/scale",
        "layers/post_attention_norm/scale",
        "attention/query/bias",
        "lm_head/kernel",
        "mlp/router/kernel",
    ]
    used = [
        "layers/mlp/gate_proj/kernel",
        "layers/mlp/down_proj/kernel",
        "self_attn/q_proj/kernel",
        "Dense_0/kernel",
    ]
    assert quantized_paths(*flat(*kept, *used)) == set(used)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_default_rules_know_the_attention_kernels_of_flax(library):
    if library == "linen":
        module = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=40)
        x = jax.ShapeDtypeStruct((1, 3, 24), jnp.float32)
        shapes = {
            "attn": jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape)))["params"]
        }
    else:
        make = lambda: nnx.MultiHeadAttention(4, 24, 40, decode=False, rngs=nnx.Rngs(0))  # noqa: E731
        shapes = {"attn": nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))}
    pairs = jax.tree.map(lambda s: pair(str(s.shape), s.shape, np.float32), shapes)
    base, tuned = jax.tree.transpose(jax.tree.structure(shapes), None, pairs)
    q = daq.quantize(base, tuned, daq.Recipe(tiling=daq.Channel()))["attn"]
    assert q["query"]["kernel"].scale.shape == q["value"]["kernel"].scale.shape == (1, 40)
    assert q["out"]["kernel"].scale.shape == (1, 24)
    assert not any(is_qtensor(q[name]["bias"]) for name in ("query", "key", "value", "out"))


def test_an_unused_rule_warns_with_its_pattern():
    base, tuned = flat("w")
    with pytest.warns(daq.UnusedRuleWarning, match="typo"):
        daq.quantize(base, tuned, ABSMAX, rules=[daq.keep("typo"), daq.use("w")])
    with pytest.warns(daq.UnusedRuleWarning, match="typo"):
        daq.quantize(base, tuned, ABSMAX, rules=[daq.use("typo"), *daq.DEFAULT_RULES])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        daq.quantize(base, tuned, ABSMAX)
        daq.quantize(base, tuned, ABSMAX, rules=[daq.use("w"), *daq.DEFAULT_RULES])


def test_a_kept_leaf_may_differ_in_shape_and_dtype():
    base = {"w": BASE, "embed": jnp.ones((10, 4), jnp.bfloat16)}
    tuned = {"w": TUNED, "embed": jnp.ones((12, 4), jnp.float32)}
    q = daq.quantize(base, tuned, ABSMAX, rules=[daq.keep("embed")])
    assert q["embed"].shape == (12, 4)
    assert is_qtensor(q["w"])


@pytest.mark.parametrize("wrong", [lambda: daq.keep("("), lambda: daq.use("[")])
def test_rules_are_checked_when_made(wrong):
    with pytest.raises(ValueError, match="regular expression"):
        wrong()


# --- Errors -------------------------------------------------------------------------------------------------

GOOD = np.ones((4, 8), np.float32)
# Each fault: base leaf, tuned leaf, and what its message says of what came.
STATIC_FAULTS = {
    "shape": (GOOD, np.ones((4, 9), np.float32), [r"\(4, 8\)", r"\(4, 9\)"]),
    "integer": (GOOD.astype(np.int32), GOOD.astype(np.int32), ["int32"]),
    "integer_base": (GOOD.astype(np.int32), GOOD, ["int32"]),
    "complex": (GOOD.astype(np.complex64), GOOD.astype(np.complex64), ["complex64"]),
    "float64": (GOOD.astype(np.float64), GOOD.astype(np.float64), ["float64"]),
    "empty": (np.ones((0, 8), np.float32), np.ones((0, 8), np.float32), [r"\(0, 8\)"]),
    "vector": (GOOD[0], GOOD[0], [r"\(8,\)"]),
}
GONE = jnp.array(GOOD)
GONE.delete()
MASKED = np.ma.masked_array(GOOD, GOOD > 0)
STATIC_FAULTS |= {
    "big_endian": (GOOD.astype(">f4"), GOOD.astype(">f4"), [">f4", r'newbyteorder\("="\)']),
    "masked": (GOOD, MASKED, ["tuned is a masked array", r"\.filled\(value\)"]),
    "masked_base": (MASKED, GOOD, ["base is a masked array"]),
    "deleted": (GOOD, GONE, ["tuned is a deleted array"]),
    "deleted_codes": (
        GOOD,
        daq.QTensor(GONE, GONE, daq.int8, daq.Channel(), np.dtype("float32")),
        ["deleted"],
    ),
}
NAN, INF = GOOD.copy(), GOOD.copy()
NAN[1, 2], INF[3, 4] = np.nan, -np.inf
VALUE_FAULTS = {
    "nan_tuned": (GOOD, NAN, ["(?i)nan|finite"]),
    "inf_tuned": (GOOD, INF, ["(?i)inf|finite"]),
    "nan_base": (NAN, GOOD, ["(?i)nan|finite"]),
}
FAULTS = STATIC_FAULTS | VALUE_FAULTS


def trees_with(faults):
    """A base and a tuned tree with these faults beside one good leaf."""
    base, tuned = ({"layers": {name: fault[i] for name, fault in faults.items()}} for i in (0, 1))
    return {**base, "good_leaf": GOOD}, {**tuned, "good_leaf": GOOD}


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_names_the_leaf_what_came_and_a_way_out(name):
    base, tuned = trees_with({name: FAULTS[name]})
    with pytest.raises(ValueError, match=f"layers/{name}") as caught:
        daq.quantize(base, tuned, ABSMAX, rules=[daq.use(f"layers/{name}$")])
    message = str(caught.value)
    assert f"layers/{name}" in message
    assert "good_leaf" not in message
    for came in FAULTS[name][2]:
        assert re.search(came, message), message
    assert "keep(" in message or "check_finite" in message, message


def test_shapes_beside_arrays_are_named():
    tree = {"a": GOOD, "b": jax.ShapeDtypeStruct((4, 8), np.float32)}
    for base, tuned, word in (
        (tree, {"a": GOOD, "b": GOOD}, "base"),
        ({"a": GOOD, "b": GOOD}, tree, "tuned"),
    ):
        with pytest.raises(daq.DaqError, match=f"'b': {word} is a shape without numbers") as caught:
            daq.quantize(base, tuned)
        assert "'a'" not in str(caught.value)


def test_dicts_of_keys_without_an_order_are_named():
    tree = {"layers": [{"x": GOOD}, {"y": GOOD, 1: GOOD}]}
    for run in (lambda: daq.quantize(tree, tree), lambda: daq.compare(tree, tree, tree)):
        with pytest.raises(daq.DaqError, match=r"'layers/1' is a dict with keys of int and str.*str\(key\)"):
            run()


def test_what_jax_does_not_look_into_is_refused_as_a_tree():
    good = {"w": GOOD}
    for make in (lambda: (x for x in [GOOD]), lambda: iter([GOOD]), lambda: map(abs, [GOOD]), good.values):
        for run in (
            lambda: daq.quantize(make(), make()),  # noqa: B023
            lambda: daq.quantize({"a": make()}, {"a": make()}),  # noqa: B023
            lambda: daq.compare(good, good, make()),  # noqa: B023
        ):
            with pytest.raises(daq.DaqError, match="is no tree to JAX; pass a dict or a list"):
                run()


def test_one_error_names_all_bad_leaves():
    base, tuned = trees_with(FAULTS)
    with pytest.raises(ValueError, match="layers/shape") as caught:
        daq.quantize(base, tuned, ABSMAX, rules=[daq.use("layers")])
    for name in FAULTS:
        assert f"layers/{name}" in str(caught.value), name
    assert "good_leaf" not in str(caught.value)


def test_static_faults_are_found_inside_a_trace_too():
    base, tuned = trees_with({"shape": STATIC_FAULTS["shape"]})
    with pytest.raises(ValueError, match="layers/shape"):
        jax.eval_shape(lambda b, t: daq.quantize(b, t, ABSMAX), base, tuned)


def test_integer_and_complex_leaves_that_no_rule_uses_are_kept():
    base, tuned = trees_with({name: FAULTS[name] for name in ("integer", "complex", "vector")})
    q = daq.quantize(base, tuned, ABSMAX)
    assert [is_qtensor(x) for x in leaves_of(q)].count(True) == 1


def test_trees_of_different_structure_are_named_by_their_paths():
    with pytest.raises(ValueError, match="layers/extra"):
        daq.quantize({"layers": {"w": GOOD}}, {"layers": {"w": GOOD, "extra": GOOD}}, ABSMAX)
    with pytest.raises(ValueError, match="layers/extra"):
        daq.quantize({"layers": {"w": GOOD, "extra": GOOD}}, {"layers": {"w": GOOD}}, ABSMAX)
    with pytest.raises(ValueError, match="maybe"):
        daq.quantize({"w": GOOD, "maybe": None}, {"w": GOOD, "maybe": GOOD}, ABSMAX)


@pytest.mark.parametrize("matrix", [((0,), (1, 2)), ((0,), (0,)), ((0,), (-2,))], ids=str)
def test_a_matrix_that_does_not_fit_its_leaf_is_an_error(matrix):
    with pytest.raises(ValueError, match="query"):
        daq.quantize({"query": BASE}, {"query": TUNED}, ABSMAX, rules=[daq.use("query", matrix=matrix)])


def test_nothing_is_deleted_when_a_leaf_is_bad():
    base = {"a": jnp.asarray(GOOD), "z": jnp.asarray(GOOD)}
    tuned = {"a": jnp.asarray(GOOD), "z": jnp.asarray(NAN)}
    with pytest.raises(ValueError, match="z"):
        daq.quantize(base, tuned, ABSMAX, donate=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves((base, tuned)))


def test_check_finite_can_be_skipped():
    q = daq.quantize({"w": GOOD}, {"w": NAN}, ABSMAX, check_finite=False)
    assert np.isnan(Stored.of(q["w"]).scale).all()


# --- Containers and devices that do not go together ---------------------------------------------------------


class Unknown:
    """A container of which JAX knows nothing."""

    def __init__(self, kernel):
        self.kernel = kernel


@pytest.mark.parametrize(
    "kind", [Unknown, lambda w: types.MappingProxyType({"kernel": w})], ids=["class", "mapping"]
)
def test_a_container_that_jax_does_not_know_is_named_with_what_to_do(kind):
    base, tuned = ({"layer": kind(w), "w": w} for w in (BASE, TUNED))
    with pytest.raises(ValueError, match=r"'layer' is a \w+\nRegister their class"):
        daq.quantize(base, tuned, ABSMAX)
    q = daq.quantize(base, tuned, ABSMAX, rules=[daq.keep("layer")])
    assert q["layer"] is tuned["layer"]


def test_a_whole_nnx_model_is_a_tree_too():
    model = nnx.Linear(24, 16, rngs=nnx.Rngs(0))
    q = daq.quantize(model, model, ABSMAX)
    assert isinstance(q, nnx.Linear)
    assert is_qtensor(q.kernel.get_raw_value())


DEVICES = jax.devices("cpu")
GRID = np.array(DEVICES[:8]).reshape(2, 4)
AUTO, EXPLICIT = ((kind, kind) for kind in (AxisType.Auto, AxisType.Explicit))


def on(mesh_devices, axis_types, *spec):
    return NamedSharding(Mesh(mesh_devices, ("x", "y"), axis_types=axis_types), P(*spec))


FINE = {
    "committed and not": (DEVICES[1], None),
    "not and committed": (None, DEVICES[1]),
    "sharded and not": (on(GRID, AUTO, "x", "y"), None),
    "not and sharded": (None, on(GRID, AUTO, "x", "y")),
    "not and Explicit": (None, on(GRID, EXPLICIT, "x", "y")),
    "two specs": (on(GRID, AUTO, "x", "y"), on(GRID, AUTO, "y")),
    "two Explicit specs": (on(GRID, EXPLICIT, "x", "y"), on(GRID, EXPLICIT, "y")),
}
APART = {
    "two devices": (DEVICES[0], DEVICES[1]),
    "a mesh and a device": (on(GRID, AUTO, "x", "y"), DEVICES[0]),
    "two meshes": (on(GRID, AUTO, "x", "y"), on(GRID.reshape(4, 2), AUTO, "x", "y")),
    "two orders": (on(GRID, AUTO, "x", "y"), on(GRID[::-1], AUTO, "x", "y")),
    "Auto and Explicit": (on(GRID, AUTO, "x", "y"), on(GRID, EXPLICIT, "x", "y")),
}


def placed(places):
    """Base and tuned on a device or mesh each, or uncommitted."""
    pair = zip((BASE, TUNED), places, strict=True)
    return tuple({"kernel": w if place is None else jax.device_put(w, place)} for w, place in pair)


@pytest.mark.parametrize("name", FINE)
def test_pairs_that_lie_in_two_ways_give_the_same_codes(name):
    got = daq.quantize(*placed(FINE[name]), ABSMAX)
    assert_same_bits(got, {"kernel": daq.quantize(BASE, TUNED, ABSMAX)})


@pytest.mark.parametrize("name", APART)
def test_pairs_that_no_program_can_take_are_named_with_what_to_do(name):
    base, tuned = placed(APART[name])
    with pytest.raises(ValueError, match=r"'kernel': base lies on .* but tuned on .*jax\.device_put"):
        daq.quantize(base, tuned, ABSMAX)
    moved = {"kernel": jax.device_put(base["kernel"], tuned["kernel"].sharding)}
    daq.quantize(moved, tuned, ABSMAX)


def test_each_leaf_may_have_devices_of_its_own():
    base, tuned = ([jax.device_put(w, d) for d in DEVICES[:2]] for w in (BASE, TUNED))
    q = daq.quantize(base, tuned, ABSMAX)
    assert [x.codes.devices() for x in q] == [{DEVICES[0]}, {DEVICES[1]}]


@pytest.mark.parametrize("donate", [False, True])
def test_leaves_of_one_shape_quantized_as_a_batch_are_those_quantized_alone(donate, monkeypatch):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    shapes = {"a": (96, 64), "b": (96, 64), "c": (64, 96), "d": (96, 64), "norm": (64,), "e": (2, 96, 64)}
    base = {name: leaf(*shape) for name, shape in shapes.items()}
    tuned = {name: x + 1e-2 * leaf(*x.shape) for name, x in base.items()}
    tuned["d"] = tuned["b"]
    expected = daq.quantize(base, tuned)
    sizes = []
    alike = batches.quantize_alike
    monkeypatch.setattr(batches, "better_together", lambda pair: 2)
    monkeypatch.setattr(
        batches, "quantize_alike", lambda b, t, **how: sizes.append(len(b)) or alike(b, t, **how)
    )
    copies = jax.tree.map(jnp.copy, (base, tuned))
    q = daq.quantize(*copies, donate=donate)
    assert sizes == [2, 2]  # a and b, then d twice
    for name in "abcde":
        assert jnp.array_equal(q[name].scale, expected[name].scale)
        kept, wanted = (np.asarray(x.dequantize()) for x in (q[name], expected[name]))
        assert np.mean(kept != wanted) < 1e-3  # products of a batch may differ in their last bit
    assert q["norm"] is copies[1]["norm"]
    assert copies[0]["a"].is_deleted() == copies[1]["d"].is_deleted() == donate


def test_a_leaf_that_a_batch_repeats_is_not_donated_while_the_result_holds_it(monkeypatch):
    monkeypatch.setattr(batches, "better_together", lambda pair: 2)
    base = {name: jax.random.normal(jax.random.key(n), (96, 64)) for n, name in enumerate("abc")}
    tuned = {name: 1.01 * x for name, x in base.items()}
    base["norm"], tuned["norm"] = base["c"], tuned["c"]
    q = daq.quantize(base, tuned, donate=True)
    assert not q["norm"].is_deleted()
    assert tuned["a"].is_deleted()


@pytest.mark.parametrize("closed_over", ["base", "tuned", "both"])
def test_weights_at_hand_may_be_used_inside_jit(closed_over):
    base, tuned = {"kernel": BASE}, {"kernel": TUNED}
    given = {name: x for name, x in (("base", base), ("tuned", tuned)) if closed_over not in (name, "both")}

    def look(given):
        trees = {"base": base, "tuned": tuned, **given}
        q = daq.quantize(trees["base"], trees["tuned"], ABSMAX, donate=True)
        return q, daq.compare(trees["base"], trees["tuned"], q).total.projection

    q, projection = jax.jit(look)(given)
    expected = daq.quantize(base, tuned, ABSMAX)
    assert_same_bits(q["kernel"].codes, expected["kernel"].codes)
    np.testing.assert_allclose(projection, daq.compare(base, tuned, expected).total.projection, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_weights_at_hand_inside_jit_ask_for_no_options_of_the_compiler(count, monkeypatch):
    base, tuned = ({str(i): {"kernel": x} for i in range(count)} for x in (BASE, TUNED))
    expected = daq.quantize(base, tuned)
    for module in (leaves, batches):
        monkeypatch.setattr(module, "multiplies_on_gpu", lambda tuned, rounding: True)
    inside, outside = jax.jit(lambda: daq.quantize(base, tuned))(), daq.quantize(base, tuned)
    for q in (inside, outside):
        assert_same_bits(q["0"]["kernel"].scale, expected["0"]["kernel"].scale)


def test_heads_that_no_rule_knows_are_warned_of():
    base, tuned = ({"q": {"kernel": x.reshape(2, 64, 1, 3)}} for x in (BASE, TUNED))
    with pytest.warns(
        daq.NarrowMatrixWarning, match=r"'q/kernel' \(2, 64, 1, 3\) is taken as 128 matrices of 1"
    ):
        daq.quantize(base, tuned, ABSMAX)
    daq.quantize(base, tuned, ABSMAX, rules=[daq.use("q/kernel", matrix=((-3,), (-2, -1)))])


def test_what_a_model_runs_on_is_no_tree_of_weights():
    q = daq.linen_variables(daq.quantize({"kernel": BASE}, {"kernel": TUNED}, ABSMAX))
    with pytest.raises(ValueError, match=r"'kernel' is a InPlace of 3 arrays.*pass what `quantize` returned"):
        daq.compare({"kernel": BASE}, {"kernel": TUNED}, q)


@dataclasses.dataclass(frozen=True)
class Drawing(daq.Rounding):
    """A rounding of whole matrices that draws."""

    draws = True
    multiplies = True

    def draw(self, shape, stream):
        return daq.Stochastic().draw(shape, stream)

    def __call__(self, tiles, scale):
        return daq.Stochastic()(tiles, scale)


def test_leaves_whose_rounding_draws_are_no_batch(monkeypatch):
    monkeypatch.setattr(batches, "multiplies_on_gpu", lambda tuned, rounding: True)
    base, tuned = ({"a": x, "b": x} for x in (BASE, TUNED))
    q = daq.quantize(base, tuned, daq.Recipe(rounding=Drawing()))
    expected = daq.quantize(base, tuned, daq.Recipe(rounding=daq.Stochastic()))
    assert_same_bits([q[k].codes for k in "ab"], [expected[k].codes for k in "ab"])
