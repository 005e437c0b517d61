"""What is known of a checkpoint from the `model_type` of its config.

Most is read from `model_types.json`, which `python -m benchmarks layers` makes from the model classes of
transformers.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Whose experts transformers takes apart in the model for compressed-tensors (`SequentialLlama4TextExperts`).
_PARTED = ("llama4", "llama4_text")
_INTERLEAVED = ("gpt_oss", "openai_privacy_filter")  # whose stacks alternate rows of gate and up
# What transformers 5.24 does not load, as `python -m benchmarks architectures` finds: stacks with scales of a
# class of experts that it does not exchange; and codes that are decompressed while they are loaded, in models
# whose convolutions it puts together at the same time.
_NO_STACKS = ("hy_v4", "zaya")
_NO_DECOMPRESSION = ("kimi_linear", "olmo_hybrid")
LINEAR = ("linear", "experts")  # roles of matrices that are quantized


@functools.cache
def known_types() -> dict[str, Any]:
    """The table of model types: those that are stored [in, out], and roles of matrices by their names."""
    return json.loads(Path(__file__).with_name("model_types.json").read_text())


def part_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside a config; empty where the key holds no object."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def _types(config: Mapping[str, Any]) -> list[str]:
    found = [part.get("model_type") for part in (config, part_of(config, "text_config"))]
    return [kind for kind in found if isinstance(kind, str)]


def turns_experts(config: Mapping[str, Any]) -> bool:
    """Whether the stacks of experts are stored [experts, in, out]."""
    return any(kind in known_types()["turned_experts"] for kind in _types(config))


def turns_linear_layers(config: Mapping[str, Any]) -> bool:
    """Whether the linear layers are stored [in, out], as the Conv1D of transformers is."""
    return any(kind in known_types()["turned_layers"] for kind in _types(config))


def interleaves_experts(config: Mapping[str, Any]) -> bool:
    """Whether the rows of gate and up alternate in stacks of experts."""
    return any(kind in _INTERLEAVED for kind in _types(config))


def parts_experts(config: Mapping[str, Any]) -> bool:
    """Whether a loader of compressed-tensors looks for the single experts of a stack."""
    return any(kind in _PARTED for kind in _types(config))


def is_unloaded(config: Mapping[str, Any], stacks: bool) -> bool:
    """Whether transformers is known not to load a result.

    Args:
        config: the `config.json` of the result.
        stacks: whether the result has quantized stacks of experts.
    """
    how, kinds = part_of(config, "quantization_config"), _types(config)
    decompressed = how.get("quant_method") == "compressed-tensors" and how.get("format") != "float-quantized"
    return (stacks and any(kind in _NO_STACKS for kind in kinds)) or (
        decompressed and any(kind in _NO_DECOMPRESSION for kind in kinds)
    )


def pattern_of(name: str) -> str:
    """The name of a tensor with a star for each number of a layer or an expert."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def role_of(config: Mapping[str, Any], name: str) -> str:
    """What a matrix is where its name or its size would mislead: one of `LINEAR`, or such as "embedding".

    The names of a model and those of the same model inside another one differ in what stands before them.

    Returns:
        "" where nothing is known.
    """
    known = {p: r for kind in _types(config) for p, r in known_types()["roles"].get(kind, {}).items()}
    pattern = pattern_of(name) if known else ""  # most types have no entry
    for entry, role in known.items():
        if f".{pattern}".endswith(f".{entry}") or f".{entry}".endswith(f".{pattern}"):
            return role
    return ""
