"""Base and tuned that are swapped, or have nothing to do with each other, are told; others are not."""

import io

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import daq_jax as daq
from daq_jax.analysis import relation
from daq_jax.analysis.relation import doubt_of, doubt_of_leaves
from tests.hf_folders import write_folder

RNG = np.random.default_rng(0)
SHAPE = (256, 1024)
GRIDS = {
    "fp8 block": daq.Recipe(),
    "fp8 channel": daq.Recipe(tiling=daq.Channel()),
    "int8 channel": daq.Recipe(format=daq.int8, tiling=daq.Channel()),
    "mxfp4": daq.Recipe(format=daq.fp4_e2m1, tiling=daq.Group(32), scales=daq.PowerOfTwo()),
    "int4 group": daq.Recipe(format=daq.int4, tiling=daq.Group(32)),
    "nf4 group": daq.Recipe(format=daq.nf4, tiling=daq.Group(64)),
}


def weights(shape=SHAPE):
    return (0.02 * RNG.normal(size=shape)).astype(np.float32)


def native(grid, dtype=np.float32):
    """Weights on a grid, with inputs along the last axis, as in a folder."""
    w = {"w": weights()}
    q = daq.quantize(w, w, GRIDS[grid], rules=[daq.use("", matrix=((1,), (0,)))])
    return np.asarray(q["w"].dequantize(dtype))


def near(base, size=0.02):
    change = RNG.normal(size=base.shape) * size * np.std(base.astype(np.float32))
    return (base.astype(np.float32) + change).astype(base.dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_native_base_in_the_place_of_the_tuned_model_is_told(grid, dtype):
    base = native(grid, dtype)
    tuned = near(base)
    right, swapped = ((x.astype(np.float32), y.astype(np.float32)) for x, y in ((base, tuned), (tuned, base)))
    assert doubt_of([right]) == ""
    assert "swapped" in doubt_of([swapped])
    assert "swapped" in doubt_of([(swapped[0].T, swapped[1].T)])


@pytest.mark.parametrize("size", [0, 1e-4, 0.06, 0.3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_fresh_base_and_its_tune_raise_no_doubt(size, dtype):
    base = weights().astype(dtype)
    assert doubt_of([(base.astype(np.float32), near(base, size).astype(np.float32))]) == ""


def test_a_tune_of_low_rank_that_is_as_large_as_the_weights_raises_no_doubt():
    base = weights()
    change = RNG.normal(size=(256, 4)) @ RNG.normal(size=(4, 1024))
    tuned = base + change * np.linalg.norm(base) / np.linalg.norm(change)
    assert doubt_of([(base, tuned.astype(np.float32))]) == ""


def test_two_models_that_were_drawn_apart_are_told():
    said = doubt_of([(weights(), weights()) for _ in range(3)])
    assert "unrelated" in said
    assert "14" in said  # sqrt(2) of the weights, in per cent
    layers = [(x, near(x)) for x in (weights(), weights())]
    assert doubt_of([*layers, (weights(), weights())]) == ""  # one layer that was trained anew


def test_small_and_empty_leaves_say_nothing():
    few = np.ones((4, 4), np.float32)
    assert (
        doubt_of([])
        == doubt_of([(few, -few)])
        == doubt_of([(np.zeros((64, 64), np.float32), weights()[:64, :64])])
        == ""
    )


def test_compare_says_it_above_its_table_and_in_its_dictionary():
    base = {"k": native("fp8 block")}
    tuned = {"k": near(base["k"])}
    with pytest.warns(daq.UnlikelyPairWarning, match="swapped"):
        q = daq.quantize(tuned, base, daq.recipes.absmax)
    wrong = daq.compare(tuned, base, q)
    assert repr(wrong).startswith("Base and tuned may be swapped")
    assert "swapped" in wrong.to_dict()["doubt"]
    right = daq.compare(base, tuned, daq.quantize(base, tuned, daq.recipes.absmax))
    assert right.doubt == ""
    assert "doubt" not in right.to_dict()


def test_sharded_trees_are_looked_at_on_one_device():
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Explicit,))
    here = NamedSharding(mesh, PartitionSpec("x", None))
    base = {"k": jax.device_put(native("fp8 block"), here)}
    tuned = {"k": jax.device_put(near(np.asarray(base["k"])), here)}
    with pytest.warns(daq.UnlikelyPairWarning):
        q = daq.quantize(tuned, base, daq.recipes.absmax)
    assert "swapped" in daq.compare(tuned, base, q).doubt
    apart = {"k": jax.device_put(base["k"], NamedSharding(mesh, PartitionSpec(None, "x")))}
    assert daq.compare(apart, tuned, q).doubt == ""


def test_a_comparison_with_a_doubt_can_be_exported_under_a_trace():
    base, tuned = {"k": jnp.asarray(weights((128, 128)))}, {"k": jnp.asarray(weights((128, 128)))}
    q = jax.jit(daq.quantize, static_argnums=2)(base, tuned, daq.recipes.absmax)
    assert jax.jit(daq.compare)(base, tuned, q).doubt == ""


def test_folders_that_have_nothing_to_do_with_each_other_are_told_in_the_plan(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    for folder in ("base", "tuned"):
        tensors = {name: weights((256, 256)).astype(ml_dtypes.bfloat16) for name in names}
        write_folder(tmp_path / folder, [tensors])
    shown = Console(file=io.StringIO(), width=200)
    daq.quantize_folder(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", daq.recipes.absmax, console=shown
    )
    assert "These two models look unrelated" in shown.file.getvalue()
    found = daq.compare_folders(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert "unrelated" in found.doubt


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_passed_over(bad):
    base = weights()
    tuned = near(base)
    tuned[3, 5] = bad
    assert doubt_of([(base, tuned)]) == ""
    assert "unrelated" in doubt_of([(base, tuned), (weights(), weights())])


def test_quantize_warns_once_in_each_call():
    base, tuned = {"a": weights(), "b": weights()}, {"a": weights(), "b": weights()}
    for _ in range(2):
        with pytest.warns(daq.UnlikelyPairWarning, match="look unrelated: the change is 14[0-9]%") as told:
            daq.quantize(base, tuned, daq.recipes.absmax)
        assert len(told) == 1
    daq.quantize(base, {k: near(x) for k, x in base.items()}, daq.recipes.absmax)
    daq.quantize(base, tuned, rules=[daq.keep("")])


def test_trees_are_told_apart_by_their_arrays_and_not_kept_alive():
    base = {"k": jnp.asarray(weights())}
    for _ in range(3 * relation._MOST_KNOWN):  # the next array often takes the place of the last
        assert doubt_of_leaves(base, {"k": jnp.asarray(near(np.asarray(base["k"])))}) == ""
        assert "unrelated" in doubt_of_leaves(base, {"k": jnp.asarray(weights())})
    assert len(relation._known) <= relation._MOST_KNOWN
    there = len(jax.live_arrays())
    doubt_of_leaves(base, {"k": jnp.asarray(weights())})
    assert len(jax.live_arrays()) == there
