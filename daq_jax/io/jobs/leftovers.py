"""What a tuned model holds that a result has no use for, and what a folder holds that is not read."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from daq_jax.errors import DaqError, refuse
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
# How names end of the scales of a weight. Beside floats they tell of codes in a wider dtype.
_SCALES = re.compile(r"(?<=\.weight)(_scale(_inv|_2)?|_global_scale)$")
# What peft, torch.compile, FSDP and DDP put into the names of a model that is saved as it is trained.
_WRAPPED = re.compile(
    r"\.lora_([AB]|embedding_[AB])\.default(\.|$)"
    r"|(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OUTER = re.compile(r"(module|base_model\.model)\.")
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
        DaqError: naming each such tensor, or one that a training framework has wrapped.
    """
    _refuse_wrapped(folder)
    unread = [
        f"{name!r} is {tensor.spec.dtype} {tensor.shape} without a scale"
        for name, tensor in folder.tensors.items()
        if tensor.coding is None and tensor.spec.dtype not in FLOATS and _holds_codes(name, tensor)
    ]
    unread += [
        f"{weight!r} is {folder.tensors[weight].spec.dtype} with a scale, {name!r}"
        for name in folder.tensors
        for weight in [_SCALES.sub("", name)]
        if weight != name and weight in folder.tensors and folder.tensors[weight].coding is None
    ]
    if unread:
        way_out = "Pass the model in bfloat16, float16 or float32, without scales."
        refuse(f"{folder.path}: holds codes that are not read", unread, way_out, one_line=True)


def _refuse_wrapped(folder: Folder) -> None:
    """Refuses names that no loader looks for, as a framework of training puts around those of a model."""
    names = list(folder.tensors)
    wrapped = next((name for name in names if _WRAPPED.search(name)), "")
    if not wrapped and names and all(_OUTER.match(name) for name in names):
        wrapped = names[0]
    if wrapped:
        raise DaqError(
            f"{folder.path}: {wrapped!r} is the name of a weight inside a wrapper of training, which loaders "
            "do not find: merge the adapter (`merge_and_unload` of peft), or take the model out of the "
            "wrapper (`accelerate.Accelerator.unwrap_model`), and save it again."
        )


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
