"""A base by other names than its tune: paired where the names leave no doubt, and told otherwise."""

import io
import pathlib

import numpy as np
import pytest
from rich.console import Console

import daq_jax as daq
from tests.hf_folders import BF16, CONFIG, Tensors, llama, normal, stored, tuned_from, write_folder

ABSMAX = daq.recipes.absmax
BLOCK = "model.layers.0.mlp.experts."
SINGLE = {
    f"{BLOCK}{i}.{k}_proj.weight": (0.02 * normal(10 * i + j, 128, 128)).astype(BF16)
    for i in range(2)
    for j, k in enumerate(("gate", "up", "down"))
}


def fused(tensors: Tensors) -> Tensors:
    up = [np.concatenate([tensors[f"{BLOCK}{i}.{k}_proj.weight"] for k in ("gate", "up")]) for i in range(2)]
    down = [tensors[f"{BLOCK}{i}.down_proj.weight"] for i in range(2)]
    return {f"{BLOCK}gate_up_proj": np.stack(up), f"{BLOCK}down_proj": np.stack(down)}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + n.removeprefix(old) if n.startswith(old) else n: x for n, x in tensors.items()}


def folders(path: pathlib.Path, base: Tensors, tuned: Tensors, **config) -> tuple[pathlib.Path, pathlib.Path]:
    path.mkdir(exist_ok=True)
    return (
        write_folder(path / "base", [base], CONFIG | config),
        write_folder(path / "tuned", [tuned], CONFIG | config),
    )


def run(pair, out, **options) -> dict:
    return daq.quantize_folder(*pair, out, ABSMAX, memory_gb=2, **options)


PREFIXES = [
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.", "transformer."),
    ("model.", ""),
    ("model.", "llama."),
]


@pytest.mark.parametrize(("old", "new"), PREFIXES)
@pytest.mark.parametrize("whose", ["base", "tuned"])
def test_a_prefix_is_paired_and_told(old, new, whose, tmp_path):
    base = llama(layers=1)
    tuned = tuned_from(base)
    plain = run(folders(tmp_path / "plain", base, tuned), tmp_path / "plain_out")
    base = renamed(base, old, new) if whose == "base" else base
    tuned = tuned if whose == "base" else renamed(tuned, old, new)
    pair = folders(tmp_path / "other", base, tuned)
    said = io.StringIO()
    report = run(pair, tmp_path / "out", console=Console(file=said, width=200))
    assert report["total"]["counts"] == plain["total"]["counts"]
    assert report["quantized"].keys() <= tuned.keys()
    assert set(report["base_names"]) == set(tuned) - set(base)
    assert set(report["base_names"].values()) == set(base) - set(tuned)
    assert "have another name in base" in said.getvalue()
    found = daq.compare_folders(*pair, tmp_path / "out").total.to_dict()
    assert found["projection"] == pytest.approx(report["total"]["projection"], rel=1e-3)
    assert daq.inspect_folder(*pair, ABSMAX).leaves.keys() == report["quantized"].keys()


@pytest.mark.parametrize("whose", ["base", "tuned"])
def test_experts_fused_on_one_side_are_paired(whose, tmp_path):
    tuned = tuned_from(SINGLE)
    both = (fused(SINGLE), tuned) if whose == "base" else (SINGLE, fused(tuned))
    alike = (SINGLE, tuned) if whose == "base" else (fused(SINGLE), fused(tuned))
    report = run(folders(tmp_path / "other", *both), tmp_path / "out")
    plain = run(folders(tmp_path / "plain", *alike), tmp_path / "plain_out")
    assert report["quantized"].keys() == both[1].keys()
    assert report["base_names"].keys() == both[1].keys()
    assert stored(tmp_path / "out") == stored(tmp_path / "plain_out")
    assert report["leaves"] == plain["leaves"]


def test_names_that_leave_a_doubt_are_told_and_not_paired(tmp_path):
    base = {n: x for n, x in llama(layers=1).items() if "layers" in n}
    twice = renamed(base, "model.", "language_model.model.") | renamed(base, "model.", "transformer.")
    tuned = renamed(tuned_from(base), "model.", "model.language_model.")
    with pytest.raises(daq.DaqError, match="Names differ: base has"):
        run(folders(tmp_path / "twice", twice, tuned), tmp_path / "out")
    interleaved = folders(tmp_path / "oss", SINGLE, fused(tuned_from(SINGLE)), model_type="gpt_oss")
    with pytest.raises(daq.DaqError):
        run(interleaved, tmp_path / "out")
    other = {n: normal(1, 64, 64).astype(BF16) for n in base if n.endswith("_proj.weight")}
    with pytest.raises(daq.DaqError, match=r"Names differ|is missing"):
        run(folders(tmp_path / "shapes", other, tuned), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_renamed_where_all_names_agree(tmp_path):
    base = llama(layers=1)
    assert "base_names" not in run(folders(tmp_path, base, tuned_from(base)), tmp_path / "out")
