"""Small PEFT adapters, and what they make of a base: NumPy in float64, from the definition of LoRA."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from tests.hf_folders import Tensors, normal

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.05,
    "bias": "none", "target_modules": ["q_proj", "up_proj"], "fan_in_fan_out": False, "use_dora": False,
    "inference_mode": True,
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "init_lora_weights": True, "base_model_name_or_path": "some/model", "loftq_config": {},
    "layer_replication": None,
}  # fmt: skip


def write_adapter(path: pathlib.Path, tensors: Tensors, **config) -> pathlib.Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def factors(seed: int, outputs: int, inputs: int, rank: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of a change of about 2 % of weights of 0.02."""
    return normal(seed, rank, inputs), (4e-4 / np.sqrt(rank) * normal(seed + 1, outputs, rank)).astype(
        np.float32
    )


def lora(modules: dict[str, tuple[int, int]], rank: int = 4, seed: int = 7) -> Tensors:
    """The tensors of an adapter for modules of shapes (out, in)."""
    found: Tensors = {}
    for i, (name, (outputs, inputs)) in enumerate(modules.items()):
        a, b = factors(seed + 2 * i, outputs, inputs, rank)
        found[f"{PREFIX}{name}.lora_A.weight"], found[f"{PREFIX}{name}.lora_B.weight"] = a, b
    return found


def product(tensors: Tensors, module: str) -> np.ndarray:
    """B A in float64."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return b @ a


def merged(weight: np.ndarray, change: np.ndarray, scale: float) -> np.ndarray:
    """Float32 weights after tuning."""
    return (weight.astype(np.float64) + scale * change).astype(np.float32)


EXPERTS = "model.layers.0.mlp.experts"


def expert_factors(experts: int, outputs: int, inputs: int, seed: int):
    """A [E r, in] and B [out, r E], and the change of each expert [E, out, in], as peft defines them."""
    a, b = factors(seed, outputs, inputs, 4 * experts)
    each = a.astype(np.float64).reshape(experts, 4, inputs)
    other = b.astype(np.float64).reshape(outputs, 4, experts)
    return a, b, np.einsum("ore,eri->eoi", other, each)


def expert_adapter(hidden: int = 96, inner: int = 64, experts: int = 3, *, older: bool = False):
    """An adapter of gate_up_proj [E, 2 inner, hidden] and down_proj [E, hidden, inner]."""
    found, changes = {}, {}
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    for i, (name, (outputs, inputs)) in enumerate(shapes.items()):
        if older:  # peft took every stack for [E, in, out]
            a, b, change = expert_factors(experts, inputs, outputs, 20 + 2 * i)
            change = np.swapaxes(change, 1, 2)
        else:
            a, b, change = expert_factors(experts, outputs, inputs, 20 + 2 * i)
        wrapped = f"{PREFIX}{EXPERTS}{'.base_layer' if name == 'gate_up_proj' else ''}"
        found |= {f"{wrapped}.lora_A.weight": a, f"{wrapped}.lora_B.weight": b}
        changes[name] = change
    return found, changes


EXPERT_TARGETS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
