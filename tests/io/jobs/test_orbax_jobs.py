"""Orbax checkpoints quantized leaf by leaf: what `load` gives is what `quantize` gives in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.jobs import orbax

ABSMAX = daq.recipes.absmax


def tree(seed: int) -> dict:
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def normal(*shape: int) -> jax.Array:
        return (0.02 * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

    layers = [{"kernel": normal(128, 256), "bias": normal(256)} for _ in range(2)]
    attention = {"query": {"kernel": normal(128, 4, 32)}}
    return {
        "params": {"layers": layers, "attention": attention, "embed": normal(8, 128)},
        "step": jnp.int32(3),
    }


@pytest.fixture
def trees() -> tuple[dict, dict]:
    base, moved = tree(0), tree(1)
    tuned = jax.tree.map(lambda a, b: a + (0.02 * b).astype(a.dtype) if a.ndim else a, base, moved)
    return base, tuned


@pytest.fixture
def pair(trees, tmp_path):
    for word, x in zip(("base", "tuned"), trees, strict=True):
        ocp.save(tmp_path / word, x)
    return tmp_path / "base", tmp_path / "tuned"


def run(pair, tmp_path, **options) -> dict:
    return daq.quantize_folder(*pair, tmp_path / "out", ABSMAX, memory_gb=4, **options)


def assert_same(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_load_gives_what_quantize_gives_in_memory(pair, trees, tmp_path):
    report = run(pair, tmp_path)
    wanted = daq.quantize(*trees, ABSMAX)
    assert_same(daq.load(tmp_path / "out"), wanted)
    total = daq.compare(*trees, wanted).total.to_dict()
    assert report["total"].pop("counts") == total.pop("counts")
    assert report["total"] == pytest.approx(total, rel=1e-6)
    assert run(pair, tmp_path)["fingerprint"] == report["fingerprint"]  # complete: nothing to do
    assert sorted(p.name for p in tmp_path.glob("*daq*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before it is written", "before it is recorded"])
def test_the_same_call_goes_on_where_it_stopped(where, pair, trees, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "_GROUP", 2**16)
    calls = []

    def stop(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    name = "quantize" if where == "before it is written" else "write_text"
    original = getattr(orbax, name)
    monkeypatch.setattr(orbax, name, stop)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="begun with other inputs"):
        run(pair, tmp_path, target="blackwell")
    run(pair, tmp_path)
    assert_same(daq.load(tmp_path / "out"), daq.quantize(*trees, ABSMAX))


@pytest.mark.slow
def test_a_quantized_base_and_a_missing_one(pair, trees, tmp_path):
    q = daq.quantize(trees[0], trees[0], ABSMAX)
    del q["params"]["attention"]
    daq.save(tmp_path / "q", q)
    with pytest.raises(ValueError, match=r"'params/attention/query/kernel': base is") as caught:
        run((tmp_path / "q", pair[1]), tmp_path)
    assert "\n" not in str(caught.value)
    run((tmp_path / "q", pair[1]), tmp_path, missing_base="absmax")
    q["params"]["attention"] = trees[1]["params"]["attention"]
    assert_same(daq.load(tmp_path / "out"), daq.quantize(q, trees[1], ABSMAX))


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["", "plan"])
@pytest.mark.parametrize(
    "words", [["--shard", "1/2"], ["--tp", "2"], ["--base-dtype", "float32"], ["--custom-code"]], ids=str
)
def test_options_without_effect_are_refused_by_name(words, plan, pair, tmp_path, capsys):
    folders = [*map(str, pair), str(tmp_path / "out")]
    assert cli.main(["quantize", *folders, *words, *plan]) == 1
    err = capsys.readouterr().err
    assert f"with Orbax checkpoints {words[0]} (" in err
    assert "leave it out, or pass Hugging Face folders" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_writes_nothing_and_one_kind_takes_the_same(pair, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert len(run(pair, tmp_path, plan_only=True)["quantized"]) == 3
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="needed two of a kind"):
        run((pair[0], tmp_path / "hf"), tmp_path)
