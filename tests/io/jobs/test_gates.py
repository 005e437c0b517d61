"""The gate of `daq-jax compare --fail-under`: bounds on totals and on the worst weight, of a whole model."""

import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

import daq_jax as daq
from daq_jax import cli
from tests.hf_folders import BF16, normal, read_tensors, write_folder

NORM = "model.norm.weight"
NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[pathlib.Path]:
    """Base, tuned and quantized folders; the change is large in one weight and small in the other."""
    path = tmp_path_factory.mktemp("gate")
    norm = {NORM: np.linspace(0.5, 2, 96, dtype=np.float32)}
    base = {name: (0.02 * normal(i, 128, 256)).astype(BF16) for i, name in enumerate(NAMES)} | norm
    tuned = dict(base)
    for i, (name, size) in enumerate(zip(NAMES, (0.02, 0.002), strict=True)):
        tuned[name] = (base[name].astype(np.float32) + size * normal(9 + i, 128, 256)).astype(BF16)
    folders = [write_folder(path / "base", [base]), write_folder(path / "tuned", [tuned]), path / "out"]
    daq.quantize_folder(*folders, daq.recipes.absmax, memory_gb=2)
    return folders


def judge(capsys, folders, floor: str) -> tuple[int, str]:
    status = cli.main(["compare", *map(str, folders), "--fail-under", floor])
    return status, capsys.readouterr().err


def test_a_bound_on_the_worst_weight_names_it(made, capsys):
    leaves = daq.compare_folders(*made).leaves
    lowest, best = (float(leaves[name].cosine) for name in reversed(NAMES))
    assert lowest < best
    status, said = judge(capsys, made, f"worst.cosine={lowest - 1e-6}")
    assert (status, "the gate is met: worst.cosine is " in said) == (0, True)
    status, said = judge(capsys, made, f"cosine=0,worst.cosine={lowest + 1e-6}")
    assert (status, repr(NAMES[1]) in said) == (1, True)
    status, said = judge(capsys, made, f"worst.lost={float(leaves[NAMES[1]].lost) - 1e-6}")
    assert (status, "needed at most" in said) == (1, True)


FAULTS = {
    "missing": lambda x: None,
    "zero": np.zeros_like,
    "reversed": lambda x: x[::-1].copy(),
    "one bit": lambda x: np.where(np.arange(96) == 7, np.nextafter(x, np.float32(9)), x),
    "codes": lambda x: x.astype(np.uint8),
    "other shape": lambda x: x[:-1].copy(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_not_quantized_must_be_there_unaltered(fault, made, tmp_path, capsys):
    stored = read_tensors(made[2])
    changed = FAULTS[fault](stored.pop(NORM))
    rewrite(made[2], tmp_path / "out", stored if changed is None else stored | {NORM: changed})
    status, said = judge(capsys, [*made[:2], tmp_path / "out"], "projection=-9")
    assert status == 1
    assert f"is not whole: {NORM!r} is" in said
    assert cli.main(["compare", *map(str, [*made[:2], tmp_path / "out"])]) == 0  # there is no gate


def test_a_tensor_may_be_rounded_to_a_narrower_dtype(made, tmp_path, capsys):
    stored = read_tensors(made[2])
    rewrite(made[2], tmp_path / "out", stored | {NORM: stored[NORM].astype(BF16)})
    assert judge(capsys, [*made[:2], tmp_path / "out"], "projection=-9")[0] == 0


def test_what_cannot_be_judged_has_a_status_of_its_own(made, tmp_path, capsys):
    status, said = judge(capsys, [*made[:2], made[1]], "projection=0.9")
    assert (status, "holds no quantized weight" in said) == (3, True)
    assert judge(capsys, [*made[:2], tmp_path / "nowhere"], "projection=0.9")[0] == 3
    assert cli.main(["compare", *map(str, made[:2]), str(tmp_path / "nowhere")]) == 1


def rewrite(folder: pathlib.Path, to: pathlib.Path, tensors) -> None:
    shutil.copytree(folder, to)
    safetensors.numpy.save_file(tensors, to / "model.safetensors", {"format": "pt"})
