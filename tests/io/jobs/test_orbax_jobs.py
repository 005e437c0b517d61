"""Orbax checkpoints quantized leaf by leaf: what `load` gives is what `quantize` gives in memory."""

import contextlib
import dataclasses
import fcntl

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from rich.console import Console

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.jobs.options import Output, Run, in_layout
from daq_jax.io.jobs.orbax import open_orbax_job
from daq_jax.rules import rules_called
from tests import stores

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


@contextlib.contextmanager
def opened(pair, tmp_path):
    """The job of `run` in small units; a test may replace its store."""
    out, console = tmp_path / "out", Console(quiet=True)
    recipe = in_layout(ABSMAX, Output().layout)
    with open_orbax_job(*pair, out, recipe, Output(), Run(memory_gb=4), console, unit_bytes=2**16) as job:
        yield job


@pytest.mark.slow
@pytest.mark.parametrize("written", [False, True], ids=["before it is written", "before it is recorded"])
def test_the_same_call_goes_on_where_it_stopped(written, pair, trees, tmp_path):
    with opened(pair, tmp_path) as job:
        assert len(job.units) > 3
        stopped = stores.Stopped(job.store, at=3, error=KeyboardInterrupt, written=written)
        with pytest.raises(KeyboardInterrupt):
            dataclasses.replace(job, store=stopped).run()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="begun with other inputs"):
        run(pair, tmp_path, target="blackwell")
    with opened(pair, tmp_path) as job:
        job.run()
    assert_same(daq.load(tmp_path / "out"), daq.quantize(*trees, ABSMAX))
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out"]


def test_a_job_stopped_after_its_last_leaf_is_completed_by_the_same_call(pair, trees, tmp_path):
    with opened(pair, tmp_path) as job, pytest.raises(KeyboardInterrupt):
        dataclasses.replace(job, store=stores.Unreported(job.store)).run()
    assert not (tmp_path / "out").exists()  # nothing loads before all of it was read back
    with opened(pair, tmp_path) as job:
        report = dataclasses.replace(job, store=stores.Stopped(job.store, at=1, error=AssertionError)).run()
    assert report["total"]["elements"] == 2 * 128 * 256 + 128 * 128
    assert_same(daq.load(tmp_path / "out"), daq.quantize(*trees, ABSMAX))
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out"]


def test_a_leaf_that_another_process_is_writing_is_left_to_it(pair, tmp_path):
    with opened(pair, tmp_path) as job:
        stopped = stores.Stopped(job.store, at=2, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            dataclasses.replace(job, store=stopped).run()
        with open(job.store.journal / "00001.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match="another process is at work on 00001"):
                job.run()


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
    "words",
    [
        ["--shard", "1/2"],
        ["--tp", "2"],
        ["--base-dtype", "float32"],
        ["--custom-code"],
        ["--keep", "x"],
        ["--only", "x"],
    ],
    ids=str,
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


RULES_FILE = """
then = "tunix"

[[rule]]
keep = "bias"

[[rule]]
use = "attention/query/kernel$"
matrix = [[0], [1, 2]]
"""


def test_the_command_takes_rules_by_name_and_from_a_file(pair, tmp_path, capsys):
    words = ["quantize", *map(str, pair), str(tmp_path / "out"), "--recipe", "absmax", "--memory", "4"]
    file = tmp_path / "rules.toml"
    file.write_text(RULES_FILE + '[[rule]]\nkeep = "layers/0"\n')
    assert cli.main([*words, "--rules", "maxtext", "--plan"]) == 0
    assert "3 of 7 leaves are quantized" in capsys.readouterr().out
    assert cli.main([*words, "--rules", str(file), "--plan"]) == 0
    assert "2 of 7 leaves are quantized" in capsys.readouterr().out
    assert cli.main([*words, "--rules", "mixtext"]) == 1
    assert (
        "needed one of default, maxtext, tunix, gemma, hf, keras, or a TOML file" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("then =", "is no TOML"),
        ('then = "flax"', "got 'flax'"),
        ("rules = 1", r"got \['rules'\]"),
        ('[[rule]]\nuse = "x"\naxes = 1', "rule 1 is {'use': 'x', 'axes': 1}; needed"),
        ('[[rule]]\nkeep = "("', r"rule 1: `\(` is not a regular expression"),
        ('[[rule]]\nuse = "x"\nmatrix = [0]', "rule 1 is .*maybe `matrix = "),
    ],
)
def test_a_file_of_rules_that_makes_no_sense_is_refused(text, match, tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(daq.DaqError, match=match):
        rules_called(str(file))


def test_rules_of_a_file_stand_before_the_set_that_it_names(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(RULES_FILE)
    first, second, *others = rules_called(str(file))
    assert (first, second) == (daq.keep("bias"), daq.use("attention/query/kernel$", matrix=((0,), (1, 2))))
    assert tuple(others) == daq.TUNIX_RULES
