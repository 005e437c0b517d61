"""Weights stored [in, out], as their shapes tell where the `model_type` of a config says nothing."""

import collections
import re
from collections.abc import Mapping

from daq_jax.io.hf.tensor_files import TensorSpec

_BEFORE_LAYERS = re.compile(r"(.*?)\.?\d+\.")


def turned_stacks(specs: Mapping[str, TensorSpec]) -> set[str]:
    """Stacks of experts stored [experts, in, out]: `gate_up_proj` has the outputs of `down_proj` as inputs.

    Args:
        specs: dtype and shape of tensors that are not quantized, by name.
    """
    found: set[str] = set()
    for up, spec in specs.items():
        stem, _, last = up.rpartition("experts.")
        down = f"{stem}experts.down_proj"
        if last != "gate_up_proj" or len(spec.shape) != 3 or len(getattr(specs.get(down), "shape", ())) != 3:
            continue
        (_, inputs, outputs), (_, inner, width) = spec.shape, specs[down].shape
        if inputs == width and outputs == 2 * inner:
            found |= {up, down}
    return found


def turned_layers(specs: Mapping[str, TensorSpec]) -> set[str]:
    """Matrices stored [in, out], as the Conv1D of transformers is: their biases fit columns, not rows.

    Layers of one list are alike. All its matrices are turned where some bias tells so, and none the contrary.

    Args:
        specs: dtype and shape of tensors that are not quantized, by name.
    """
    lists: dict[str, list[str]] = collections.defaultdict(list)
    votes: dict[str, set[bool]] = collections.defaultdict(set)
    for name, spec in specs.items():
        before = _BEFORE_LAYERS.match(name)
        if before is None or len(spec.shape) != 2 or not name.endswith(".weight"):
            continue
        lists[before[1]].append(name)
        bias = specs.get(f"{name.removesuffix('weight')}bias")
        fits = [bias is not None and bias.shape == (n,) for n in spec.shape]
        if any(fits) and not all(fits):
            votes[before[1]].add(fits[1])
    return {name for where, names in lists.items() if votes[where] == {True} for name in names}
