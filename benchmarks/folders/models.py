"""Checkpoint folders to measure on: models that exist as names and shapes, and folders written after them."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from daq_jax.io.hf.tensor_files import TensorSpec, TensorWriter, plan_file

SHARD = 5 * 10**9  # bytes, as Hugging Face cuts
WIDTH, INNER, HEADS, VOCABULARY = 3072, 8192, 1024, 128256


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that exists as names and shapes."""

    tensors: dict[str, TensorSpec]
    config: dict[str, Any]

    @property
    def shards(self) -> Iterator[dict[str, TensorSpec]]:
        """The tensors, dealt out in order."""
        shard: dict[str, TensorSpec] = {}
        filled = 0
        for name, spec in self.tensors.items():
            if filled + spec.nbytes > SHARD:
                yield shard
                shard, filled = {}, 0
            shard[name], filled = spec, filled + spec.nbytes
        yield shard


def llama(layers: int, vocabulary: int = VOCABULARY, width: int = WIDTH) -> Model:
    """Llama 3.2 3B with another number of layers, or another width in all its parts, in bfloat16."""
    inner, heads = (n * width // WIDTH for n in (INNER, HEADS))
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for word, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (heads, width),
            "self_attn.v_proj": (heads, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"{block}.{word}.weight"] = shape
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    return Model({name: TensorSpec("BF16", shape) for name, shape in shapes.items()}, config)


def deepseek(layers: int) -> Model:
    """DeepSeek-V3, 671B parameters with its 61 layers, as it ships: FP8 with scales of 128 x 128 blocks."""
    width, experts, inner = 7168, 256, 2048
    tensors: dict[str, TensorSpec] = {}

    def put(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = TensorSpec("F8_E4M3", shape)
        tensors[f"{name}.weight_scale_inv"] = TensorSpec("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))

    for word in ("model.embed_tokens", "lm_head"):
        tensors[f"{word}.weight"] = TensorSpec("BF16", (129280, width))
    for i in range(layers):
        block = f"model.layers.{i}"
        put(f"{block}.self_attn.q_a_proj", 1536, width)
        put(f"{block}.self_attn.q_b_proj", 24576, 1536)
        put(f"{block}.self_attn.kv_a_proj_with_mqa", 576, width)
        put(f"{block}.self_attn.kv_b_proj", 32768, 512)
        put(f"{block}.self_attn.o_proj", width, 16384)
        dense = ["mlp"] if i < 3 else ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(experts))]
        hidden = 18432 if i < 3 else inner
        for part in dense:
            put(f"{block}.{part}.gate_proj", hidden, width)
            put(f"{block}.{part}.up_proj", hidden, width)
            put(f"{block}.{part}.down_proj", width, hidden)
        if i >= 3:
            tensors[f"{block}.mlp.gate.weight"] = TensorSpec("BF16", (experts, width))
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return Model(tensors, {"torch_dtype": "bfloat16", "quantization_config": quantized})


def kimi(layers: int) -> tuple[Model, Model]:
    """A base as Kimi K3 ships, MXFP4 experts by the names of compressed-tensors, and its tune in bfloat16.

    Sizes are made up so that 92 layers have 2.8T parameters and 247,296 packed weights.
    """
    width, experts, inner = 7168, 896, 1568
    base: dict[str, TensorSpec] = {}
    tuned: dict[str, TensorSpec] = {}

    def put(name: str, *shape: int) -> None:
        base[f"{name}.weight"] = tuned[f"{name}.weight"] = TensorSpec("BF16", shape)

    put("lm_head", 163840, width)
    put("model.embed_tokens", 163840, width)
    for i in range(layers):
        block = f"model.layers.{i}"
        for word in ("q_proj", "k_proj", "v_proj", "o_proj"):
            put(f"{block}.self_attn.{word}", width, width)
        put(f"{block}.mlp.gate", experts, width)
        for e in range(experts):
            for word, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
                name = f"{block}.mlp.experts.{e}.{word}_proj.weight"
                rows, columns = shape
                base[f"{name}_packed"] = TensorSpec("U8", (rows, columns // 2))
                base[f"{name}_scale"] = TensorSpec("U8", (rows, columns // 32))
                tuned[name] = TensorSpec("BF16", shape)
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    quantized = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    quantized |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    config = {"model_type": "kimi_k3", "torch_dtype": "bfloat16"}
    return Model(base, config | {"quantization_config": quantized}), Model(tuned, config)


def make(path: Path, model: Model, seed: int | None) -> Path:
    """Writes a folder: base weights for seed 0, moved ones for another, holes of a sparse file for None."""
    path.mkdir(parents=True)
    shards = list(model.shards)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    made: dict[TensorSpec, np.ndarray] = {}
    for file, shard in zip(names, shards, strict=True):
        if seed is None:
            header, _ = plan_file(shard)
            (path / file).write_bytes(header)
            os.truncate(path / file, len(header) + sum(spec.nbytes for spec in shard.values()))
            continue
        with TensorWriter(path / file, shard) as writer:
            for name, spec in shard.items():
                if spec not in made:
                    made[spec] = content(name, spec, seed)
                writer.write(name, made[spec])
            writer.finish()
    where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(model.config))
    return path


def content(name: str, spec: TensorSpec, seed: int) -> np.ndarray:
    """What a tensor holds: weights, or the scales of codes."""
    assert spec.numpy_dtype is not None
    if "_scale" in name:
        return np.full(spec.shape, 0.01, spec.numpy_dtype)
    return weights(spec.shape, seed).reshape(spec.shape).astype(spec.numpy_dtype, copy=False)


def weights(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal weights of size 0.02, and for a seed above 0 moved by 2e-4; bfloat16."""
    draw = np.random.default_rng(0)
    found = np.empty(shape, ml_dtypes.bfloat16)
    for i in range(0, shape[0], 4096):
        rows = 0.02 * draw.standard_normal(found[i : i + 4096].shape, np.float32)
        moved = 2e-4 * seed * draw.standard_normal(rows.shape, np.float32)
        found[i : i + 4096] = rows + moved
    return found
