"""Layouts of quantized weights in Hugging Face folders, as servers load them.

| layout | codes, after the weight's name | scale |
|---|---|---|
| `fp8-block` | F8_E4M3 `[out, in]` | `_scale_inv`, F32 `[out / 128, in / 128]` |
| `fp8-block-ue8m0` | F8_E4M3 `[out, in]` | as `fp8-block`, powers of two |
| `fp8-channel` | F8_E4M3 `[out, in]` | `_scale`, F32 `[out, 1]` |
| `int8-channel` | I8 `[out, in]` | `_scale`, F32 `[out, 1]` |
| `int4-group`, `int4-group32`, `int4-group64` | `_packed`, I32 | `_scale`, F32 `[out, in / group]` |
| `int8-group32` | `_packed`, I32 | `_scale`, F32 `[out, in / 32]` |
| `mxfp4` | `_packed`, U8 `[out, in / 2]` | `_scale`, U8 `[out, in / 32]` |
| `mxfp8` | F8_E4M3 `[out, in]` | `_scale`, U8 `[out, in / 32]` |
| `nvfp4` | `_packed`, U8 `[out, in / 2]` | `_scale`, F8_E4M3 `[out, in / 16]`, over `_global_scale` |
| `nvfp4-modelopt` | U8 `[out, in / 2]` | `_scale`, F8_E4M3 `[out, in / 16]`, times `_scale_2` |
| `gpt-oss` | `_blocks`, U8 `[experts, out, in / 32, 16]` | `_scales`, U8 `[experts, out, in / 32]` |
| `deepseek-v4` | F8_E4M3 `[out, in]` | `.scale`, F8_E8M0 `[out / 128, in / 128]` |
| its experts | I8 `[out, in / 2]` | `.scale`, F8_E8M0 `[out, in / 32]` |

Those of blocks are DeepSeek's, which transformers reads; of channels, integers, `mxfp` and `nvfp4`, those of
compressed-tensors. A weight is `code * scale` in all; `packing` tells how codes are packed. Experts may be
one matrix each, or fused, `[experts, out, in]` under `experts.gate_up_proj` and `experts.down_proj`; their
scale bears that name, and the suffix of the scales. Of the packed forms only that of gpt-oss, which holds
nothing else, has one for fused experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daq_jax.formats import Format, fp4_e2m1, fp8_e4m3fn, int4, int8
from daq_jax.io.hf.codings import Coding, Exponents, Floats, ScaleStorage, TwoLevels, scale_grid
from daq_jax.io.hf.compressed_tensors import compressed_config, how_quantized
from daq_jax.io.hf.packed_int4 import group_of, packed_config
from daq_jax.io.hf.packing import Nibbles, Packing, Plain, Words
from daq_jax.io.hf.weight_names import divided_axis, is_expert, last_component
from daq_jax.tilings import Block, Channel, Group, Tiling

AS_BASE = "as-base"  # in place of the name of a layout: each weight as its base is stored
BLOCK = 128
GROUP = 128
_MX = 32  # elements of a group of OCP Microscaling
_NV = 16  # elements of a group of NVFP4
_NVFP4 = "W4A16_NVFP4"  # ModelOpt's word for weights in NVFP4 whose inputs are not quantized

Config = Callable[[Sequence[str]], dict[str, Any]]


def _no_config(skipped: Sequence[str]) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store quantized weights that servers load.

    Attributes:
        name: as the command line has it.
        format: number format of the codes.
        tiling: which elements share a scale.
        config: makes the `quantization_config`, given the names of the modules that are not quantized.
        packing: how the codes are stored.
        scale: end of the name of a scale, after the name of its weight; if it begins with a dot, after that
            of the module.
        codes: end of the name of the codes, after the name of their weight.
        storage: how the scales are stored, where they have no factor.
        factor: end of the name of the factor that all scales of a weight share; "" where there is none.
        divides: whether a scale is what is stored over that factor, in place of the product.
        lists_shape: whether the shape of a weight is stored, too.
        narrow_scales: whether servers hold scales in the model's own dtype, not in float32.
        beside: makes the `hf_quant_config.json`, given as `config` is; empty for none.
        model_type: the only type of model that is stored so; "" for any.
        only_experts: whether experts alone are quantized.
        experts: the layout of experts, where they have another.
        plain: pattern of the names of weights that models of this type are not quantized in; "" for none.
        says: what else the config of such a model says.
    """

    name: str
    format: Format
    tiling: Tiling
    config: Config
    packing: Packing
    scale: str = "_scale"
    codes: str = ""
    storage: ScaleStorage = Floats()
    factor: str = ""
    divides: bool = False
    lists_shape: bool = False
    narrow_scales: bool = False
    beside: Config = _no_config
    model_type: str = ""
    only_experts: bool = False
    experts: "Layout | None" = None
    plain: str = ""
    says: tuple[tuple[str, str], ...] = ()

    def of(self, name: str) -> "Layout":
        """The layout of one weight: this one, or that of experts."""
        return self.experts if self.experts is not None and is_expert(name) else self

    def coding(self, name: str, shape: tuple[int, ...], factor: float = 1.0) -> Coding:
        """How a weight `[..., out, in]` is stored; `factor` is that of its scales, if they have one."""
        constants: dict[str, np.ndarray] = {}
        storage = TwoLevels(factor, self.divides) if self.factor else self.storage
        if self.factor:
            constants[name + self.factor] = np.full((1,) if self.divides else (), factor, np.float32)
        if self.lists_shape:
            constants[f"{name}_shape"] = np.asarray(shape, np.int64)
        module = name.removesuffix(".weight") if self.scale.startswith(".") else name
        codes, scale, grid = name + self.codes, module + self.scale, scale_grid(shape, self.tiling)
        how = codes, self.packing, scale, grid, storage
        return Coding(shape, self.format, self.tiling, *how, constants=constants)

    def why_not(self, name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
        """Why a weight cannot be stored in this way for a server.

        Args:
            name: name of the weight.
            shape: shape of the weight, `[..., out, in]`.
            tp: number of devices over which the server divides each weight.
            kv_heads: heads of keys and values; None if the config names no number.

        Returns:
            The reason; "" if it can be stored.
        """
        single = (self.codes and not self.only_experts) or self.scale.startswith(".")
        return f"fused experts, which {self.name} has no form for" if len(shape) > 2 and single else ""


class BlockLayout(Layout):
    """Blocks, which must be whole on each device."""

    def why_not(self, name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
        """See `Layout.why_not`."""
        return super().why_not(name, shape, tp, kv_heads) or why_not_blocks(name, shape, tp, kv_heads)


class GroupLayout(Layout):
    """Groups along the inputs, which must be whole on each device.

    vLLM and tpu-inference hold float scales of packed integers in the model's own dtype whatever the file
    has: scales that are no numbers of it would be rounded when they are loaded.
    """

    def why_not(self, name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
        """See `Layout.why_not`."""
        group = group_of(self.tiling)
        assert group is not None
        return super().why_not(name, shape, tp, kv_heads) or why_not_groups(name, shape, tp, group)


def _fine_grained(skipped: Sequence[str], **more: Any) -> dict[str, Any]:
    # Both keys, and each module by its full name: older vLLM reads only `ignored_layers`, and compares whole
    # names; transformers reads the other, and adds `lm_head` by itself only where there is no list.
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(skipped),
        "ignored_layers": list(skipped),
    } | more


def _of_channels(kind: str, stored_as: str) -> Config:
    def config(skipped: Sequence[str]) -> dict[str, Any]:
        weights, inputs = how_quantized(8, kind, "channel"), how_quantized(8, kind, "token", dynamic=True)
        return compressed_config(stored_as, skipped, weights=weights, inputs=inputs)

    return config


def _of_groups(bits: int, group: int, stored_as: str, scale_dtype: str, strategy: str = "group") -> Config:
    """Of floats in groups; the inputs of layers are not quantized."""

    def config(skipped: Sequence[str]) -> dict[str, Any]:
        weights = how_quantized(bits, "float", strategy, group_size=group, scale_dtype=scale_dtype)
        return compressed_config(stored_as, skipped, weights=weights)

    return config


def _modelopt(skipped: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": _NVFP4, "ignore": list(skipped)} | {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "group_size": _NV, "dynamic": False},
            }
        }
    }


def _modelopt_beside(skipped: Sequence[str]) -> dict[str, Any]:
    how = {"quant_algo": _NVFP4, "kv_cache_quant_algo": None, "group_size": _NV}
    return {"producer": {"name": "daq_jax"}, "quantization": how | {"exclude_modules": list(skipped)}}


def _gpt_oss(skipped: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(skipped)}


def _packed(name: str, number: Format, bits: int, group: int) -> Layout:
    """Integers in words, in groups."""
    config = functools.partial(packed_config, group, bits=bits)
    how = {"codes": "_packed", "lists_shape": True, "narrow_scales": True}
    return GroupLayout(name, number, Group(group), config, Words(bits), **how)


_FP8 = Plain("F8_E4M3")
_MX4 = _of_groups(4, _MX, "mxfp4-pack-quantized", "torch.uint8")
_MX8 = _of_groups(8, _MX, "mxfp8-quantized", "torch.uint8")
_NV4 = _of_groups(4, _NV, "nvfp4-pack-quantized", "torch.float8_e4m3fn", "tensor_group")
_UE8M0 = functools.partial(_fine_grained, scale_fmt="ue8m0")
_V4 = functools.partial(_UE8M0, expert_dtype="fp4")
_V4_EXPERTS = GroupLayout(
    "deepseek-v4", fp4_e2m1, Group(_MX), _no_config, Nibbles("I8"), ".scale", storage=Exponents("F8_E8M0")
)
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        BlockLayout("fp8-block", fp8_e4m3fn, Block(BLOCK, BLOCK), _fine_grained, _FP8, "_scale_inv"),
        BlockLayout(
            "fp8-block-ue8m0",
            fp8_e4m3fn,
            Block(BLOCK, BLOCK),
            _UE8M0,
            _FP8,
            "_scale_inv",
            storage=Floats(powers=True),
        ),
        Layout("fp8-channel", fp8_e4m3fn, Channel(), _of_channels("float", "float-quantized"), _FP8),
        Layout("int8-channel", int8, Channel(), _of_channels("int", "int-quantized"), Plain("I8")),
        _packed("int4-group", int4, 4, GROUP),
        _packed("int4-group32", int4, 4, 32),
        _packed("int4-group64", int4, 4, 64),
        _packed("int8-group32", int8, 8, 32),
        GroupLayout("mxfp4", fp4_e2m1, Group(_MX), _MX4, Nibbles(), codes="_packed", storage=Exponents("U8")),
        GroupLayout("mxfp8", fp8_e4m3fn, Group(_MX), _MX8, _FP8, storage=Exponents("U8")),
        GroupLayout(
            "nvfp4",
            fp4_e2m1,
            Group(_NV),
            _NV4,
            Nibbles(),
            codes="_packed",
            factor="_global_scale",
            divides=True,
        ),
        GroupLayout(
            "nvfp4-modelopt",
            fp4_e2m1,
            Group(_NV),
            _modelopt,
            Nibbles(),
            factor="_scale_2",
            beside=_modelopt_beside,
        ),
        GroupLayout(
            "gpt-oss",
            fp4_e2m1,
            Group(_MX),
            _gpt_oss,
            Nibbles(blocks=16),
            "_scales",
            "_blocks",
            Exponents("U8"),
            model_type="gpt_oss",
            only_experts=True,
        ),
        BlockLayout(
            "deepseek-v4",
            fp8_e4m3fn,
            Block(BLOCK, BLOCK),
            _V4,
            _FP8,
            ".scale",
            storage=Exponents("F8_E8M0"),
            model_type="deepseek_v4",
            experts=_V4_EXPERTS,
            plain=r"\.(compressor\.\w+|weights_proj)\.weight$",  # transformers 5.24, deepseek_v4
            says=(("expert_dtype", "fp4"),),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of machine that will serve the result.

    Attributes:
        layout: name of the layout to write unless told otherwise.
        instead: layouts whose scales its servers would quantize anew, each with one whose scales they keep.
        notes: what its servers do to the scales, by the name of the layout.
    """

    layout: str
    instead: dict[str, str]
    notes: dict[str, str]


_KEPT = "vLLM and SGLang use the scales as they are stored"
_VLLM = "vLLM uses the scales as they are stored"
_NOTES = {name: _KEPT if "fp8-" in name or "int" in name else _VLLM for name in LAYOUTS}
TARGETS: dict[str, Target] = {
    "hopper": Target("fp8-block", {}, _NOTES),
    "blackwell": Target(
        "fp8-channel",
        {"fp8-block": "fp8-block-ue8m0"},
        _NOTES
        | {
            "fp8-block-ue8m0": "DeepGEMM takes powers of two alone: only such scales are written, which "
            "servers keep, and no search of scales can gain anything under them"
        },
    ),
    "tpu": Target(
        "fp8-channel",
        {},
        dict.fromkeys(LAYOUTS, "tpu-inference is not known to load this layout")
        | dict.fromkeys(
            ("fp8-block", "fp8-block-ue8m0"),
            "tpu-inference re-quantizes blocks to one AbsMax scale for each output, which undoes the choice "
            "made here, unless DISABLE_WEIGHT_REQUANTIZATION=1 is set; it uses fp8-channel as it is",
        )
        | dict.fromkeys(
            ("int4-group", "int4-group64", "int4-group32"),
            "tpu-inference takes groups of dense models alone, and only groups that are narrower than its "
            "matrix unit",
        )
        | dict.fromkeys(
            ("gpt-oss", "deepseek-v4"),
            "tpu-inference re-quantizes MXFP4 experts in blocks of 512, which undoes the choice made here",
        )
        | {
            "fp8-channel": "tpu-inference uses one scale for each output as it is stored",
            "int8-channel": "tpu-inference refuses it where it serves with JAX",
            "nvfp4": "tpu-inference loads dense layers of it where it serves with PyTorch, no experts",
            "nvfp4-modelopt": "tpu-inference keeps the codes, and multiplies both levels of scales",
        },
    ),
}


def why_not_blocks(name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
    """Why a weight `[..., out, in]` cannot be cut into whole blocks on each of `tp` devices; "" if it can."""
    *_, outputs, inputs = shape
    if outputs % BLOCK or inputs % BLOCK:
        return f"not a multiple of {BLOCK} x {BLOCK}: {outputs} x {inputs}"
    last, axis = last_component(name), divided_axis(name)
    if tp == 1 or not axis:
        return ""
    # Heads of keys and values are copied, not cut, where there are more devices than heads.
    parts = min(tp, kv_heads or tp) if last in ("k_proj", "v_proj", "key", "value") else tp
    whole = inputs if axis == "inputs" else outputs
    whole = whole // 2 if last == "gate_up_proj" else whole
    if whole % (parts * BLOCK):
        return f"not a multiple of {BLOCK} on each device: {whole} {axis} over {parts} devices"
    return ""


def why_not_groups(name: str, shape: Sequence[int], tp: int, group: int) -> str:
    """Why a weight `[..., out, in]` cannot be cut into whole groups on each of `tp` devices; "" if it can."""
    inputs = shape[-1]
    if inputs % group:
        return f"no whole number of groups of {group}: {inputs} inputs"
    if divided_axis(name) == "inputs" and inputs % (tp * group):
        return f"no whole number of groups of {group} on each device: {inputs} inputs over {tp} devices"
    return ""
