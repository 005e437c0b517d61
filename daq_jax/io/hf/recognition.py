"""The quantized weights among the tensors of a folder, told by names, dtypes and shapes.

| stored, for a weight `W` `[..., out, in]` of module `M` | written by |
|---|---|
| `W` F8 or I8, `W_scale_inv` or `W_scale`: one, or one a row, block or group | many |
| `W` F8, `W_scale` U8 or F8_E8M0 `[out, in / 32]` | compressed-tensors `mxfp8` |
| `W` F8, `M.scale` F8_E8M0, one a block | DeepSeek V4 |
| `W` I8 `[out, in / 2]`, `M.scale` F8_E8M0 `[out, in / 32]` | DeepSeek V4, experts |
| `W_packed` I32, `W_scale`, `W_shape` I32 or I64 | compressed-tensors `pack-quantized`, Kimi K2 |
| `W_packed` U8 `[out, in / 2]`, `W_scale` U8 `[out, in / 32]` | `mxfp4-pack-quantized`, Kimi K3 |
| `W_packed` U8, `W_scale` F8_E4M3 `[out, in / 16]`, `W_global_scale` F32 | `nvfp4-pack-quantized` |
| `W` U8, `W_scale` F8_E4M3 `[out, in / 16]`, `W_scale_2` F32 | ModelOpt NVFP4 |
| `W_blocks` U8 `[E, out, in / 32, 16]`, `W_scales` U8 `[E, out, in / 32]` | gpt-oss |

Scales are divided by `W_global_scale`, and multiplied with `W_scale_2`. Zero points are all 0.

Sources: compressed-tensors 0.20, ModelOpt 0.47, transformers 5.24, and the published loaders of each model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from daq_jax.errors import refuse
from daq_jax.formats import Format, fp4_e2m1, fp8_e4m3fn, fp8_e5m2, int4, int8
from daq_jax.io.hf.architectures import part_of
from daq_jax.io.hf.codings import Coding, ScaleStorage, TwoLevels, scale_grid, storage_of
from daq_jax.io.hf.methods import quantization_of
from daq_jax.io.hf.packing import Nibbles, Packing, Plain, Words
from daq_jax.io.hf.tensor_files import TensorSpec
from daq_jax.tilings import Block, Channel, Group, PerTensor, Tiling

_FORMATS: dict[str, Format] = {"F8_E4M3": fp8_e4m3fn, "F8_E5M2": fp8_e5m2, "I8": int8}
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_SUFFIXES = ("_scale_inv", "_scale")
_ASYMMETRIC = ("_zero_point", "_g_idx")  # of packed weights: with zeros, or with inputs in another order
_ZEROS = ("_zero_point", "_offset", "_zeros")  # of weights of 8 bits: read if all are 0
_GROUPS = (16, 32, 64, 128, 256)  # inputs that share a scale, where nothing but the shapes tells
_MX = 32


def find_codings(
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    config: Mapping[str, Any],
    where: Path,
) -> dict[str, Coding]:
    """The codings of all quantized weights of a folder, by the names of the weights.

    Args:
        specs: every tensor of the folder.
        read: gives a tensor by name; called for shapes of packed weights, for factors and for zero points.
        config: the folder's `config.json`, which may name the size of blocks.
        where: path of the folder, for messages.

    Raises:
        DaqError: naming every weight that has scales but fits no layout.
    """
    search = _Search(specs, read, _block_of(config), quantization_of(config).get("scale_fmt") == "ue8m0")
    found = {}
    for stored in specs:
        weight = search.weight_of(stored)
        if weight is not None:
            coding = search.coding(weight, stored)
            if coding is not None:
                found[weight] = coding
    search.problems += [
        f"{weight!r} comes with {name!r}, which no known coding has: dequantize it with the tool that made it"
        for name in specs
        if (weight := _weight_beside(name)) in found
        and name not in found[weight].specs
        and not name.endswith(_ZEROS)  # all of them are 0
    ]
    if search.problems:
        refuse(f"{where}: quantized weights that cannot be read", search.problems, one_line=True)
    return found


def _weight_beside(name: str) -> str:
    """The weight whose name a tensor of the same module carries on, as `W_scale` does; "" for none."""
    module, found, _ = name.rpartition(".weight_")
    return f"{module}.weight" if found else ""


@dataclasses.dataclass
class _Search:
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]
    block: tuple[int, int]
    powers: bool
    problems: list[str] = dataclasses.field(default_factory=list)

    def weight_of(self, stored: str) -> str | None:
        """The name of the weight whose codes a tensor may hold."""
        dtype, ndim = self.specs[stored].dtype, len(self.specs[stored].shape)
        if stored.endswith("_blocks") and dtype == "U8" and f"{stored[:-7]}_scales" in self.specs:
            return stored.removesuffix("_blocks")
        if stored.endswith("_packed") and dtype in ("I32", "U8"):
            return stored.removesuffix("_packed")
        return stored if ndim >= 2 and dtype in (*_FORMATS, "U8") else None

    def coding(self, weight: str, codes: str) -> Coding | None:
        """The coding of a weight; None if it has none, or one that cannot be read: see `problems`."""
        if codes == f"{weight}_blocks":
            return self._nibbles(weight, codes, f"{weight}_scales", blocks=16)
        if codes != weight and self.specs[codes].dtype == "I32":
            return self._words(weight, codes)
        scale = self._scale_of(weight)
        if scale is None:
            return None
        halves = codes != weight or self.specs[codes].dtype == "U8" or self._is_fp4(codes, scale)
        return self._nibbles(weight, codes, scale) if halves else self._plain(weight, scale)

    def _scale_of(self, weight: str) -> str | None:
        names = [weight + suffix for suffix in _SUFFIXES]
        if weight.endswith(".weight"):
            names.append(weight.removesuffix("weight") + "scale")
        return next((name for name in names if name in self.specs), None)

    def _is_fp4(self, codes: str, scale: str) -> bool:
        """Whether codes in I8 are two to a byte: their scales are exponents then."""
        return self.specs[codes].dtype == "I8" and self.specs[scale].dtype in ("U8", "F8_E8M0")

    def _plain(self, weight: str, scale: str) -> Coding | None:
        spec, beside = self.specs[weight], self.specs[scale]
        if (stray := self._shifts(weight)) is not None:
            self.problems.append(
                f"{weight!r} comes with {stray!r}; needed codes without zero points, or all of them 0, and "
                "inputs in their own order"
            )
            return None
        tiling = _tiling(spec.shape, beside.shape, self.block)
        storage = storage_of(beside.dtype, self.powers)
        if tiling is None or storage is None:
            self.problems.append(
                f"{weight!r} is {spec.dtype} {spec.shape} but {scale!r} is {beside.dtype} {beside.shape}; "
                f"needed one of {', '.join(_SCALE_DTYPES)}, with one scale for the matrix, for each row, for "
                f"each block of {self.block[0]} x {self.block[1]}, or for each group of a row"
            )
            return None
        zeros = [weight + end for end in _ZEROS if weight + end in self.specs]
        how = weight, Plain(spec.dtype), scale, storage, zeros
        return self._made(spec.shape, _FORMATS[spec.dtype], tiling, *how)

    def _shifts(self, weight: str) -> str | None:
        """A tensor that makes a weight something else than codes times scales; None if there is none."""
        if f"{weight}_g_idx" in self.specs:
            return f"{weight}_g_idx"
        zeros = (weight + end for end in _ZEROS if weight + end in self.specs)
        return next((name for name in zeros if self.read(name).astype(np.float32).any()), None)

    def _nibbles(self, weight: str, codes: str, scale: str, blocks: int = 0) -> Coding | None:
        """4-bit floats, two to a byte."""
        spec, beside = self.specs[codes], self.specs[scale]
        packing = Nibbles(spec.dtype, blocks)
        last = math.prod(spec.shape[-2:]) if blocks else spec.shape[-1] if spec.shape else 0
        shape = (*spec.shape[: -2 if blocks else -1], 2 * last)
        two_level = beside.dtype == "F8_E4M3"
        tiling = Group(16 if two_level else _MX)
        factor = self._factor(weight) if two_level else None
        fits = (
            packing.spec(shape) == spec
            and len(shape) >= 2
            and 0 not in shape
            and shape[-1] % tiling.n == 0
            and scale_grid(shape, tiling) == beside.shape
        )
        storage = TwoLevels(*factor[1:]) if factor else storage_of(beside.dtype, False)
        if not fits or storage is None or beside.dtype not in ("F8_E4M3", "F8_E8M0", "U8"):
            self.problems.append(
                f"{codes!r} is {spec.dtype} {spec.shape} and {scale!r} {beside.dtype} {beside.shape}; "
                "needed 4-bit floats, two to a byte, in groups of 32 with exponents, or of 16 with F8_E4M3 "
                f"and {weight + '_global_scale'!r} or {weight + '_scale_2'!r}, one F32 above 0"
            )
            return None
        if weight != codes and weight in self.specs:
            self.problems.append(f"{codes!r} is there beside {weight!r}")
            return None
        constants = [factor[0]] if factor else []
        return self._made(shape, fp4_e2m1, tiling, codes, packing, scale, storage, constants)

    def _factor(self, weight: str) -> tuple[str, float, bool] | None:
        """The tensor with the factor of all scales, its number, and whether scales are divided by it."""
        for suffix, divides in (("_global_scale", True), ("_scale_2", False)):
            spec = self.specs.get(weight + suffix)
            if spec is not None and spec.dtype == "F32" and spec.size == 1:
                number = float(self.read(weight + suffix).reshape(()))
                if 0 < number < math.inf:
                    return weight + suffix, number, divides
        return None

    def _words(self, weight: str, words: str) -> Coding | None:
        """Integers, several to a 32-bit word."""
        spec, scale, shape = self.specs[words], f"{weight}_scale", f"{weight}_shape"
        if not {scale, shape} <= self.specs.keys():
            return None
        beside, listed = self.specs[scale], self.specs[shape]
        is_shape = listed.dtype in ("I64", "I32") and listed.shape == (2,)
        outputs, inputs = map(int, self.read(shape)) if is_shape else (0, 0)
        says = (
            f"says {outputs} x {inputs}" if is_shape else f"is {listed.dtype}, needed I32 or I64 of 2 numbers"
        )
        more = [weight + s for s in _ASYMMETRIC if weight + s in self.specs]
        tiling = _groups(outputs, inputs, beside)
        sizes = ((4, int4), (8, int8))
        kind = next((k for k in sizes if Words(k[0]).spec((outputs, inputs)) == spec), None)
        storage = storage_of(beside.dtype, False)
        if more or tiling is None or kind is None or storage is None or weight in self.specs:
            self.problems.append(
                f"{words!r} is {spec.dtype} {spec.shape}, {scale!r} {beside.dtype} {beside.shape} and "
                f"{shape!r} {says}"
                + (f", with {more[0]!r}" if more else "")
                + "; needed 4 bits, symmetric, in whole groups along the inputs; or 8"
            )
            return None
        how = words, Words(kind[0]), scale, storage, [shape]
        return self._made((outputs, inputs), kind[1], tiling, *how)

    def _made(
        self,
        shape: tuple[int, ...],
        number: Format,
        tiling: Tiling,
        codes: str,
        packing: Packing,
        scale: str,
        storage: ScaleStorage,
        constants: Iterable[str] = (),
    ) -> Coding:
        fixed = {name: self.read(name) for name in constants}
        return Coding(
            shape, number, tiling, codes, packing, scale, self.specs[scale].shape, storage, constants=fixed
        )


def _groups(outputs: int, inputs: int, scale: TensorSpec) -> Tiling | None:
    """Groups, or a whole row; None if shape and scales do not fit."""
    if min(outputs, inputs) < 1 or len(scale.shape) != 2 or scale.shape[0] != outputs:
        return None
    groups = scale.shape[1]
    if not groups or inputs % groups:
        return None
    return Channel() if groups == 1 else Group(inputs // groups)


def _block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(outputs, inputs) of a block by a folder's config; 128 x 128 where it says nothing."""
    how = quantization_of(config)
    groups = part_of(how, "config_groups")
    sizes = [part_of(part_of(groups, name), "weights").get("block_structure") for name in groups]
    for size in (how.get("weight_block_size"), *sizes):
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return 128, 128


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
    if (
        scale[:-1] == (*batch, outputs)
        and scale[-1]
        and inputs // scale[-1] in _GROUPS
        and not inputs % scale[-1]
    ):
        return Group(inputs // scale[-1])
    return None
