"""The plan of a tree: one row for each leaf, the very thing that `quantize` then does."""

import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import daq_jax as daq
from daq_jax.display import terminal
from daq_jax.trees import named_leaves
from tests.cases import is_qtensor


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


LAYER = {
    "attn": {"query": {"kernel": shape(64, 4, 16)}, "out": {"kernel": shape(4, 16, 64)}},
    "mlp": {"up": {"kernel": shape(64, 200)}, "norm": {"scale": shape(64)}},
}
TREE = {
    "embed": shape(100, 64),
    "layers": [LAYER, LAYER],
    "experts": {"up": shape(3, 64, 96)},
    "step": shape(dtype=jnp.int32),
    "name": "a model",
}
RECIPE = daq.Recipe(tiling=daq.Block(32, 64))
RULES = [daq.use("experts", RECIPE.replace(format=daq.int4, tiling=daq.Group(32))), *daq.DEFAULT_RULES]


def test_a_row_says_all_of_a_leaf():
    plan = daq.plan(TREE, recipe=RECIPE, rules=RULES)
    out = plan.leaves["layers/1/attn/out/kernel"]
    assert (out.inputs, out.outputs, out.matrices, out.rows, out.columns) == ((0, 1), (2,), 1, 64, 64)
    assert (out.tile, out.scales, out.bytes_before) == ((32, 64), (2, 1), 8192)
    assert out.bytes_after == 64 * 64 + 4 * 2
    experts = plan.leaves["experts/up"]
    assert (experts.rule, experts.why) == ("experts", "use('experts')")
    assert (experts.matrices, experts.rows, experts.columns, experts.scales) == (3, 64, 96, (3, 2, 96))
    kept = plan.leaves["embed"]
    assert (kept.quantized, kept.inputs, kept.scales, kept.tile) == (False, (), (), (0, 0))
    assert "embed" in kept.why
    assert kept.bytes_after == kept.bytes_before == 12800
    assert plan.leaves["step"].why == "not floating point"
    assert plan.leaves["name"].dtype == "str"
    assert set(plan.kept) == {"embed", "name", "step", *(f"layers/{i}/mlp/norm/scale" for i in (0, 1))}
    assert set(plan.quantized) | set(plan.kept) == set(plan.leaves)
    assert plan.bytes_before == sum(leaf.bytes_before for leaf in plan.leaves.values())


@pytest.mark.parametrize(
    "rules", [daq.DEFAULT_RULES, RULES, [daq.keep("attn")]], ids=["default", "mine", "one"]
)
def test_quantize_does_what_the_plan_says(rules):
    tree = {k: v for k, v in TREE.items() if k != "name"}
    plan = daq.plan(tree, recipe=RECIPE, rules=rules)
    q = jax.eval_shape(lambda t: daq.quantize(t, t, RECIPE, rules=rules), tree)
    for path, leaf in named_leaves(q).items():
        row = plan.leaves[path]
        assert row.quantized == is_qtensor(leaf)
        if row.quantized:
            assert (row.inputs, row.outputs) == leaf.view.axes[1:]
            assert (row.scales, row.recipe.format, row.recipe.tiling) == (
                leaf.scale.shape,
                leaf.format,
                leaf.tiling,
            )
    assert list(plan.leaves) == list(named_leaves(q))


def test_bytes_are_those_in_memory():
    weights = {"a": jnp.ones((64, 96), jnp.bfloat16), "bias": jnp.ones(3), "q": jnp.ones((32, 32))}
    for recipe in (daq.recipes.absmax, RECIPE.replace(format=daq.int4, tiling=daq.Channel())):
        q = daq.quantize(weights, weights, recipe)
        plan = daq.plan(weights, recipe=recipe)
        assert plan.bytes_before == sum(x.nbytes for x in weights.values())
        assert plan.bytes_after == sum(x.nbytes for x in q.values())
        again = daq.plan(q, weights, recipe)
        assert again.to_dict() == plan.to_dict()


def test_an_abstract_model_has_a_plan():
    model = nnx.eval_shape(lambda: nnx.MultiHeadAttention(4, 24, decode=False, rngs=nnx.Rngs(0)))
    for tree in (model, nnx.state(model)):
        plan = daq.plan(tree)
        assert plan.leaves["query/kernel"].outputs == (1, 2)
        assert plan.leaves["out/kernel"].inputs == (0, 1)
        assert len(plan.quantized) == 4


def test_a_plan_is_refused_and_warned_of_as_quantize_is():
    with pytest.raises(daq.DaqError, match="is in base but not in tuned"):
        daq.plan({"a": shape(4, 4), "b": shape(4, 4)}, {"a": shape(4, 4)})
    with pytest.raises(daq.DaqError, match=r"'a': base is \(4, 4\) but tuned is \(4, 8\)"):
        daq.plan({"a": shape(4, 4)}, {"a": shape(4, 8)})
    with pytest.warns(daq.UnusedRuleWarning, match="typo"):
        daq.plan({"a": shape(4, 4)}, rules=[daq.keep("typo")])


def test_leaves_that_are_alike_share_a_line():
    plan = daq.plan(TREE, recipe=RECIPE, rules=RULES)
    said = repr(plan)
    assert said.count("layers/*/attn/query/kernel (2 of these)") == 1
    assert "1 x 64 x 64" in said
    assert f"{len(plan.quantized)} leaves are quantized" in said
    page = plan._repr_html_()
    assert page.count("<tr>") == 1 + 1 + 8
    drawn = Console(file=io.StringIO(), width=260)
    terminal.show(plan.sheet(), drawn)
    assert "layers/*/mlp/up/kernel (2 of these)" in drawn.file.getvalue()


def test_a_plan_is_plain_in_json():
    plan = daq.plan(TREE, recipe=RECIPE, rules=RULES)
    found = json.loads(json.dumps(plan.to_dict()))
    row = found["leaves"]["layers/0/mlp/up/kernel"]
    assert row["inputs"] == [0]
    assert row["outputs"] == [1]
    assert (row["format"], row["tiling"]) == ("fp8_e4m3fn", "Block(r=32, c=64)")
    assert set(found["leaves"]["embed"]) >= {"why", "rule", "bytes_before"}


def test_the_rules_of_a_plan_say_the_same_again():
    leaves = {k: v for k, v in named_leaves(TREE).items() if k != "name"}
    plan = daq.plan(leaves, recipe=RECIPE, rules=RULES)
    again = daq.plan(leaves, rules=plan.rules())
    assert again.to_dict() == plan.to_dict() | {
        "leaves": {k: {**v, "rule": again.leaves[k].rule} for k, v in plan.to_dict()["leaves"].items()}
    }


def test_a_plan_of_numbers_computes_nothing():
    weights = {"kernel": np.full((8, 8), np.nan, np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert daq.plan(weights).quantized == ["kernel"]
