"""What is known of a checkpoint from the `model_type` of its config."""

from collections.abc import Mapping
from typing import Any

# Types whose stacks of experts are stored [experts, in, out] (`is_transposed` in transformers).
_TURNED = ("aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter")
# Whose experts transformers takes apart in the model for compressed-tensors (`SequentialLlama4TextExperts`).
_PARTED = ("llama4", "llama4_text")
# Whose linear layers are stored [in, out], by the Conv1D of transformers 5.24.
_CONV1D = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def part_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside a config; empty where the key holds no object."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def _types(config: Mapping[str, Any]) -> list[Any]:
    return [part.get("model_type") for part in (config, part_of(config, "text_config"))]


def turns_experts(config: Mapping[str, Any]) -> bool:
    """Whether the stacks of experts are stored [experts, in, out]."""
    return any(kind in _TURNED for kind in _types(config))


def turns_linear_layers(config: Mapping[str, Any]) -> bool:
    """Whether the linear layers are stored [in, out], as the Conv1D of transformers is."""
    return any(kind in _CONV1D for kind in _types(config))


def parts_experts(config: Mapping[str, Any]) -> bool:
    """Whether a loader of compressed-tensors looks for the single experts of a stack."""
    return any(kind in _PARTED for kind in _types(config))
