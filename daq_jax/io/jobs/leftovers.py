"""What a tuned model holds that a result has no use for, and what a folder holds that is not read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from daq_jax.errors import refuse
from daq_jax.io.hf.architectures import part_of
from daq_jax.io.hf.folders import Folder, Tensor
from daq_jax.io.hf.methods import QUANTIZATION_KEYS
from daq_jax.io.hf.weight_names import is_matrix

FLOATS = ("BF16", "F16", "F32")
# How names end of scales that quantize activations, not weights; and of packed codes of any quantizer.
ACTIVATIONS = (".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale")
# The same of queries, keys and values in the cache of attention.
CACHE = tuple(f".{part}_{kind}" for part in ("q", "k", "v", "prob") for kind in ("scale", "zero_point"))
_CODES = ("_packed", "_blocks", ".qweight", ".codes", "_quantized")
_MASKS = ("bias", "mask")  # of attention, as older models store them in bytes


def is_tied(folder: Folder) -> bool:
    """Whether the output head is the embedding."""
    return folder.config.get("tie_word_embeddings") is True


def dropped_of(tuned: Folder) -> dict[str, str]:
    """Tensors of the tuned model that are left out, and why.

    A tied head stored beside the embedding, of the same bytes: loaders do not tie one that differs. Scales of
    activations and of the cache, since the config of the result has none.
    """
    found = {n: why for n in tuned.tensors if (why := scale_without_use(n))}
    head, tables = "lm_head.weight", [n for n in tuned.tensors if n.endswith("embed_tokens.weight")]
    if not (is_tied(tuned) and head in tuned.tensors and len(tables) == 1):
        return found
    if same_bytes(tuned, head, tuned, tables[0]):
        found[head] = f"tied to {tables[0]!r}, which is stored once"
    return found


def same_bytes(folder: Folder, name: str, other: Folder, its_name: str) -> bool:
    """Whether two tensors that are not quantized are the same to the byte."""
    a, b = folder.tensors[name], other.tensors[its_name]
    if a.spec != b.spec or a.coding or b.coding:
        return False
    pairs = zip(folder.chunks(name), other.chunks(its_name), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def scale_without_use(name: str) -> str:
    """What a scale is of, if it is not one of weights; "" for any other tensor."""
    if name.endswith(ACTIVATIONS):
        return "a scale of static activations"
    return "a scale of the cache of attention" if name.endswith(CACHE) else ""


def refuse_unread(folder: Folder) -> None:
    """Refuses a folder with codes that would be copied or compared as they are, without their scales.

    Raises:
        DaqError: naming each such tensor.
    """
    unread = [
        f"{name!r} is {tensor.spec.dtype} {tensor.shape} without a scale"
        for name, tensor in folder.tensors.items()
        if tensor.coding is None and tensor.spec.dtype not in FLOATS and _holds_codes(name, tensor)
    ]
    if unread:
        way_out = "Pass the model in bfloat16, float16 or float32."
        refuse(f"{folder.path}: holds codes that are not read", unread, way_out, one_line=True)


def _holds_codes(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of no dtype that is computed with is a matrix of codes, and not indices or a mask."""
    if len(tensor.shape) < 2:
        return False
    if is_matrix(name, len(tensor.shape)) or name.endswith(_CODES):
        return True
    word = tensor.spec.dtype
    return word.startswith(("F8_", "F6_", "F4")) or (word in ("I8", "U8") and not name.endswith(_MASKS))


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantization."""
    found = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    inner = part_of(config, "text_config")
    if any(key in inner for key in QUANTIZATION_KEYS):
        found["text_config"] = {k: value for k, value in inner.items() if k not in QUANTIZATION_KEYS}
    return found
