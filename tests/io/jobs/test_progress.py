"""What is told while a job runs: the tensor at hand, and which of its shapes is being compiled."""

import io
import re

import numpy as np
from rich.console import Console

import daq_jax as daq
from daq_jax.io.jobs import progress
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
    with progress.progress_on(console, 1000) as running:
        running.tell("layers[0] (compiling shape 1 of 2)", 0, None)
    assert "layers[0] (compiling shape 1 of 2)" in said.getvalue()


def test_nothing_is_estimated_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    said = io.StringIO()
    with progress.progress_on(Console(file=said, width=200), 1000) as running:
        running.tell("w[1]", 0, None)
        running.tell("w[1]", 500, None)
    first, second = said.getvalue().splitlines()
    assert first == "0% of 0.00 MB, w[1]"
    assert "s left" in second
