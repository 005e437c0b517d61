"""Where vLLM puts the tensors of a folder, and whether its parameters hold just these.

A parameter of vLLM holds one tensor, or several that it fuses: queries, keys and values, gate and up, and all
experts of a layer. `judge` puts such a parameter together from the folder and compares every byte. The rules
are written down here from the names alone and share nothing with vLLM's loader.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1),
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)")
_OF_EXPERTS = {
    "gate_proj": ("w13", 0),
    "w1": ("w13", 0),
    "up_proj": ("w13", 1),
    "w3": ("w13", 1),
    "down_proj": ("w2", 0),
    "w2": ("w2", 0),
}
# What no tensor of a folder fills: scales of the cache of keys and values, and scales of inputs of experts
# in NVFP4, which vLLM makes but does not use where, as here, inputs are not quantized.
_OWN = re.compile(r"attn\.(q|k|v|prob)_(scale|zero_point)$|experts\.w(13|2)_input_global_scale$")
# Sizes of packed weights, of which a fused parameter keeps those of one member.
_SIZES = "weight_shape"


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        parameter: name of the parameter of vLLM.
        expert: index of the expert in it; 0 for a parameter without experts.
        order: position among the tensors that the parameter fuses.
    """

    parameter: str
    expert: int = 0
    order: int = 0


def parameter_name(name: str) -> str:
    """The name of a parameter of vLLM, without the word that it puts between a layer and its experts."""
    return name.replace(".experts.routed_experts.", ".experts.")


def place_of(name: str) -> Place:
    """Where a tensor lies, by its name after the renames that vLLM's class of the model declares."""
    found = _EXPERT.fullmatch(name)
    if found and found[3] in _OF_EXPERTS:
        word, order = _OF_EXPERTS[found[3]]
        return Place(f"{found[1]}.{word}_{found[4]}", int(found[2]), order)
    *path, module, end = [""] * 2 + name.split(".")
    if module not in _FUSED:
        return Place(name)
    fused, order = _FUSED[module]
    return Place(".".join([*path[2:], fused, end]), 0, order)


def sources(names: Iterable[str], parameters: Iterable[str]) -> dict[str, list[str]]:
    """The tensors that make each parameter, in order. A parameter that keeps a tensor's own name wins."""
    known, found = set(parameters), dict[str, list[str]]()
    for name in names:
        parameter = name if name in known else place_of(name).parameter
        found.setdefault(parameter, []).append(name)
    return {parameter: sorted(them, key=lambda n: place_of(n)[1:]) for parameter, them in found.items()}


def assembled(names: list[str], stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """The parameter that some tensors make: members one below another, experts along a first axis."""
    experts = dict[int, list[np.ndarray]]()
    for name in names:
        tensor = stored[name]
        experts.setdefault(place_of(name).expert, []).append(tensor.reshape(tensor.shape or (1,)))
    each = [np.concatenate(experts[e]) for e in sorted(experts)]
    return np.stack(each) if any(map(_EXPERT.fullmatch, names)) else each[0]


def judge(parameters: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """What is wrong with the parameters of a model that has loaded a folder.

    Args:
        parameters: every parameter of the model, by `parameter_name`.
        stored: every tensor of the folder, by its name in vLLM.

    Returns:
        `lost`: tensors that no parameter holds bit for bit. `unfilled`: parameters that are not wholly made
        of tensors of the folder. Both empty where the folder is loaded.
    """
    lost, filled = list[str](), set[str]()
    for parameter, names in sources(stored, parameters).items():
        if parameter in parameters and _holds(parameters[parameter], assembled(names, stored)):
            filled.add(parameter)
        else:
            lost += [name for name in names if not name.endswith(_SIZES)]
    rest = sorted(parameters.keys() - filled)
    return {
        "lost": sorted(lost),
        "unfilled": [n for n in rest if not _OWN.search(n) and not n.endswith(_SIZES)],
    }


def _holds(parameter: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether a parameter has the elements of a tensor, as they are or, of experts, turned over."""
    if parameter.size != wanted.size:
        return False
    if np.array_equal(parameter.reshape(-1), wanted.reshape(-1)):
        return True
    turned = parameter.ndim == wanted.ndim == 3 and parameter.shape == wanted.swapaxes(1, 2).shape
    return turned and np.array_equal(parameter, wanted.swapaxes(1, 2))
