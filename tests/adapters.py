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
