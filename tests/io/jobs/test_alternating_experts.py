"""Stacks of gpt-oss, whose rows of gate and up alternate, against experts one by one, and the reverse.

Pairs are made by plain loops over rows, from the definition: row `2 i` of a stack is row `i` of gate, row
`2 i + 1` that of up. The bfloat16 form of a stack is `[experts, in, out]`.
"""

import contextlib
import pathlib

import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.jobs.kept_tensors import faults_of_folder
from tests.adapters import EXPERT_TARGETS, expert_adapter, lora, merged, write_adapter
from tests.cases import rng_for
from tests.hf_folders import BF16, CONFIG, Tensors, normal, read_tensors, stored, write_folder
from tests.native_folders import Native, gpt_oss, kept_of, low_rank, mxfp4_pack

ABSMAX = daq.recipes.absmax
BLOCK = "model.layers.0.mlp.experts"
KIND = CONFIG | {"model_type": "gpt_oss"}
WIDTH, INNER = 64, 64  # square, as those of gpt-oss: no shape tells inputs from outputs
GATE_UP, DOWN = f"{BLOCK}.gate_up_proj", f"{BLOCK}.down_proj"
REST = {"model.norm.weight": normal(5, 64).astype(BF16)}


def parted(stacks: Tensors) -> Tensors:
    """Stacks `[experts, out, in]`, and biases, as experts one by one."""
    found: dict[str, list[np.ndarray]] = {}
    for name, stack in stacks.items():
        kind = "bias" if name.endswith("_bias") else "weight"
        for e, one in enumerate(stack):
            for i, row in enumerate(one):
                part = "down_proj" if "down_proj" in name else ("gate_proj", "up_proj")[i % 2]
                found.setdefault(f"{BLOCK}.{e}.{part}.{kind}", []).append(row)
    return {name: np.array(rows, BF16) for name, rows in found.items()}


def turned(stacks: Tensors) -> Tensors:
    """As transformers stores stacks in bfloat16."""
    return {n: np.ascontiguousarray(x.swapaxes(1, 2) if x.ndim == 3 else x) for n, x in stacks.items()}


def biases(experts: int = 2) -> Tensors:
    return {
        f"{GATE_UP}_bias": normal(1, experts, 2 * INNER).astype(BF16),
        f"{DOWN}_bias": normal(2, experts, WIDTH).astype(BF16),
    }


def blocks() -> tuple[list[Native], Tensors]:
    natives = [gpt_oss(GATE_UP, 2, 2 * INNER, WIDTH), gpt_oss(DOWN, 2, WIDTH, INNER)]
    return natives, {k: x for n in natives for k, x in n.make(rng_for(n.name)).items()}


def singles() -> tuple[list[Native], Tensors]:
    shapes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    natives = [mxfp4_pack(f"{BLOCK}.{e}.{p}.weight", *s) for e in range(2) for p, s in shapes.items()]
    return natives, {k: x for n in natives for k, x in n.make(rng_for(n.name)).items()}


def stacked(weights: Tensors) -> Tensors:
    """Experts one by one as stacks `[experts, out, in]`, row by row."""
    gates = [[weights[f"{BLOCK}.{e}.{p}_proj.weight"] for p in ("gate", "up")] for e in range(2)]
    rows = [[pair[i % 2][i // 2] for i in range(2 * INNER)] for pair in gates]
    return {
        GATE_UP: np.array(rows),
        DOWN: np.stack([weights[f"{BLOCK}.{e}.down_proj.weight"] for e in (0, 1)]),
    }


def base_of(path: pathlib.Path, natives: list[Native], tensors: Tensors, **more: object) -> pathlib.Path:
    return write_folder(path / "base", [tensors], KIND | {"quantization_config": natives[0].config} | more)


def test_blocks_take_single_experts_that_did_not_change_byte_for_byte(tmp_path):
    natives, made = blocks()
    before = base_of(tmp_path, natives, made | biases() | REST)
    tuned = parted({n.name: n.decode(made) for n in natives} | biases())
    after = write_folder(tmp_path / "tuned", [tuned | REST], KIND)
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert stored(tmp_path / "out") == stored(before)
    assert report["identity"]["untouched"] == 2
    assert report["tuned_names"][f"{GATE_UP}_bias"] == f"{BLOCK}.0.gate_proj.bias"
    assert faults_of_folder(before, after, tmp_path / "out") == []
    assert daq.inspect_folder(before, after, ABSMAX).leaves.keys() == {GATE_UP, DOWN}


def test_blocks_keep_the_change_and_the_biases_of_single_experts(tmp_path):
    natives, made = blocks()
    before = base_of(tmp_path, natives, made | biases() | REST)
    weights = {n.name: n.decode(made) for n in natives}
    changes = {name: low_rank(i, x, 0.05) for i, (name, x) in enumerate(weights.items())}
    own = {n: (x.astype(np.float32) + 1).astype(BF16) for n, x in biases().items()}
    tuned = {n: (x + changes[n]).astype(np.float32) for n, x in weights.items()}
    after = write_folder(tmp_path / "tuned", [parted(tuned | own) | REST], KIND)
    daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    found = read_tensors(tmp_path / "out")
    for native in natives:
        projection, _ = kept_of(changes[native.name], native.decode(found) - weights[native.name])
        assert 0.9 < projection < 1.1
    for name, bias in own.items():
        np.testing.assert_array_equal(found[name], bias)
    assert found.keys() == made.keys() | own.keys() | REST.keys()


@pytest.mark.parametrize("with_bias", [False, True])
def test_single_experts_in_4_bits_take_a_stack_of_gpt_oss(with_bias, tmp_path):
    natives, made = singles()
    own = biases() if with_bias else {}
    before = base_of(tmp_path, natives, made | parted(own) | REST)
    tuned = turned(stacked({n.name: n.decode(made) for n in natives}) | own)
    after = write_folder(tmp_path / "tuned", [tuned | REST], KIND)
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert stored(tmp_path / "out") == stored(before)
    assert report["identity"]["untouched"] == 6
    assert faults_of_folder(before, after, tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["gpt_oss", "llama"])
def test_blocks_alternate_whatever_the_config_says(kind, tmp_path):
    natives, made = blocks()
    before = base_of(tmp_path, natives, made, model_type=kind)
    tuned = parted({n.name: n.decode(made) for n in natives})
    after = write_folder(tmp_path / "tuned", [tuned], CONFIG | {"model_type": kind})
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert report["identity"]["untouched"] == 2


@pytest.mark.parametrize("lacking", ["1.up_proj.weight", "1.down_proj.bias", "0.gate_proj.weight"])
def test_an_expert_that_is_not_there_is_named(lacking, tmp_path):
    natives, made = blocks()
    before = base_of(tmp_path, natives, made | biases())
    tuned = parted({n.name: n.decode(made) for n in natives} | biases())
    del tuned[f"{BLOCK}.{lacking}"]
    after = write_folder(tmp_path / "tuned", [tuned], KIND)
    with pytest.raises(daq.DaqError, match=r"not in the tuned model") as caught:
        daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert "experts" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["more experts", "quantized"])
def test_single_experts_that_cannot_be_paired_are_told_why(kind, tmp_path):
    natives, made = blocks()
    before = base_of(tmp_path, natives, made)
    coded, stored_as = singles()
    weights = {n.name: np.concatenate([x := n.decode(made), x[:1]]) for n in natives}
    config = KIND | {"quantization_config": coded[0].config}
    tuned, config = (parted(weights), KIND) if kind == "more experts" else (stored_as, config)
    after = write_folder(tmp_path / "tuned", [tuned], config)
    words = r"base has '\S+\.0\.down_proj\.weight' as '\S+s\.down_proj'.*a stack of as many.*not quantized"
    with pytest.raises(daq.DaqError, match=words):
        daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_stacks_on_single_experts_alternates(tmp_path):
    """peft keeps inputs first in stacks of gpt-oss, and A `[E r, in]`."""
    adapter, changes = expert_adapter(WIDTH, INNER, 2)
    natives, made = singles()
    before = base_of(tmp_path, natives, made)
    after = write_adapter(tmp_path / "adapter", adapter, **EXPERT_TARGETS)
    weights = {n.name: n.decode(made) for n in natives}
    with (
        contextlib.closing(open_folder(before)) as base,
        contextlib.closing(open_tuned(after, base)) as tuned,
    ):
        for name, weight in weights.items():
            e = int(name.split(".")[-3])
            change = changes["down_proj" if "down_proj" in name else "gate_up_proj"][e]
            change = change if "down_proj" in name else change["up_proj" in name :: 2]
            np.testing.assert_array_equal(tuned.read(name), merged(weight, change, 1.5))
            np.testing.assert_array_equal(tuned.read(name, slice(16, 48)), merged(weight, change, 1.5)[16:48])


def test_an_adapter_of_single_experts_on_blocks_is_refused_by_the_names_of_both(tmp_path):
    natives, made = blocks()
    before = base_of(tmp_path, natives, made)
    modules = {f"{BLOCK}.{e}.{p}_proj": (INNER, WIDTH) for e in range(2) for p in ("gate", "up", "down")}
    after = write_adapter(tmp_path / "adapter", lora(modules))
    words = (
        r"module '\S+\.0\.gate_proj' .* is of one expert, .* the stack '\S+\.gate_up_proj': save .* merged"
    )
    with pytest.raises(daq.DaqError, match=words):
        daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
