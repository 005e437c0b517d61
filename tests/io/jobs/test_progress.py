"""What is told while a job runs: the tensor at hand, and which of its shapes is being compiled."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax.io.jobs import progress
from daq_jax.io.jobs.options import Output, Run
from daq_jax.io.jobs.quantize_folders import open_job
from tests.hf_folders import CONFIG, write_folder

NAMES = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(3) for kind in ("o", "q")]


def folders(path):
    rng = np.random.default_rng(0)
    shapes = {name: (128, 256 if ".o_" in name else 128) for name in NAMES}
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = {name: (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32) for name, x in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        # Two files, so that the second finds what the first has compiled.
        halves = [{n: tensors[n] for n in NAMES[:3]}, {n: tensors[n] for n in NAMES[3:]}]
        write_folder(path / name, halves, CONFIG)
    return path / "base", path / "tuned", path / "out"


def test_each_shape_is_said_to_be_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    said = io.StringIO()
    daq.quantize_folder(*folders(tmp_path), daq.recipes.absmax, console=Console(file=said, width=300))
    found = re.findall(r"(\S+) \(compiling shape (\d) of (\d)\)", said.getvalue())
    # A line may tell again what is at hand, while the tensor before it is written.
    assert list(dict.fromkeys(found)) == [(NAMES[0], "1", "2"), (NAMES[1], "2", "2")]
    assert all(name in said.getvalue() for name in NAMES)
    assert "100% of" in said.getvalue()


def test_a_bar_names_the_tensor_at_hand():
    said = io.StringIO()
    console = Console(file=said, width=200, force_terminal=True)
    with progress.progress_on(console, 1000, progress.Expected(1000, 2)) as running:
        running.begin("layers[0]", 500, 1)
    assert "layers[0] (compiling shape 1 of 2)" in said.getvalue()


def test_several_shapes_that_are_compiled_at_once_are_counted():
    running = progress.Running(1000, lambda _: None, progress.Expected(1000, 5))
    running.begin("a", 400, 1)
    running.begin("b", 600, 3)
    assert running.words == "b (compiling shapes 2 to 4 of 5)"


def test_a_job_that_goes_on_expects_what_is_left_of_it(tmp_path):
    base, tuned, out = folders(tmp_path)
    with open_job(
        base, tuned, out, daq.recipes.absmax, Output("fp8-channel"), Run(), Console(quiet=True)
    ) as job:
        first, second = job.units
        whole, later = job.store.expected([first, second]), job.store.expected([second])
    # Of float32 weights, three have 128 x 256 and three 128 x 128.
    assert whole == (4 * 3 * (128 * 256 + 128 * 128), 2)
    assert 0 < later.nbytes < whole.nbytes


def test_an_orbax_job_says_which_shapes_it_compiles(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a": (128, 256), "b": (128, 128), "c": (128, 256)}
    base = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    tuned = {name: {"kernel": 1.01 * leaf["kernel"]} for name, leaf in base.items()}
    daq.save(tmp_path / "base", base)
    daq.save(tmp_path / "tuned", tuned)
    said = io.StringIO()
    console = Console(file=said, width=300, force_terminal=True)
    paths = (tmp_path / name for name in ("base", "tuned", "out"))
    daq.quantize_folder(*paths, daq.recipes.absmax, console=console)
    assert "c/kernel (compiling shapes 1 to 2 of 2)" in said.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_of_a_bar_is_cut(width):
    said = io.StringIO()
    console = Console(file=said, width=width, force_terminal=True, color_system=None)
    with progress.progress_on(console, 5 * 10**9, progress.Expected(4 * 10**9, 0)) as running:
        for _ in range(4):
            running.begin("model.layers.10.self_attn.v_proj.weight", 10**9, 0)
            running.tell("model.layers.10.self_attn.v_proj.weight", 10**9, None)
    last = said.getvalue()
    assert "…" not in last
    assert "80%" in last
    assert "about 1 s left" in last
    assert "model.layers.10.self_attn.v_proj.weight" in last


def test_lines_elsewhere_are_whole_and_the_first_comes_at_once():
    said = io.StringIO()
    name = "model.layers.10.self_attn.v_proj.weight" * 3
    with progress.progress_on(Console(file=said, width=80), 1000) as running:
        running.begin(name, 1000, 0)
        assert said.getvalue() == f"0% of 0.00 MB, {name}\n"
