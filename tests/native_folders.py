"""Weights as models ship them in 4 and 8 bits, with decoders written from the definitions, byte by byte.

Nothing here comes from daq_jax. A layout makes the tensors of one weight from random codes, and decodes them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.hf_folders import BF16, E4M3, E8M0, Tensors, normal

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1(code: int) -> float:
    """Value of a 4-bit float: a sign, two bits of exponent, one of mantissa."""
    return -LEVELS[code & 7] if code & 8 else LEVELS[code & 7]


def e4m3(byte: int) -> float:
    """Value of a byte as FP8: a sign, four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 128 else size


E2M1 = np.array([e2m1(code) for code in range(16)], np.float32)
FP8 = np.array([e4m3(byte) for byte in range(256)], np.float32)


def two_to_a_byte(data: np.ndarray) -> np.ndarray:
    """`[..., n]` bytes as `[..., 2 n]` values: the low nibble comes first."""
    data = data.view(np.uint8)
    return np.stack([E2M1[data & 15], E2M1[data >> 4]], -1).reshape(*data.shape[:-1], -1)


def exponents(data: np.ndarray) -> np.ndarray:
    return np.exp2(data.view(np.uint8).astype(np.float64) - 127).astype(np.float32)


def along_inputs(scale: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(scale, group, axis=-1)


def in_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Integers of a row of 32-bit words, each stored with half of its range added."""
    wide = words.view(np.uint32).astype(np.uint64)
    each = [(wide >> np.uint64(bits * i)) & np.uint64(2**bits - 1) for i in range(32 // bits)]
    return np.stack(each, -1).reshape(*words.shape[:-1], -1).astype(np.int64) - 2 ** (bits - 1)


@dataclasses.dataclass(frozen=True)
class Native:
    """One layout.

    Attributes:
        name: of the weight.
        make: makes its tensors, of a weight `[out, in]` or `[experts, out, in]`.
        decode: the float32 weight `[..., out, in]` of such tensors.
        config: what the config says of quantization.
        codes: name of the tensor that holds the codes.
        scale: name of the tensor that holds the scales.
        turned: whether the bfloat16 form is `[experts, in, out]`.
    """

    name: str
    make: Callable[[np.random.Generator], Tensors]
    decode: Callable[[Tensors], np.ndarray]
    config: dict
    codes: str
    scale: str
    turned: bool = False


def powers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Exponents of the scales of weights of about 0.02."""
    return rng.integers(118, 121, shape).astype(np.uint8)


def compressed(stored_as: str, bits: int, kind: str, group: int, **more: object) -> dict:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | more}}
    how = {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": groups}
    return how | {"ignore": ["lm_head"]}


def bell(rng: np.random.Generator, largest: int, *shape: int) -> np.ndarray:
    """Whole numbers from -largest - 1 to largest, most of them small, as codes are."""
    return np.clip(np.round(largest / 2.5 * rng.normal(size=shape)), -largest - 1, largest).astype(np.int64)


def nibbles(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """4-bit floats, as codes of weights with a normal distribution are."""
    values = np.abs(2.2 * rng.normal(size=(*shape, 2)))
    index = np.abs(values[..., None] - np.array(LEVELS)).argmin(-1)
    codes = (index | rng.integers(0, 2, index.shape) << 3).astype(np.uint8)
    return codes[..., 0] | codes[..., 1] << np.uint8(4)


def gpt_oss(name: str, experts: int, outputs: int, inputs: int) -> Native:
    def make(rng: np.random.Generator) -> Tensors:
        return {
            f"{name}_blocks": nibbles(rng, experts, outputs, inputs // 32, 16),
            f"{name}_scales": powers(rng, experts, outputs, inputs // 32),
        }

    def decode(t: Tensors) -> np.ndarray:
        values = two_to_a_byte(t[f"{name}_blocks"]).reshape(experts, outputs, inputs)
        return values * along_inputs(exponents(t[f"{name}_scales"]), 32)

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return Native(name, make, decode, config, f"{name}_blocks", f"{name}_scales", turned=True)


def mxfp4_pack(name: str, outputs: int, inputs: int) -> Native:
    def make(rng: np.random.Generator) -> Tensors:
        return {
            f"{name}_packed": nibbles(rng, outputs, inputs // 2),
            f"{name}_scale": powers(rng, outputs, inputs // 32),
        }

    def decode(t: Tensors) -> np.ndarray:
        return two_to_a_byte(t[f"{name}_packed"]) * along_inputs(exponents(t[f"{name}_scale"]), 32)

    config = compressed("mxfp4-pack-quantized", 4, "float", 32)
    return Native(name, make, decode, config, f"{name}_packed", f"{name}_scale")


def nvfp4_pack(name: str, outputs: int, inputs: int) -> Native:
    def make(rng: np.random.Generator) -> Tensors:
        return {
            f"{name}_packed": nibbles(rng, outputs, inputs // 2),
            f"{name}_scale": rng.integers(96, 120, (outputs, inputs // 16)).astype(np.uint8).view(E4M3),
            f"{name}_global_scale": np.array([17321.5], np.float32),
        }

    def decode(t: Tensors) -> np.ndarray:
        local = FP8[t[f"{name}_scale"].view(np.uint8)]
        scale = local / t[f"{name}_global_scale"]
        return two_to_a_byte(t[f"{name}_packed"]) * along_inputs(scale, 16)

    config = compressed("nvfp4-pack-quantized", 4, "float", 16, strategy="tensor_group")
    return Native(name, make, decode, config, f"{name}_packed", f"{name}_scale")


def nvfp4_modelopt(name: str, outputs: int, inputs: int) -> Native:
    def make(rng: np.random.Generator) -> Tensors:
        return {
            name: nibbles(rng, outputs, inputs // 2),
            f"{name}_scale": rng.integers(96, 120, (outputs, inputs // 16)).astype(np.uint8).view(E4M3),
            f"{name}_scale_2": np.array(5.77e-5, np.float32),
        }

    def decode(t: Tensors) -> np.ndarray:
        scale = FP8[t[f"{name}_scale"].view(np.uint8)] * t[f"{name}_scale_2"]
        return two_to_a_byte(t[name]) * along_inputs(scale, 16)

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return Native(name, make, decode, config, name, f"{name}_scale")


def packed(name: str, outputs: int, inputs: int, bits: int, group: int, shape: type) -> Native:
    """Integers in words."""

    def make(rng: np.random.Generator) -> Tensors:
        codes = bell(rng, 2 ** (bits - 1) - 1, outputs, inputs)
        each = 32 // bits
        words = sum((codes[:, i::each] + 2 ** (bits - 1)) << bits * i for i in range(each))
        size = 0.02 * 2.5 / 2 ** (bits - 1)
        return {
            f"{name}_packed": np.asarray(words).astype(np.uint32).view(np.int32),
            f"{name}_scale": (size * rng.uniform(0.7, 1.4, (outputs, inputs // group))).astype(BF16),
            f"{name}_shape": np.array([outputs, inputs], shape),
        }

    def decode(t: Tensors) -> np.ndarray:
        codes = in_words(t[f"{name}_packed"], bits)[:, :inputs].astype(np.float32)
        return codes * along_inputs(t[f"{name}_scale"].astype(np.float32), group)

    config = compressed("pack-quantized", bits, "int", group)
    return Native(name, make, decode, config, f"{name}_packed", f"{name}_scale")


def fp8(name: str, outputs: int, inputs: int, kind: str) -> Native:
    """FP8: "mxfp8", or blocks of 128 x 128 with powers of two as DeepSeek V3.1 and as V4 stores them."""
    scale = f"{name.removesuffix('weight')}scale" if kind == "v4" else f"{name}_scale_inv"
    scale = f"{name}_scale" if kind == "mxfp8" else scale

    def make(rng: np.random.Generator) -> Tensors:
        codes = (80 * rng.normal(size=(outputs, inputs))).astype(np.float32).astype(E4M3)
        grid = (outputs, inputs // 32) if kind == "mxfp8" else (-(-outputs // 128), -(-inputs // 128))
        power = rng.integers(114, 116, grid).astype(np.uint8)
        stored = {"mxfp8": power, "v4": power.view(E8M0), "ue8m0": exponents(power)}[kind]
        return {name: codes, scale: stored}

    def decode(t: Tensors) -> np.ndarray:
        stored = t[scale] if kind == "ue8m0" else exponents(t[scale])
        rows = 1 if kind == "mxfp8" else 128
        wide = along_inputs(np.repeat(stored, rows, axis=-2), 32 if kind == "mxfp8" else 128)
        return FP8[t[name].view(np.uint8)] * wide[:outputs, :inputs]

    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = compressed("mxfp8-quantized", 8, "float", 32, scale_dtype="torch.uint8")
    return Native(name, make, decode, config if kind == "mxfp8" else how, name, scale)


def v4_experts(name: str, outputs: int, inputs: int) -> Native:
    scale = f"{name.removesuffix('weight')}scale"

    def make(rng: np.random.Generator) -> Tensors:
        codes, power = nibbles(rng, outputs, inputs // 2), powers(rng, outputs, inputs // 32)
        return {name: codes.view(np.int8), scale: power.view(E8M0)}

    def decode(t: Tensors) -> np.ndarray:
        return two_to_a_byte(t[name]) * along_inputs(exponents(t[scale]), 32)

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return Native(name, make, decode, config, name, scale)


def deepseek_v4(width: int = 128, inner: int = 128) -> list[Native]:
    """The quantized weights of a layer of DeepSeek V4: experts in FP4 and the others in FP8."""
    attention = {"wq_a": (width, inner), "wo_b": (inner, width)}
    found = [fp8(f"layers.0.attn.{name}.weight", *size, "v4") for name, size in attention.items()]
    found.append(fp8("layers.0.ffn.shared_experts.w1.weight", width, inner, "v4"))
    shapes = {"w1": (width, inner), "w2": (inner, width), "w3": (width, inner)}
    experts = [(f"layers.0.ffn.experts.{e}.{n}.weight", size) for e in range(2) for n, size in shapes.items()]
    return found + [v4_experts(name, *size) for name, size in experts]


def natives(outputs: int, inputs: int) -> dict[str, Native]:
    """Every layout by name, of matrices of one size."""
    size, expert = (outputs, inputs), "model.layers.1.mlp.experts.0.up_proj.weight"
    return {
        "gpt-oss": gpt_oss("model.layers.0.mlp.experts.gate_up_proj", 2, *size),
        "mxfp4-pack": mxfp4_pack(expert, *size),
        "nvfp4-pack": nvfp4_pack(expert, *size),
        "nvfp4-modelopt": nvfp4_modelopt("model.layers.0.mlp.up_proj.weight", *size),
        "int4-g32 I32": packed(expert, *size, 4, 32, np.int32),
        "int4-g64": packed(expert, *size, 4, 64, np.int64),
        "int4-g128": packed(expert, *size, 4, 128, np.int64),
        "int8-g64": packed(expert, *size, 8, 64, np.int64),
        "mxfp8": fp8("model.layers.0.mlp.up_proj.weight", *size, "mxfp8"),
        "fp8 ue8m0": fp8("model.layers.0.mlp.up_proj.weight", *size, "ue8m0"),
        "v4 fp8": fp8("layers.0.attn.wq_a.weight", *size, "v4"),
        "v4 experts": v4_experts("layers.1.ffn.experts.0.w1.weight", *size),
    }


BY_LAYOUT = list(natives(128, 128))


def low_rank(seed: int, like: np.ndarray, size: float) -> np.ndarray:
    """A change of rank 8, of a size relative to that of the weights."""
    *batch, outputs, inputs = like.shape
    change = normal(seed, *batch, outputs, 8) @ normal(seed + 1, *batch, 8, inputs)
    return size * np.linalg.norm(like) / np.linalg.norm(change) * change


def kept_of(change: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """Projection, and error along the eight leading directions of a change."""
    projection = np.sum(change * kept) / np.sum(change * change)
    error, size = 0.0, 0.0
    for d, q in zip(
        change.reshape(-1, *change.shape[-2:]), kept.reshape(-1, *change.shape[-2:]), strict=True
    ):
        u, s, v = np.linalg.svd(d, full_matrices=False)
        error += np.linalg.norm(u[:, :8].T @ (q - d) @ v[:8].T) ** 2
        size += np.linalg.norm(s[:8]) ** 2
    return projection, (error / size) ** 0.5
