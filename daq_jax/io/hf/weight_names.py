"""What the names of weights say: the module of a weight, what servers multiply as one, what is an expert."""

import re
from collections.abc import Iterable
from typing import Literal

# Modules that servers multiply as one, so that they share one decision; the last parts of their names.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq_a", "wkv"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_FUSED_EXPERTS = re.compile(r"(^|\.)experts\.(gate_up_proj|down_proj)$")
_EXPERTS = re.compile(r"^(?P<module>(.*\.)?experts)\.(\d+\.\w+\.weight|gate_up_proj|down_proj)$")
# Last components of weights whose inputs vLLM 0.32 divides among devices (`RowParallelLinear`), and of those
# that each device has whole (`ReplicatedLinear`), where a model of text has them. wo_b, wq_a, wkv, e_proj and
# h_proj are of DeepSeek V4. An indexer, of V3.2 and V4, is whole on each device.
_BY_INPUTS = {"o_proj", "out_proj", "down_proj", "w2", "dense", "c_proj", "fc2", "dense_4h_to_h"}
_BY_INPUTS |= {"wo", "Wo", "wo_b", "fc_out", "output_linear", "linear_fc2"}
_WHOLE = {"q_a_proj", "kv_a_proj_with_mqa", "wq_a", "wkv", "e_proj", "h_proj"}
_WHOLE |= {"per_layer_input_gate", "per_layer_projection"}


def module_of(name: str) -> str:
    """The module that a weight belongs to, as skip lists name it."""
    if _FUSED_EXPERTS.search(name):
        return name.rpartition(".")[0]
    return name.removesuffix(".weight")


def is_matrix(name: str, ndim: int) -> bool:
    """Whether a tensor is the weight of a linear layer, or of a stack of experts, by its name and axes."""
    return (ndim == 2 and name.endswith(".weight")) or (ndim == 3 and bool(_FUSED_EXPERTS.search(name)))


def is_expert(name: str) -> bool:
    """Whether a weight is that of an expert, or of a stack of experts."""
    return bool(_EXPERTS.match(name))


def fused_with(name: str) -> str:
    """A label that a weight shares with all others that servers fuse it with."""
    experts = _EXPERTS.match(name)
    if experts:
        return experts["module"]
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    group = next((g for g in _FUSED if last in g), (last,))
    return f"{parent}.{'+'.join(group)}"


def last_component(name: str) -> str:
    """Last component of the name of the layer that a weight belongs to."""
    return module_of(name).rpartition(".")[2] if not name.endswith("_proj") else name.rpartition(".")[2]


def divided_axis(name: str) -> Literal["inputs", "outputs", ""]:
    """The axis of a weight that servers divide among devices; "" for a weight that each device has whole."""
    last = last_component(name)
    if last in _WHOLE or ".indexer." in name:
        return ""
    return "inputs" if last in _BY_INPUTS else "outputs"


def skipped_modules(kept: Iterable[str]) -> set[str]:
    """Full names of the modules that are not quantized, as the file has them.

    Args:
        kept: names of the two-dimensional weights and fused experts that stay as they are.
    """
    kept = list(kept)
    names = {module_of(name) for name in kept}
    return names | {match["module"] for name in kept if (match := _EXPERTS.match(name))}
