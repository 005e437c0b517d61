"""Small Hugging Face folders, written by the reference writer."""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "num_key_value_heads": 2}

Tensors = dict[str, np.ndarray]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_folder(path: pathlib.Path, shards: list[Tensors], config: dict | None = None) -> pathlib.Path:
    """A folder in one file, or in shards with an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], path / "model.safetensors", {"format": "pt"})
        return path
    files = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards)}
    for file, tensors in files.items():
        safetensors.numpy.save_file(tensors, path / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(x.nbytes for s in shards for x in s.values())},
        "weight_map": {n: f for f, s in files.items() for n in s},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


DTYPES = {"F8_E4M3": E4M3, "F8_E8M0": E8M0, "BF16": BF16}
DTYPES |= {"U8": "<u1", "I8": "<i1", "I32": "<i4", "I64": "<i8", "F32": "<f4"}


def stored(path: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder, read from the definition of the format."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                a, b = (start + x for x in entry["data_offsets"])
                found[name] = entry["dtype"], tuple(entry["shape"]), raw[a:b]
    return found


def read_tensors(path: pathlib.Path) -> Tensors:
    """What the files of a folder hold."""
    read = stored(path).items()
    return {n: np.frombuffer(raw, DTYPES[kind]).reshape(shape).copy() for n, (kind, shape, raw) in read}


def llama(seed: int = 0, layers: int = 2, width: int = 128, inner: int = 128) -> Tensors:
    """Random weights by the names of a Llama."""
    shapes = {"model.embed_tokens.weight": (300, width), "model.norm.weight": (width,)}
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{w}_proj.weight": (width, width) for w in "qkvo"}
        shapes |= {f"{block}mlp.{w}_proj.weight": (inner, width) for w in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (width, inner), f"{block}input_layernorm.weight": (width,)}
    shapes["lm_head.weight"] = (300, width)
    return {
        name: (0.02 * normal(seed * 1000 + i, *shape)).astype(BF16)
        for i, (name, shape) in enumerate(shapes.items())
    }


def tuned_from(base: Tensors, seed: int = 1) -> Tensors:
    """The same weights, moved a little."""
    return {
        name: (x.astype(np.float32) + 5e-4 * normal(seed * 1000 + i, *x.shape)).astype(x.dtype)
        for i, (name, x) in enumerate(base.items())
    }


def in_shards(tensors: Tensors, n: int) -> list[Tensors]:
    """Tensors dealt out in order."""
    names = list(tensors)
    size = -(-len(names) // n)
    return [{k: tensors[k] for k in names[i : i + size]} for i in range(0, len(names), size)]


def spread(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """A grid of scales, each repeated over its block."""
    wide = scale.astype(np.float32).repeat(block[0], -2).repeat(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def to_fp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and AbsMax scales of 128 x 128 blocks, in NumPy."""
    rows, columns = (-(-n // 128) for n in x.shape)
    padded = np.zeros((rows * 128, columns * 128), np.float32)
    padded[: x.shape[0], : x.shape[1]] = x
    absmax = np.abs(padded).reshape(rows, 128, columns, 128).max((1, 3))
    scale = (absmax / np.float32(448)).astype(np.float32)
    return (x.astype(np.float32) / spread(scale, x.shape)).astype(E4M3), scale
