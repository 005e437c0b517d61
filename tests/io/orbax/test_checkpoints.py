"""Orbax checkpoints: bit for bit there and back, onto other meshes, and never half of a tree."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import daq_jax as daq
from daq_jax.formats import FORMATS, SmallFloat
from daq_jax.tilings import TileView
from tests.cases import BF16, DTYPES, LAYERS, assert_same_bits, is_qtensor, pair, rng_for, slow_after

TILINGS = (daq.Block(16, 32), daq.Channel(), daq.PerTensor(), daq.Group(16))
BASE, TUNED = (jnp.asarray(x) for x in pair("checkpoints", (32, 64)))
WEIGHT = daq.quantize(BASE, TUNED, daq.Recipe(tiling=daq.Block(16, 16)))


def mesh_of(shape, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, ("x", "y")[: len(shape)], (axis_type,) * len(shape))


def weight(number, tiling, dtype=BF16, shape=(32, 64), matrix=((-2,), (-1,))):
    """A QTensor of codes and scales drawn at random."""
    rng = rng_for(f"{number.name} {tiling}")
    codes = number.encode(number.round(jnp.asarray(rng.normal(0, 3, shape), jnp.float32)))
    scale = jnp.asarray(rng.uniform(0.1, 1, TileView(shape, matrix, tiling).grid), jnp.float32)
    return daq.QTensor(codes, scale, number, tiling, dtype, matrix)


def every_kind():
    """A weight of every format in every tiling, in every dtype, and one in another layout."""
    tree = {f"{name} {type(t).__name__}": weight(f, t) for name, f in FORMATS.items() for t in TILINGS}
    tree |= {name: weight(daq.fp8_e4m3fn, daq.Block(), dtype) for name, dtype in DTYPES.items()}
    shape, matrix = LAYERS["maxtext scanned query"]
    return tree | {"scanned": weight(daq.int8, daq.Block(8, 8), BF16, shape, matrix)}


# --- There and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axis_type",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=["Auto", "Explicit"],
)
def test_every_format_and_tiling_returns_bit_for_bit_onto_another_mesh(tmp_path, axis_type):
    tree = every_kind()
    sharding = NamedSharding(mesh_of((2, 4)), P("x", "y"))
    spread = dict(tree)
    for name in tree.keys() - {"scanned"}:
        shapes = jax.tree.map(lambda _: sharding, tree[name].codes)
        spread[name] = dataclasses.replace(tree[name], codes=jax.device_put(tree[name].codes, shapes))
    daq.save(tmp_path / "q", spread)
    assert_same_bits(daq.load(tmp_path / "q"), tree)
    other = NamedSharding(mesh_of((8,), axis_type), P(None, "x"))
    loaded = daq.load(tmp_path / "q", sharding=other)
    assert_same_bits(loaded, tree)
    assert loaded["int8 Channel"].codes.sharding == other
    assert loaded["int8 Channel"].scale.sharding.spec == P(None, "x")  # with their tiles
    assert loaded["int8 PerTensor"].scale.sharding.is_fully_replicated
    assert loaded["scanned"].codes.sharding.is_fully_replicated  # 3 layers do not fit on 8 devices


TREES = {
    "bare": (WEIGHT, WEIGHT),
    "array": (BASE, BASE),
    "lists": ([{"a": WEIGHT}, (TUNED, None)], [{"a": WEIGHT}, [TUNED, None]]),
    "whole keys": ({0: WEIGHT, 1: {2: TUNED}}, {0: WEIGHT, 1: {2: TUNED}}),
    "dotted names": ({"model.0.weight": WEIGHT, "a/b": TUNED}, {"model.0.weight": WEIGHT, "a/b": TUNED}),
    "nnx.State": (nnx.State({"l": {0: {"kernel": nnx.Param(WEIGHT)}}}), {"l": {0: {"kernel": WEIGHT}}}),
    "nn.Partitioned": ({"kernel": nn.Partitioned(WEIGHT, names=("a", "b"))}, {"kernel": WEIGHT}),
    "numbers": (
        {"step": 3, "rate": 0.5, "name": "x", "w": BASE},
        {"step": 3, "rate": 0.5, "name": "x", "w": BASE},
    ),
    "no elements": ({"w": WEIGHT, "none": jnp.zeros((0, 4))}, {"w": WEIGHT, "none": jnp.zeros((0, 4))}),
    "nothing": ({}, {}),
    "NumPy": ({"w": np.arange(6.0), "n": np.int32(3)}, {"w": np.arange(6.0), "n": np.int32(3)}),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_returns_with_and_without_a_template(tmp_path, name):
    tree, plain = TREES[name]
    daq.save(tmp_path / "q", tree)
    assert_same_bits(daq.load(tmp_path / "q"), plain)
    assert_same_bits(daq.load(tmp_path / "q", tree), tree)


@pytest.mark.parametrize("tiling", slow_after(1, [daq.Group(16), daq.Channel()]), ids=["group", "channel"])
def test_zeros_return_bit_for_bit_with_and_without_a_template_onto_another_mesh(tmp_path, tiling):
    plain = weight(daq.nf4, tiling)
    zero = jnp.asarray(rng_for("zeros").normal(0, 1, plain.scale.shape), jnp.float32)
    tree = {"w": dataclasses.replace(plain, zero=zero), "plain": plain}
    sharding = NamedSharding(mesh_of((2, 4)), P(None, "y"))
    daq.save(tmp_path / "q", jax.device_put(tree, sharding))
    other = NamedSharding(mesh_of((2,)), P(None, "x"))
    into = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other), tree)
    for loaded in (
        daq.load(tmp_path / "q"),
        daq.load(tmp_path / "q", tree),
        daq.load(tmp_path / "q", into),
        daq.load(tmp_path / "q", sharding=other),
    ):
        assert_same_bits(loaded, tree)
        np.testing.assert_array_equal(loaded["w"].dequantize(), tree["w"].dequantize())
    for loaded in (daq.load(tmp_path / "q", into), daq.load(tmp_path / "q", sharding=other)):
        assert {x.sharding for x in jax.tree.leaves(loaded)} == {other}


def test_random_keys_return(tmp_path):
    tree = {"dropout": jax.random.key(7), "several": jax.random.split(jax.random.key(1, impl="rbg"), 3)}
    daq.save(tmp_path / "q", tree)
    for loaded in (daq.load(tmp_path / "q"), daq.load(tmp_path / "q", tree)):
        for name, key in tree.items():
            assert loaded[name].dtype == key.dtype
            assert_same_bits(jax.random.key_data(loaded[name]), jax.random.key_data(key))


def test_a_template_of_plain_parameters_gives_containers_and_shardings(tmp_path):
    sharding = NamedSharding(mesh_of((2, 4)), P("x", "y"))
    model = nnx.State({"layers": {0: {"kernel": nnx.Param(BASE), "bias": nnx.Param(jnp.ones(64))}}})
    q = daq.quantize(model, jax.tree.map(lambda x: x * 1.5, model), daq.recipes.absmax)
    daq.save(tmp_path / "q", q)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding if x.ndim == 2 else None)

    loaded = daq.load(tmp_path / "q", jax.tree.map(abstract, model))
    assert_same_bits(loaded, q)
    kernel = loaded["layers"][0]["kernel"].get_raw_value()
    assert kernel.codes.sharding == sharding
    assert kernel.dtype == jnp.bfloat16  # dtypes are those of the checkpoint


def test_shardings_may_be_a_tree_or_a_function(tmp_path):
    a, b = (NamedSharding(mesh_of((2, 4)), spec) for spec in (P("x"), P(None, "y")))
    daq.save(tmp_path / "q", {"a": WEIGHT, "b": BASE})
    for sharding in ({"a": a, "b": b}, lambda path, shape: {"a": a, "b": b}[path]):
        loaded = daq.load(tmp_path / "q", sharding=sharding)
        assert (loaded["a"].codes.sharding, loaded["b"].sharding) == (a, b)
    with pytest.raises(ValueError, match="'b'"):
        daq.load(tmp_path / "q", sharding={"a": a})


def test_saving_can_go_on_after_the_arrays_are_gone(tmp_path):
    tree = {"w": jax.tree.map(jnp.copy, WEIGHT)}
    response = daq.save(tmp_path / "q", tree, wait=False)
    jax.tree.map(lambda x: x.delete(), tree)
    response.result()
    assert_same_bits(daq.load(tmp_path / "q"), {"w": WEIGHT})


def test_overwriting_is_asked_for(tmp_path):
    daq.save(tmp_path / "q", {"w": BASE})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        daq.save(tmp_path / "q", {"w": WEIGHT})
    daq.save(tmp_path / "q", {"w": WEIGHT}, overwrite=True)
    assert_same_bits(daq.load(tmp_path / "q"), {"w": WEIGHT})


# --- What others wrote --------------------------------------------------------------------------------------


def test_weights_come_from_any_orbax_checkpoint_and_in_part(tmp_path):
    state = {"params": {"w": BASE, "layers": [TUNED]}, "opt": {"mu": jnp.ones((4, 4))}}
    ocp.save(tmp_path / "v1", state)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "v0", state)
    sharding = NamedSharding(mesh_of((2, 4)), P("x", "y"))
    for name in ("v0", "v1"):
        assert_same_bits(daq.load_weights(tmp_path / name), state)
        part = daq.load_weights(tmp_path / name, only="^params/", sharding=sharding)
        assert_same_bits(part, {"params": state["params"]})
        assert part["params"]["w"].sharding == sharding
        template = {"params": {"w": jax.ShapeDtypeStruct((32, 64), jnp.bfloat16, sharding=sharding)}}
        assert_same_bits(daq.load_weights(tmp_path / name, template), {"params": {"w": BASE}})
    with pytest.raises(ValueError, match="no leaf's path matches 'parms'"):
        daq.load_weights(tmp_path / "v1", only="parms")
    daq.save(tmp_path / "ours", {"w": WEIGHT})
    assert_same_bits(daq.load_weights(tmp_path / "ours"), {"w": WEIGHT})


def test_orbax_alone_reads_what_we_save(tmp_path):
    daq.save(tmp_path / "q", {"layer": {"kernel": WEIGHT, "bias": BASE}})
    plain = {"layer": {"kernel": {"codes": WEIGHT.codes, "scale": WEIGHT.scale}, "bias": BASE}}
    assert_same_bits(ocp.load(tmp_path / "q", plain), plain)


# --- Errors -------------------------------------------------------------------------------------------------


def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path):
    mine = SmallFloat("mine", "float8_e4m3fn", 448.0, mantissa_bits=3, min_exponent=-6)
    tree = {
        "fine": WEIGHT,
        "format": dataclasses.replace(WEIGHT, format=mine),
        "object": object(),
        "narrow": jnp.ones((2, 2), jnp.uint4),
        "a.b": BASE,
        "a": {"b": TUNED},
    }
    with pytest.raises(ValueError, match="4 of the leaves cannot be saved") as caught:
        daq.save(tmp_path / "q", tree)
    for name in ("'format'", "'object'", "'narrow'", "'a.b'"):
        assert name in str(caught.value)
    assert "'fine'" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda x: daq.save(tmp_path / "q", {"w": x}))(BASE)


def refused(path, tree) -> str:
    with pytest.raises(daq.DaqError) as caught:
        daq.save(path / "q", tree)
    assert list(path.iterdir()) == []
    return str(caught.value)


def test_deleted_and_masked_arrays_are_named_before_anything_is_written(tmp_path):
    gone, key = jnp.ones((2, 2)), jax.random.key(0)
    codes = dataclasses.replace(WEIGHT, codes=WEIGHT.codes.copy())
    for x in (gone, key, codes.codes):
        x.delete()
    masked = np.ma.masked_array(np.ones(3), [0, 1, 0])
    said = refused(tmp_path, {"fine": BASE, "gone": gone, "key": key, "codes": codes, "masked": masked})
    assert all(f"'{name}'" in said for name in ("gone", "key", "codes", "masked"))
    assert "'fine'" not in said
    assert ".filled(value)" in said


ML_DTYPES = [name for name in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, name), type)]
NUMBERS = [x for x in ML_DTYPES if x not in ("finfo", "iinfo")]
NUMBERS += [*"?bhiqBHIQefdgFDG", ">f4", "U3", "S3", "M8[s]", "V4", "O"]


UNSTORABLE = (
    "bcomplex32 complex32 float6_e2m3fn float6_e3m2fn float8_e4m3 int1 uint1 uint2 uint4 g G U3 S3 M8[s] V4 O"
)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_dtype_returns_or_is_named_before_anything_is_written(tmp_path, name):
    array = np.array([1, 0, 1]).astype(getattr(ml_dtypes, name, name))
    if name in UNSTORABLE.split():
        assert "'w'" in refused(tmp_path, {"w": array})
        return
    daq.save(tmp_path / "q", {"w": array})
    found = daq.load(tmp_path / "q")["w"]
    assert found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(np.asarray(found).astype(complex), array.astype(complex))


def test_dicts_with_bools_for_keys_and_empty_arrays_of_64_bits_return(tmp_path):
    tree = {True: BASE, False: {"empty": np.zeros((0, 3)), "whole": np.zeros((3, 0), np.int64)}}
    daq.save(tmp_path / "q", tree)
    found = daq.load(tmp_path / "q")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )
    np.testing.assert_array_equal(found[True], BASE)


def test_what_is_no_tree_is_refused(tmp_path):
    assert "generator" in refused(tmp_path, (x for x in [BASE]))
    assert "dict_values" in refused(tmp_path, {"all": {"w": BASE}.values()})


def change_metadata(path, change):
    file = path / "_CHECKPOINT_METADATA"
    facts = json.loads(file.read_text())
    change(facts["custom_metadata"])
    file.write_text(json.dumps(facts))


def newer(path):
    change_metadata(path, lambda facts: facts["daq_jax"].update(version=2))


def unknown_format(path):
    change_metadata(path, lambda facts: facts["daq_jax"]["leaves"]["w"].update(format="fp3"))


def tampered(change):
    """A fault that changes the record of the quantized leaf, or all that is ours with `ours`."""
    return lambda path: change_metadata(
        path, lambda facts: change(facts["daq_jax"], facts["daq_jax"]["leaves"]["w"])
    )


TAMPERED = {
    "version is a word": lambda ours, w: ours.update(version="one"),
    "version is true": lambda ours, w: ours.update(version=True),
    "version is 0": lambda ours, w: ours.update(version=0),
    "no version": lambda ours, w: ours.pop("version"),
    "no leaves": lambda ours, w: ours.pop("leaves"),
    "leaves are a list": lambda ours, w: ours.update(leaves=[w]),
    "a leaf is a word": lambda ours, w: ours["leaves"].update(w="x"),
    "a leaf below a leaf": lambda ours, w: ours["leaves"].update(
        v={"kind": "value", "value": 1, "keys": [*w["keys"], ["key", "x"]], "arrays": []}
    ),
    "one place twice": lambda ours, w: ours["leaves"].update(v=w),
    "no kind": lambda ours, w: w.pop("kind"),
    "kind is a number": lambda ours, w: w.update(kind=3),
    "unknown kind": lambda ours, w: w.update(kind="sparse"),
    "kind is key": lambda ours, w: w.update(kind="key"),
    "kind is array": lambda ours, w: w.update(kind="array"),
    "value is a list": lambda ours, w: w.update(kind="value", value=[1]),
    "empty and not empty": lambda ours, w: w.update(kind="empty", shape=[2**40], dtype="float32"),
    "no keys": lambda ours, w: w.pop("keys"),
    "keys are words": lambda ours, w: w.update(keys=["w"]),
    "no arrays": lambda ours, w: w.pop("arrays"),
    "other arrays": lambda ours, w: w.update(arrays=["codes", "codes2"]),
    "no scale": lambda ours, w: w.update(arrays=["codes"]),
    "format is a list": lambda ours, w: w.update(format=["x"]),
    "another format": lambda ours, w: w.update(format="int8"),
    "no tiling": lambda ours, w: w.pop("tiling"),
    "tiling is a word": lambda ours, w: w.update(tiling="Block"),
    "tiling with a word": lambda ours, w: w["tiling"].update(r="x"),
    "tiling of nothing": lambda ours, w: w["tiling"].update(r=0),
    "tiling with more": lambda ours, w: w["tiling"].update(q=1),
    "another tiling": lambda ours, w: w["tiling"].update(r=64),
    "no such dtype": lambda ours, w: w.update(dtype="float99"),
    "dtype of whole numbers": lambda ours, w: w.update(dtype="int32"),
    "matrix of words": lambda ours, w: w.update(matrix=[["x"], ["y"]]),
    "matrix without axes": lambda ours, w: w.update(matrix=[[], [0]]),
    "matrix of other axes": lambda ours, w: w.update(matrix=[[5], [6]]),
    "matrix of three": lambda ours, w: w.update(matrix=[[0], [1], [2]]),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_metadata_is_checked_before_it_is_believed(tmp_path, how):
    path = tmp_path / "q"
    daq.save(path, {"w": WEIGHT, "b": jnp.ones((300, 300))})
    assert set(daq.load(path)) == {"w", "b"}
    tampered(TAMPERED[how])(path)
    with pytest.raises(daq.DaqError) as caught:
        daq.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def foreign(path):
    shutil.rmtree(path)
    ocp.save(path, {"w": BASE})


def no_checkpoint(path):
    shutil.rmtree(path)
    path.mkdir()
    (path / "config.json").write_text("{}")


def uncommitted(path):
    for name in ("commit_success.txt", "_CHECKPOINT_METADATA", "orbax.checkpoint"):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(next(p for p in path.iterdir() if p.is_dir()))


def no_data(path):
    for file in path.glob("*/d/*"):
        file.unlink()
    for file in path.glob("*/ocdbt.process_0/d/*"):
        file.unlink()


def short_data(path):
    for file in (*path.glob("*/d/*"), *path.glob("*/ocdbt.process_0/d/*")):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_tree(path):
    for file in path.glob("*/_METADATA"):
        file.write_text(file.read_text()[:40])


FAULTS = {
    newer: "written in version 2 .* reads up to version 1; upgrade",
    unknown_format: "'w': format 'fp3' .* upgrade",
    foreign: "not written by `daq_jax.save`.*load_weights",
    no_checkpoint: "not an Orbax checkpoint",
    uncommitted: "not an Orbax checkpoint, or one whose saving was cut off",
    no_data: "damaged",
    short_data: "damaged",
    no_tree: "damaged",
    shutil.rmtree: "there is no such checkpoint",
}


# Reads that fail in a thread leave warnings of TensorStore's behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_an_error_says_what_was_found(tmp_path, fault):
    path = tmp_path / "q"
    daq.save(path, {"w": WEIGHT, "b": jnp.ones((300, 300))})
    fault(path)
    with pytest.raises((ValueError, FileNotFoundError), match=FAULTS[fault]) as caught:
        daq.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_fit_is_refused_by_name(tmp_path):
    daq.save(tmp_path / "q", {"same": WEIGHT, "shape": BASE, "gone": BASE, "kind": WEIGHT, "zero": WEIGHT})
    template = {
        "zero": dataclasses.replace(WEIGHT, zero=jnp.zeros_like(WEIGHT.scale)),
        "same": WEIGHT,
        "shape": jnp.ones((2, 3)),
        "new": BASE,
        "kind": dataclasses.replace(WEIGHT, format=daq.int8),
    }
    with pytest.raises(ValueError, match="does not fit") as caught:
        daq.load(tmp_path / "q", template)
    for words in (
        "'shape' is (32, 64)",
        "'gone' is in the checkpoint",
        "'new' is in the template",
        "'kind' is",
        "'zero' is",
    ):
        assert words in str(caught.value)
    assert "'same'" not in str(caught.value)


# --- Killed in mid-save -------------------------------------------------------------------------------------

KILLED = """
import contextlib, os, pathlib, signal, sys, threading, time
import jax.numpy as jnp, numpy as np
import daq_jax as daq
path, enough = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def kill():
    while True:
        with contextlib.suppress(FileNotFoundError):  # Orbax removes files while they are listed
            files = [f for f in path.parent.glob(path.name + ".orbax*/**/*") if f.is_file()]
            if sum(f.stat().st_size for f in files) >= enough and files:
                os.kill(os.getpid(), signal.SIGKILL)

weights = np.random.default_rng(0).normal(size=(24, 1024, 1024)).astype(np.float32)
tree = {str(i): daq.quantize(w, w, daq.recipes.absmax) for i, w in enumerate(weights)}
threading.Thread(target=kill, daemon=True).start()
daq.save(path, tree, overwrite=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("enough", [0, 10_000, 4_000_000])
def test_a_process_killed_while_saving_leaves_nothing_that_loads(tmp_path, enough):
    path = tmp_path / "q"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(enough)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) != []
    with pytest.raises(FileNotFoundError, match=r"cut off and left .*save again"):
        daq.load(path)
    daq.save(path, {"w": WEIGHT})
    assert is_qtensor(daq.load(path)["w"])
    assert pathlib.Path(path).is_dir()
