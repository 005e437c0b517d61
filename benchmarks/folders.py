"""Folders larger than memory: what memory the command takes, how long a plan takes, how fast work streams.

    python benchmarks/folders.py memory --disk DIR     # 6 GB and 12 GB of tuned weights under --memory 2
    python benchmarks/folders.py plan --disk DIR       # headers of 671B parameters over sparse files
    python benchmarks/folders.py speed --disk DIR      # beside the same tensors in memory, and beside a copy
    python benchmarks/folders.py speed --disk DIR --recipe default --layers 8 --out FILE     # on a GPU
    python benchmarks/folders.py speed --disk DIR --width 384 --layers 2 --out FILE          # tiny

Each prints its figures and writes them to `benchmarks/results/folders_<name>.json`. Folders are made below
DIR and removed. Peak memory is that of a process of its own, as the system counts it (`ru_maxrss`).
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro

import daq_jax as daq
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from daq_jax.io.hf.tensor_files import TensorSpec, TensorWriter, plan_file

RESULTS = Path(__file__).parent / "results"
RUN = "import sys; from daq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
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
        for name, spec in self.tensors.items():
            if sum(x.nbytes for x in shard.values()) + spec.nbytes > SHARD:
                yield shard
                shard = {}
            shard[name] = spec
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


def deepseek() -> Model:
    """DeepSeek-V3, 671B parameters, as it ships: FP8 with scales of 128 x 128 blocks."""
    width, experts, inner = 7168, 256, 2048
    tensors: dict[str, TensorSpec] = {}

    def put(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = TensorSpec("F8_E4M3", shape)
        tensors[f"{name}.weight_scale_inv"] = TensorSpec("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))

    for word in ("model.embed_tokens", "lm_head"):
        tensors[f"{word}.weight"] = TensorSpec("BF16", (129280, width))
    for i in range(61):
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
                    made[spec] = weights(spec.shape, seed)
                writer.write(name, made[spec])
            writer.finish()
    where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(model.config))
    return path


def weights(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal weights of size 0.02, and for a seed above 0 moved by 2e-4; bfloat16."""
    draw = np.random.default_rng(0)
    found = np.empty(shape, ml_dtypes.bfloat16)
    for i in range(0, shape[0], 4096):
        rows = 0.02 * draw.standard_normal(found[i : i + 4096].shape, np.float32)
        moved = 2e-4 * seed * draw.standard_normal(rows.shape, np.float32)
        found[i : i + 4096] = rows + moved
    return found


def run(*words: str | Path) -> dict[str, float]:
    """Seconds and peak memory of `daq-jax` with these words, as a process of its own."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", RUN, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"daq-jax ended with {status}")
    return {"seconds": time.monotonic() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def memory(disk: Path, recipe: str = "absmax", layers: tuple[int, int] = (27, 56), limit: float = 2) -> None:
    """Peak memory on two checkpoints, one twice the other."""
    rows = []
    for n in layers:
        here, model = disk / "folders_memory", llama(n)
        base, tuned = make(here / "base", model, 0), make(here / "tuned", model, 1)
        size = sum(spec.nbytes for spec in model.tensors.values()) / 1e9
        found = run("quantize", base, tuned, here / "out", "--recipe", recipe, "--memory", str(limit))
        rows.append({"layers": n, "tuned_gb": size, **found})
        shutil.rmtree(here)
    first, second = (row["peak_gb"] for row in rows)
    note("memory", {"recipe": recipe, "limit_gb": limit, "runs": rows, "ratio": second / first})


def plan(disk: Path) -> None:
    """Time and memory of the plan of a folder of 671B parameters."""
    here, model = disk / "folders_plan", deepseek()
    base, tuned = make(here / "base", model, None), make(here / "tuned", model, None)
    parameters = sum(spec.size for spec in model.tensors.values() if spec.dtype != "F32")
    found = run("quantize", base, tuned, here / "out", "--plan", "--recipe", "absmax", "--memory", "8")
    shutil.rmtree(here)
    note("plan", {"parameters": parameters, "tensors": len(model.tensors), **found})


def speed(
    disk: Path,
    layers: int = 4,
    recipe: str = "default",
    repeats: int = 3,
    width: int = WIDTH,
    seconds: float = 75,
    format: str | None = None,
    out: Path | None = None,
) -> None:
    """Folders beside the same tensors in memory, and beside a copy of the same files.

    Args:
        disk: where to make the folders.
        layers: of the model, each 0.2 GB at the full width, in each of two folders.
        recipe: by name.
        repeats: how often at most; the best of each counts. One more comes first, in which all is compiled.
        width: of the model, a multiple of 384.
        seconds: no repeat begins after so many, but the first.
        format: as of `daq-jax quantize`.
        out: file for the figures; None for the usual one.
    """
    start = time.monotonic()
    here = disk / "folders_speed"
    model = llama(layers, vocabulary=1024, width=width)  # what is quantized, and little else
    for seed, word in enumerate(("base", "tuned")):
        make(here / word, model, seed)
    timed(here, recipe, format)  # compiles
    compiled = time.monotonic() - start
    rows = [timed(here, recipe, format)]
    while len(rows) < repeats and time.monotonic() - start < seconds:
        rows.append(timed(here, recipe, format))
    shutil.rmtree(here)
    best = {key: min(row[key] for row in rows) for key in rows[0]}
    size = sum(spec.nbytes for spec in model.tensors.values()) / 1e9
    ratios = {
        "folder / in_memory": best["folder"] / best["in_memory"],
        "folder / in_memory_and_compared": best["folder"] / best["in_memory_and_compared"],
        "copy_of_both / folder": best["copy_of_both"] / best["folder"],
    }
    figures = {"recipe": recipe, "format": format, "layers": layers, "width": width, "tuned_gb": size}
    rates = {f"{key}_gb_per_s": 2 * size / value for key, value in best.items()}  # of base and tuned
    figures |= {"made_and_compiled_seconds": compiled, "all_seconds": time.monotonic() - start}
    note("speed", figures | {"best_seconds": best, "rates": rates, "ratios": ratios, "runs": rows}, out)


def timed(here: Path, recipe: str, format: str | None) -> dict[str, float]:
    """Seconds that one run of each takes, of the folders `base` and `tuned`."""
    how, rules = daq.recipes.RECIPES[recipe], [daq.use("", matrix=((-1,), (-2,)))]
    layout = LAYOUTS[format or "fp8-block"]
    how = dataclasses.replace(how, format=layout.format, tiling=layout.tiling)
    pairs = [in_memory(here / word) for word in ("base", "tuned")]
    row, start = {}, time.monotonic()
    q = jax.block_until_ready(daq.quantize(*pairs, how, rules=rules))
    row["in_memory"] = time.monotonic() - start
    daq.compare(*pairs, q)
    row["in_memory_and_compared"] = time.monotonic() - start
    del q
    if jax.default_backend() != "cpu":
        placed = jax.block_until_ready([jax.device_put(pair) for pair in pairs])
        start = time.monotonic()
        jax.block_until_ready(daq.quantize(*placed, how, rules=rules))
        row["on_device"] = time.monotonic() - start
        del placed
    del pairs
    start = time.monotonic()
    daq.quantize_folder(here / "base", here / "tuned", here / "out", how, format=format, memory_gb=4)
    row["folder"] = time.monotonic() - start
    start = time.monotonic()
    for word in ("base", "tuned"):
        shutil.copytree(here / word, here / "copy" / word)
    os.sync()
    row["copy_of_both"] = time.monotonic() - start
    for word in ("copy", "out"):
        shutil.rmtree(here / word)
    return row


def in_memory(path: Path) -> dict[str, Any]:
    """The weights of a folder that are quantized."""
    folder = open_folder(path)
    found = {name: folder.read(name) for name in folder.tensors if "_proj" in name}
    folder.close()
    return found


def note(name: str, figures: dict[str, Any], out: Path | None = None) -> None:
    """Prints figures and keeps them."""
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    machine |= {"devices": str(jnp.zeros(()).devices()), "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({"machine": machine, **figures}, indent=1)
    print(text)
    out = out or RESULTS / f"folders_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"memory": memory, "plan": plan, "speed": speed})
