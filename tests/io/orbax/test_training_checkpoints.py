"""Checkpoints as training runs leave them: roots, steps, items, states of optimizers, and deeper paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import daq_jax as daq
from daq_jax.io.disk.orbax_places import is_orbax
from daq_jax.trees import aligned, named_leaves

RECIPE = daq.Recipe(search=daq.AbsMax(), tiling=daq.Block(16, 16))


def weights(seed):
    return {"mlp": {"kernel": jax.random.normal(jax.random.key(seed), (32, 48)), "bias": jnp.zeros(48)}}


def saved(root, steps, **items):
    """A training run whose checkpoints hold these items, with the weights of each step."""
    with ocp.CheckpointManager(root) as manager:
        for step in steps:
            made = {name: ocp.args.PyTreeSave(make(step)) for name, make in items.items()}
            manager.save(step, args=ocp.args.Composite(**made))
        manager.wait_until_finished()
    return root


def state(step):
    params = weights(step)
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("run"), (2, 10), items=state)


@pytest.mark.parametrize(("part", "step"), [("", 10), ("10", 10), ("2", 2), ("2/items", 2)])
def test_weights_are_read_from_a_root_a_step_and_an_item(run, part, step):
    found = daq.load_weights(run / part)
    assert sorted(named_leaves(found)) == ["params/mlp/bias", "params/mlp/kernel", "step"]
    np.testing.assert_array_equal(found["params"]["mlp"]["kernel"], weights(step)["mlp"]["kernel"])
    assert is_orbax(run / part)


def test_the_state_of_an_optimizer_is_read_where_it_is_asked_for(run):
    assert set(daq.load_weights(run, only="mu/")["opt_state"][0]) == {"mu"}
    template = {"opt_state": [{"mu": weights(0)}]}
    np.testing.assert_array_equal(daq.load_weights(run, template)["opt_state"][0]["mu"]["mlp"]["bias"], 0)


@pytest.mark.parametrize("rules", ["DEFAULT", "MAXTEXT", "TUNIX", "GEMMA", "HF", "KERAS"])
def test_moments_of_an_optimizer_are_kept(rules):
    tree = {
        "opt_state": [
            {"mu": {"query": {"kernel": jnp.ones((8, 4, 4))}, "attn": {"q_einsum": jnp.ones((4, 8, 2))}}}
        ],
        "optimizer": {"nu": {"dense": {"weight": jnp.ones((8, 4))}}},
    }
    plan = daq.plan(tree, rules=getattr(daq, f"{rules}_RULES"))
    assert {leaf.decision.why for leaf in plan.leaves.values()} == {"state of an optimizer"}


def test_a_model_is_preferred_to_what_stands_beside_it(tmp_path):
    saved(tmp_path, [1], model_params=weights, a_state=lambda step: {"mu": jnp.ones((3, 3))})
    assert set(daq.load_weights(tmp_path / "1")) == {"mlp"}
    assert set(daq.load_weights(tmp_path / "1" / "a_state")) == {"mu"}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.mlp = nnx.Linear(32, 48, rngs=rngs)

    def __call__(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("form", ["value", "params", "value below params"])
def test_weights_of_a_checkpoint_go_into_a_template_and_into_a_model(form, tmp_path):
    def make(step):
        inner = weights(step)
        if "value" in form:
            inner = jax.tree.map(lambda x: {"value": x}, inner)
        return {"params": {"params": inner}, "opt_state": {"mu": inner}} if "params" in form else inner

    model = Model(nnx.Rngs(0))
    saved(tmp_path, [1], items=make)
    want = nnx.state(model)
    for template in (want, nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))):
        found = daq.load_weights(tmp_path, template)
        assert type(found) is type(want)
        np.testing.assert_array_equal(found["mlp"]["kernel"][...], weights(1)["mlp"]["kernel"])
    loaded = daq.load_weights(tmp_path)
    q = daq.quantize(loaded, loaded, RECIPE)
    x = jnp.ones((2, 32))
    wanted = x @ daq.quantize(weights(1), weights(1), RECIPE)["mlp"]["kernel"].dequantize()
    np.testing.assert_allclose(daq.nnx_with(model, q)(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_template_that_is_found_twice_is_named(tmp_path):
    saved(tmp_path, [1], items=lambda step: {"params": weights(0), "ema": weights(1)})
    with pytest.raises(daq.DaqError, match=r"below 'ema/' and below 'params/'.*only='\^params/'"):
        daq.load_weights(tmp_path, weights(0))
    found = daq.load_weights(tmp_path, weights(0), only="^ema/")
    np.testing.assert_array_equal(found["mlp"]["kernel"], weights(1)["mlp"]["kernel"])


def test_the_reason_of_orbax_is_passed_on(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(daq.DaqError, match=r"Orbax says: .*No valid PyTree|Orbax says: Could not recognize"):
        daq.load_weights(tmp_path / "x")


def test_paths_are_aligned_where_most_of_them_are_found():
    assert aligned(["p/a/value", "p/b/value", "b/value"], ["a", "b"]) == {"a": "p/a/value", "b": "p/b/value"}
    assert aligned(["a", "m/a"], ["a", "c"]) == {"a": "a"}
    assert aligned(["x"], ["a"]) == {}
    assert aligned([""], [""]) == {"": ""}


@pytest.mark.slow
def test_the_roots_of_two_runs_are_quantized(run, tmp_path):
    tuned = saved(tmp_path / "tuned", [7], items=lambda step: state(3))
    report = daq.quantize_folder(run / "2", tuned, tmp_path / "out", daq.recipes.absmax, memory_gb=4)
    assert report["quantized"] == ["params/mlp/kernel"]
    found = daq.load(tmp_path / "out")
    np.testing.assert_array_equal(found["opt_state"][0]["mu"]["mlp"]["kernel"], 0)
    wanted = daq.quantize(weights(2), weights(3), daq.recipes.absmax)["mlp"]["kernel"]
    np.testing.assert_array_equal(found["params"]["mlp"]["kernel"].codes, wanted.codes)
