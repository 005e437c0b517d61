"""Quantized weights as checkpoints name them: codes under the weight's name or packed, a scale beside them.

A weight in a Hugging Face folder is `[..., out, in]`, and its scale `[..., out tiles, in tiles]`; here the
scale is turned to the library's order, inputs first. The files of transformers and DeepSeek call the scale
`weight_scale_inv`, those of compressed-tensors `weight_scale`; both are multiplied with the codes. Codes
of four bits come eight to a 32-bit word, see `packed_int4`; `weight_shape` says how many codes there are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from daq_jax.errors import DaqError, refuse
from daq_jax.formats import Format, fp8_e4m3fn, fp8_e5m2, int4, int8
from daq_jax.io.hf.bands import scale_rows
from daq_jax.io.hf.packed_int4 import WORD
from daq_jax.io.hf.tensor_files import TensorSpec
from daq_jax.tilings import Block, Channel, Group, Matrix, PerTensor, Tiling

HF_MATRIX: Matrix = ((-1,), (-2,))  # [..., out, in]
_FORMATS = {"F8_E4M3": fp8_e4m3fn, "F8_E5M2": fp8_e5m2, "I8": int8}
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_SUFFIXES = ("_scale_inv", "_scale")
_ASYMMETRIC = ("_zero_point", "_g_idx")  # of packed weights: with zeros, or with inputs in another order


@dataclasses.dataclass(frozen=True)
class Coding:
    """How a stored tensor becomes a weight.

    Attributes:
        scale: name of the tensor that holds the scale.
        format: number format of the codes.
        tiling: which elements share a scale.
        words: name of the tensor that holds packed codes; "" if the weight's own tensor holds its codes.
        shape: name of the tensor that holds the shape of a packed weight; "" if the codes are not packed.
    """

    scale: str
    format: Format
    tiling: Tiling
    words: str = ""
    shape: str = ""

    def scale_band(self, shape: Sequence[int], band: slice) -> slice:
        """The band of the scale's first axis that belongs to a band of the weight's first axis.

        Raises:
            DaqError: if the band cuts through a tile.
        """
        return band if len(shape) > 2 else scale_rows(self.tiling, shape, band)


def find_codings(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: Path
) -> dict[str, Coding]:
    """The quantized weights among the tensors of a folder, by name.

    Args:
        specs: every tensor of the folder.
        config: the folder's `config.json`; its `quantization_config` may name the size of blocks.
        where: path of the folder, for messages.

    Raises:
        DaqError: naming every weight whose scale fits no layout.
    """
    block = _block_of(config)
    found, problems = {}, []
    for name, spec in specs.items():
        scale = next((name + s for s in _SUFFIXES if name + s in specs), None)
        if scale is None or spec.dtype not in _FORMATS:
            continue
        tiling = _tiling(spec.shape, specs[scale].shape, block)
        if tiling is None or specs[scale].dtype not in _SCALE_DTYPES:
            problems.append(
                f"{name!r} is {spec.dtype} {spec.shape} but {scale!r} is {specs[scale].dtype} "
                f"{specs[scale].shape}; needed one of {', '.join(_SCALE_DTYPES)}, with one scale for the "
                f"matrix, for each row, or for each block of {block[0]} x {block[1]}"
            )
        else:
            found[name] = Coding(scale, _FORMATS[spec.dtype], tiling)
    if problems:
        refuse(f"{where}: quantized weights that cannot be read", problems, one_line=True)
    return found


def find_packed(
    specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray], where: Path
) -> dict[str, tuple[Coding, tuple[int, int]]]:
    """The weights of packed int4 among the tensors of a folder, by name, with their shapes.

    Args:
        specs: every tensor of the folder.
        read: gives a tensor by name; called for `weight_shape` alone.
        where: path of the folder, for messages.

    Raises:
        DaqError: naming every weight that is packed in another way.
    """
    found, problems = {}, []
    for words, spec in specs.items():
        name = words.removesuffix("_packed")
        scale, shape = f"{name}_scale", f"{name}_shape"
        if name == words or spec.dtype != "I32" or not {scale, shape} <= specs.keys():
            continue
        more = [name + s for s in _ASYMMETRIC if name + s in specs]
        is_shape = specs[shape] == TensorSpec("I64", (2,))
        outputs, inputs = map(int, read(shape)) if is_shape else (0, 0)
        group = _group(outputs, inputs, spec, specs[scale])
        if more or group is None or name in specs:
            problems.append(
                f"{words!r} is {spec.dtype} {spec.shape}, {scale!r} {specs[scale].dtype} "
                f"{specs[scale].shape} and {shape!r} says {outputs} x {inputs}"
                + (f", with {more[0]!r}" if more else "")
                + "; needed 4 bits, symmetric, in whole groups along the inputs"
            )
        else:
            found[name] = Coding(scale, int4, Group(group), words, shape), (outputs, inputs)
    if problems:
        refuse(f"{where}: quantized weights that cannot be read", problems, one_line=True)
    return found


def _group(outputs: int, inputs: int, words: TensorSpec, scale: TensorSpec) -> int | None:
    """Inputs that share a scale; None if shape, words and scale do not fit."""
    if min(outputs, inputs) < 1 or len(scale.shape) != 2 or scale.dtype not in _SCALE_DTYPES:
        return None
    fits = words.shape == (outputs, -(-inputs // WORD)) and scale.shape[0] == outputs
    groups = scale.shape[1]
    return inputs // groups if fits and groups and inputs % groups == 0 else None


def _block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(outputs, inputs) of a block by a folder's config; 128 x 128 where it says nothing."""
    how = _object(config.get("quantization_config"))
    groups = _object(how.get("config_groups")).values()
    sizes = [_object(_object(group).get("weights")).get("block_structure") for group in groups]
    for size in (how.get("weight_block_size"), *sizes):
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return 128, 128


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _tiling(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> Tiling | None:
    if len(weight) < 2 or 0 in weight:
        return None
    *batch, outputs, inputs = weight
    grid = (-(-outputs // block[0]), -(-inputs // block[1]))
    if scale == (*batch, *grid):
        return Block(block[1], block[0])
    if scale in ((*batch, outputs, 1), (*batch, outputs)):
        return Channel()
    if math.prod(scale) == math.prod(batch):
        return PerTensor()
    return None


def stored_scale(scale: np.ndarray, weight: tuple[int, ...], tiling: Tiling) -> np.ndarray:
    """A scale as a `QTensor` holds it.

    Args:
        scale: as it is stored, `[..., out tiles, in tiles]`, or without axes of length 1.
        weight: shape of the weight, or of the band that the scale belongs to.
        tiling: of the weight.

    Returns:
        Float32 `[..., in tiles, out tiles]`.

    Raises:
        DaqError: if a scale is not a positive finite number.
    """
    *batch, outputs, inputs = weight
    tile_in, tile_out = tiling.tile(inputs, outputs)
    if scale.dtype == np.uint8:  # the exponents of powers of two, bias 127
        scale = scale.view(ml_dtypes.float8_e8m0fnu)
    wide = scale.astype(np.float32).reshape(*batch, -(-outputs // tile_out), -(-inputs // tile_in))
    if not (np.isfinite(wide) & (wide > 0)).all():
        raise DaqError("it has a scale that is not a positive finite number; mend the checkpoint")
    return np.ascontiguousarray(np.swapaxes(wide, -1, -2))
