"""`quantization_config` as compressed-tensors reads it, which vLLM and transformers do too."""

import re
from collections.abc import Sequence
from typing import Any


def compressed_config(
    stored_as: str, skipped: Sequence[str], *, weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a `config.json` whose linear layers are all quantized in one way.

    Args:
        stored_as: name of the stored form, such as "pack-quantized".
        skipped: full names of the linear modules that are not quantized.
        weights: how weights are quantized; see `how_quantized`.
        inputs: how a server quantizes the inputs of layers; None if it does not.
    """
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if inputs is not None:
        group["input_activations"] = inputs
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*skipped, *_within(skipped)],
    }


def _within(skipped: Sequence[str]) -> list[str]:
    """Patterns of the single experts in a stack that is not quantized.

    vLLM 0.32 asks for `experts.0.gate_proj` and the like, also where the file holds one stack, and loads a
    stack that is not listed by these names into layers of codes. Its models may have other prefixes than the
    file, so a pattern begins at the layer.
    """
    found = (re.search(r"\b(layers\.\d+\..*)?\bexperts$", name) for name in skipped)
    stacks = {
        match[0] for match in found if match and not any(n.startswith(f"{match.string}.") for n in skipped)
    }
    return [rf"re:.*\b{re.escape(stack)}\..+" for stack in sorted(stacks)]


def how_quantized(
    bits: int, kind: str, strategy: str, *, dynamic: bool = False, **more: Any
) -> dict[str, Any]:
    """How one kind of tensor is quantized.

    Args:
        bits: bits of a code.
        kind: "float" or "int".
        strategy: which elements share a scale: "channel", "token" or "group".
        dynamic: whether scales are found while the model runs.
        more: further keys, such as `group_size`.
    """
    # The reader refuses keys that it does not know, and older readers know fewer: nothing else here.
    how = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": dynamic, "strategy": strategy}
    return how | more
