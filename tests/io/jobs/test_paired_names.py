"""A base by other names than its tune: paired where the names leave no doubt, and told otherwise."""

import io
import pathlib

import numpy as np
import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax.io.jobs.kept_tensors import faults_of_folder
from tests.cases import rng_for
from tests.hf_folders import (
    BF16,
    CONFIG,
    Tensors,
    llama,
    normal,
    read_tensors,
    spread,
    stored,
    to_fp8,
    tuned_from,
    write_folder,
)
from tests.native_folders import Native, kept_of, low_rank, mxfp4_pack, nvfp4_pack, packed

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


def of_experts(make, experts: int = 2) -> list[Native]:
    """The experts of a layer, one by one, in a coding: `make` takes name, outputs and inputs."""
    shapes = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    return [make(f"{BLOCK}{e}.{part}.weight", *size) for e in range(experts) for part, size in shapes.items()]


def int4(name: str, outputs: int, inputs: int) -> Native:
    return packed(name, outputs, inputs, 4, 32, np.int64)


def made_of(natives: list[Native]) -> Tensors:
    """The stored tensors of a base."""
    return {k: x for native in natives for k, x in native.make(rng_for(native.name)).items()}


def written(path: pathlib.Path, natives: list[Native], base: Tensors, tuned: Tensors, kept: Tensors):
    """A base in 4 bits and a tuned folder, each with other tensors that are not quantized."""
    config = CONFIG | {"quantization_config": natives[0].config}
    return (
        write_folder(path / "base", [base | kept], config),
        write_folder(path / "tuned", [tuned | tuned_from(kept)]),
    )


CODINGS = {"mxfp4": mxfp4_pack, "nvfp4": nvfp4_pack, "int4": int4}
NORM = {"model.norm.weight": normal(5, 64).astype(BF16)}


@pytest.mark.parametrize("coding", CODINGS)
def test_single_experts_in_4_bits_take_the_change_of_a_stack(coding, tmp_path):
    natives = of_experts(CODINGS[coding])
    base = made_of(natives)
    weights = {native.name: native.decode(base) for native in natives}
    pair = written(tmp_path / "same", natives, base, fused(weights), NORM)
    report = daq.quantize_folder(*pair, tmp_path / "out", memory_gb=2)
    wanted = stored(pair[0])
    differ = {n for n, x in stored(tmp_path / "out").items() if x != wanted[n]}
    assert differ == set(NORM)
    assert report["identity"]["untouched"] == len(natives)
    assert report["tuned_names"] == {n: BLOCK + fused_name(n) for n in weights}


@pytest.mark.slow
@pytest.mark.parametrize("coding", CODINGS)
def test_the_change_of_a_stack_is_kept_in_single_experts_in_4_bits(coding, tmp_path):
    natives = of_experts(CODINGS[coding])
    base = made_of(natives)
    weights = {native.name: native.decode(base) for native in natives}
    moved = natives[4]  # the second expert's up_proj, the lower half of the second matrix of its stack
    change = low_rank(3, weights[moved.name], 0.05)
    tuned = weights | {moved.name: weights[moved.name] + change}
    pair = written(tmp_path, natives, base, fused(tuned), NORM)
    said = io.StringIO()
    console = Console(file=said, width=200)
    daq.quantize_folder(*pair, tmp_path / "out", memory_gb=2, console=console)
    found, wanted = stored(tmp_path / "out"), stored(pair[0])
    differ = {n for n in wanted if found[n] != wanted[n]}
    assert differ - {moved.scale} == {moved.codes, *NORM}
    projection, _ = kept_of(change, moved.decode(read_tensors(tmp_path / "out")) - weights[moved.name])
    assert 0.9 < projection < 1.1
    assert "have another name in tuned" in said.getvalue()
    compared = daq.compare_folders(*pair, tmp_path / "out")
    assert float(compared.leaves[moved.name].projection) == pytest.approx(projection, rel=1e-3)
    assert daq.inspect_folder(*pair, ABSMAX).leaves.keys() == weights.keys()
    assert faults_of_folder(*pair, tmp_path / "out") == []


def fused_name(name: str) -> str:
    return "down_proj" if "down_proj" in name else "gate_up_proj"


def test_a_stack_in_fp8_takes_single_experts(tmp_path):
    stacks = {n: [to_fp8(x) for x in stack.astype(np.float32)] for n, stack in fused(SINGLE).items()}
    base = {n: np.stack([codes for codes, _ in each]) for n, each in stacks.items()}
    base |= {f"{n}_scale_inv": np.stack([scale for _, scale in each]) for n, each in stacks.items()}
    weights = {n: base[n].astype(np.float32) * spread(base[f"{n}_scale_inv"], base[n].shape) for n in stacks}
    tuned = {}
    for i in range(2):
        gate, up = np.split(weights[f"{BLOCK}gate_up_proj"][i], 2)
        parts = {"gate": gate, "up": up, "down": weights[f"{BLOCK}down_proj"][i]}
        tuned |= {f"{BLOCK}{i}.{part}_proj.weight": np.ascontiguousarray(x) for part, x in parts.items()}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    before = write_folder(tmp_path / "base", [base | NORM], CONFIG | {"quantization_config": how})
    after = write_folder(tmp_path / "tuned", [tuned | NORM])
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert report["format"] == "as-base"
    assert stored(tmp_path / "out") == stored(before)
    assert faults_of_folder(before, after, tmp_path / "out") == []


@pytest.mark.parametrize("kind", [None, "gemma3"])
def test_a_base_in_4_bits_has_another_prefix(kind, tmp_path):
    """Weights, and tensors that are not quantized; a type of model that differs is refused."""
    native = mxfp4_pack("model.language_model.layers.0.mlp.up_proj.weight", 64, 128)
    base = native.make(rng_for("prefix"))
    kept = {"model.language_model.norm.weight": normal(6, 64).astype(BF16)}
    tuned = renamed({native.name: native.decode(base)} | tuned_from(kept), "model.language_model.", "model.")
    config = CONFIG | {"quantization_config": native.config} | ({"model_type": kind} if kind else {})
    pair = write_folder(tmp_path / "base", [base | kept], config), write_folder(tmp_path / "tuned", [tuned])
    if kind:
        words = r"'model\.language_model\.\S+' of base is 'model\.\S+' here.*'gemma3' but tuned is 'llama'"
        with pytest.raises(daq.DaqError, match=words):
            daq.quantize_folder(*pair, tmp_path / "out", memory_gb=2)
        return
    report = daq.quantize_folder(*pair, tmp_path / "out", memory_gb=2)
    found, (name,) = read_tensors(tmp_path / "out"), kept
    assert found.keys() == base.keys() | kept.keys()
    assert all(np.array_equal(found[n], x) for n, x in base.items())
    np.testing.assert_array_equal(found[name], tuned["model.norm.weight"])
    assert report["tuned_names"][name] == "model.norm.weight"
    assert faults_of_folder(*pair, tmp_path / "out") == []


def test_experts_that_are_kept_are_cut_out_of_a_stack_to_the_byte(tmp_path):
    """More than one chunk of 16 MiB, in a base that quantizes other weights alone."""
    native = mxfp4_pack("model.layers.0.self_attn.q_proj.weight", 64, 64)
    base = native.make(rng_for("kept"))
    single = {
        f"{BLOCK}{i}.{k}_proj.weight": normal(10 * i + j, 3000, 1600).astype(BF16)
        for i in range(2)
        for j, k in enumerate(("gate", "up"))
    } | {f"{BLOCK}{i}.down_proj.weight": normal(20 + i, 64, 32).astype(BF16) for i in range(2)}
    pair = written(tmp_path, [native], base | single, {native.name: native.decode(base)} | fused(single), {})
    daq.quantize_folder(*pair, tmp_path / "out", memory_gb=2)
    assert stored(tmp_path / "out") == stored(pair[0])
    assert faults_of_folder(*pair, tmp_path / "out") == []


def test_what_a_base_in_4_bits_cannot_take_is_refused_by_both_names(tmp_path):
    natives = of_experts(mxfp4_pack)
    base = made_of(natives)
    weights = {native.name: native.decode(base) for native in natives}
    third = {n: np.concatenate([x, x[:1]]) for n, x in fused(weights).items()}
    pair = written(tmp_path / "more", natives, base, third, {})
    with pytest.raises(daq.DaqError, match=r"experts\.gate_up_proj' is not in the base"):
        daq.quantize_folder(*pair, tmp_path / "out", memory_gb=2)
    codes = {n: [to_fp8(x) for x in stack] for n, stack in fused(weights).items()}
    tuned = {n: np.stack([c for c, _ in each]) for n, each in codes.items()}
    tuned |= {f"{n}_scale_inv": np.stack([s for _, s in each]) for n, each in codes.items()}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = CONFIG | {"quantization_config": natives[0].config}
    before = write_folder(tmp_path / "base", [base], config)
    after = write_folder(tmp_path / "tuned", [tuned], CONFIG | {"quantization_config": how})
    with pytest.raises(daq.DaqError, match=r"base has '\S+s\.down_proj' as '\S+s\.0\.down_proj\.weight'"):
        daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert not (tmp_path / "out").exists()
