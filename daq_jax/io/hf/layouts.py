"""What Hugging Face folders call things: formats that servers load, which weights they fuse, what they skip.

| layout | codes under `<module>.weight` | scale, float32 |
|---|---|---|
| `fp8-block`: transformers, DeepSeek | F8_E4M3 `[out, in]` | `weight_scale_inv`, `[out / 128, in / 128]` |
| `fp8-channel`: compressed-tensors | F8_E4M3 `[out, in]` | `weight_scale`, `[out, 1]` |
| `int8-channel`: compressed-tensors | I8 `[out, in]` | `weight_scale`, `[out, 1]` |
| `int4-group`: compressed-tensors | see `packing` | `weight_scale`, `[out, in / 128]` |

A weight is `code * scale` in all of them; vLLM and SGLang read all four. Experts may be one matrix each, or
fused, `[experts, out, in]` under `experts.gate_up_proj` and `experts.down_proj`; their scale bears that name,
and the suffix of the scales. Only packed int4 has no form for fused experts.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from daq_jax.formats import Format, fp8_e4m3fn, int4, int8
from daq_jax.io.hf.codings import Coding, Floats, scale_grid
from daq_jax.io.hf.compressed_tensors import compressed_config, how_quantized
from daq_jax.io.hf.packed_int4 import packed_config
from daq_jax.io.hf.packing import Plain, Words
from daq_jax.io.hf.tensor_files import TensorSpec
from daq_jax.tilings import Block, Channel, Group, Tiling

AS_BASE = "as-base"  # in place of the name of a layout: each weight as its base is stored
BLOCK = 128
GROUP = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store quantized weights that servers load.

    Attributes:
        name: as the command line has it.
        format: number format of the codes.
        tiling: which elements share a scale.
        suffix: end of the name of a scale, after the name of its weight.
        config: makes the `quantization_config`, given the names of the modules that are not quantized.
        narrow_scales: whether servers hold scales in the model's own dtype, not in float32.
    """

    name: str
    format: Format
    tiling: Tiling
    suffix: str
    config: Callable[[Sequence[str]], dict[str, Any]]
    narrow_scales: bool = False

    def coding(self, name: str, shape: tuple[int, ...]) -> Coding:
        """How a weight `[..., out, in]` is stored."""
        codes, grid = (
            Plain(TensorSpec.of(np.dtype(self.format.dtype), ()).dtype),
            scale_grid(shape, self.tiling),
        )
        return Coding(shape, self.format, self.tiling, name, codes, name + self.suffix, grid, Floats())

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
        return ""


class BlockLayout(Layout):
    """Blocks, which must be whole on each device."""

    def why_not(self, name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
        """See `Layout.why_not`."""
        return why_not_blocks(name, shape, tp, kv_heads)


class PackedLayout(Layout):
    """int4 in groups, several codes to a word; see `packing`.

    vLLM and tpu-inference hold the scales in the model's own dtype whatever the file has: scales that are no
    numbers of it would be rounded when they are loaded.
    """

    def coding(self, name: str, shape: tuple[int, ...]) -> Coding:
        """See `Layout.coding`."""
        weight = f"{module_of(name)}.weight"
        words, listed = f"{weight}_packed", {f"{weight}_shape": np.asarray(shape, np.int64)}
        grid, scale = scale_grid(shape, self.tiling), weight + self.suffix
        return Coding(
            shape, self.format, self.tiling, words, Words(4), scale, grid, Floats(), constants=listed
        )

    def why_not(self, name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
        """See `Layout.why_not`."""
        return why_not_groups(name, shape, tp)


def _fine_grained(skipped: Sequence[str]) -> dict[str, Any]:
    # Both keys, and each module by its full name: older vLLM reads only `ignored_layers`, and compares whole
    # names; transformers reads the other, and adds `lm_head` by itself only where there is no list.
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(skipped),
        "ignored_layers": list(skipped),
    }


def _of_channels(kind: str, stored_as: str) -> Callable[[Sequence[str]], dict[str, Any]]:
    def config(skipped: Sequence[str]) -> dict[str, Any]:
        weights, inputs = how_quantized(8, kind, "channel"), how_quantized(8, kind, "token", dynamic=True)
        return compressed_config(stored_as, skipped, weights=weights, inputs=inputs)

    return config


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        BlockLayout("fp8-block", fp8_e4m3fn, Block(BLOCK, BLOCK), "_scale_inv", _fine_grained),
        Layout("fp8-channel", fp8_e4m3fn, Channel(), "_scale", _of_channels("float", "float-quantized")),
        Layout("int8-channel", int8, Channel(), "_scale", _of_channels("int", "int-quantized")),
        PackedLayout(
            "int4-group",
            int4,
            Group(GROUP),
            "_scale",
            functools.partial(packed_config, GROUP),
            narrow_scales=True,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of machine that will serve the result.

    Attributes:
        layout: name of the layout to write unless told otherwise.
        power_of_two: layouts in which its servers would re-quantize scales that are no powers of two.
        notes: what its servers do to the scales, by the name of the layout.
    """

    layout: str
    power_of_two: tuple[str, ...]
    notes: dict[str, str]


_KEPT = "vLLM and SGLang use the scales as they are stored"
TARGETS: dict[str, Target] = {
    "hopper": Target("fp8-block", (), dict.fromkeys(LAYOUTS, _KEPT)),
    "blackwell": Target(
        "fp8-channel",
        ("fp8-block",),
        dict.fromkeys(LAYOUTS, _KEPT)
        | {
            "fp8-block": "DeepGEMM takes powers of two alone: only such scales are written, which servers "
            "keep, and no search of scales can gain anything under them"
        },
    ),
    "tpu": Target(
        "fp8-channel",
        (),
        dict.fromkeys(LAYOUTS, "tpu-inference uses one scale for each output as it is stored")
        | {
            "fp8-block": "tpu-inference re-quantizes blocks to one AbsMax scale for each output, which "
            "undoes the choice made here, unless DISABLE_WEIGHT_REQUANTIZATION=1 is set; it uses fp8-channel "
            "as it is",
            "int4-group": "tpu-inference uses the scales of groups as they are stored",
        },
    ),
}

# Modules that servers multiply as one, so that they share one decision; the last parts of their names.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_FUSED_EXPERTS = re.compile(r"(^|\.)experts\.(gate_up_proj|down_proj)$")
_EXPERTS = re.compile(r"^(?P<module>(.*\.)?experts)\.(\d+\.\w+\.weight|gate_up_proj|down_proj)$")
# Their inputs are divided among the devices of a server; of all others, the outputs.
_SPLIT_BY_INPUT = ("o_proj", "out_proj", "down_proj", "w2", "dense", "c_proj", "fc2", "dense_4h_to_h")
_NOT_SPLIT = ("q_a_proj", "kv_a_proj_with_mqa")


def module_of(name: str) -> str:
    """The module that a weight belongs to, as skip lists name it."""
    if _FUSED_EXPERTS.search(name):
        return name.rpartition(".")[0]
    return name.removesuffix(".weight")


def is_matrix(name: str, ndim: int) -> bool:
    """Whether a tensor is the weight of a linear layer, or of a stack of experts, by its name and axes."""
    return (ndim == 2 and name.endswith(".weight")) or (ndim == 3 and bool(_FUSED_EXPERTS.search(name)))


def fused_with(name: str) -> str:
    """A label that a weight shares with all others that servers fuse it with."""
    experts = _EXPERTS.match(name)
    if experts:
        return experts["module"]
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    group = next((g for g in _FUSED if last in g), (last,))
    return f"{parent}.{'+'.join(group)}"


def why_not_blocks(name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> str:
    """Why a weight `[..., out, in]` cannot be cut into whole blocks on each of `tp` devices; "" if it can."""
    *_, outputs, inputs = shape
    if outputs % BLOCK or inputs % BLOCK:
        return f"not a multiple of {BLOCK} x {BLOCK}: {outputs} x {inputs}"
    last = _last_component(name)
    if tp == 1 or last in _NOT_SPLIT:
        return ""
    by_input = last in _SPLIT_BY_INPUT
    # Heads of keys and values are copied, not cut, where there are more devices than heads.
    parts = min(tp, kv_heads or tp) if last in ("k_proj", "v_proj", "key", "value") else tp
    whole, axis = (inputs, "inputs") if by_input else (outputs, "outputs")
    whole = whole // 2 if last == "gate_up_proj" else whole
    if whole % (parts * BLOCK):
        return f"not a multiple of {BLOCK} on each device: {whole} {axis} over {parts} devices"
    return ""


def why_not_groups(name: str, shape: Sequence[int], tp: int) -> str:
    """Why a weight `[out, in]` cannot be cut into whole groups on each of `tp` devices; "" if it can."""
    if len(shape) > 2:
        return "fused experts, which packed int4 has no form for"
    inputs = shape[-1]
    if inputs % GROUP:
        return f"no whole number of groups of {GROUP}: {inputs} inputs"
    if _last_component(name) in _SPLIT_BY_INPUT and inputs % (tp * GROUP):
        return f"no whole number of groups of {GROUP} on each device: {inputs} inputs over {tp} devices"
    return ""


def _last_component(name: str) -> str:
    """Last component of the name of the layer that a weight belongs to."""
    return module_of(name).rpartition(".")[2] if not name.endswith("_proj") else name.rpartition(".")[2]


def skipped_modules(kept: Iterable[str], tied: bool) -> list[str]:
    """Full names of the modules that are not quantized, for a config's skip list.

    Args:
        kept: names of the two-dimensional weights and fused experts that stay as they are.
        tied: whether the output head is the embedding, and so has no weight of its own.
    """
    names = {module_of(name) for name in kept}
    names |= {match["module"] for name in kept if (match := _EXPERTS.match(name))}
    return sorted(names | ({"lm_head"} if tied else set()))
