"""Folders larger than memory: what memory the command takes, how long a plan takes, how fast work streams.

    python benchmarks/folders.py memory --disk DIR     # 6 GB and 12 GB of tuned weights under --memory 2
    python benchmarks/folders.py plan --disk DIR       # headers of 671B parameters over sparse files
    python benchmarks/folders.py speed --disk DIR      # beside the same tensors in memory, and beside a copy

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
from daq_jax.io.folders import open_folder
from daq_jax.io.tensor_files import TensorSpec, TensorWriter, plan_file

RESULTS = Path(__file__).parent / "results"
RUN = "import sys; from daq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
SHARD = 5 * 10**9  # bytes, as Hugging Face cuts
WIDTH, INNER, HEADS, VOCABULARY = 3072, 8192, 1024, 128256  # of Llama 3.2 3B


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


def llama(layers: int) -> Model:
    """Llama 3.2 3B with another number of layers, in bfloat16."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for word, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (HEADS, WIDTH),
            "self_attn.v_proj": (HEADS, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
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


def speed(disk: Path, layers: int = 4, recipe: str = "default", repeats: int = 3) -> None:
    """Folders beside the same tensors in memory, and beside a copy of the same files."""
    here, model = disk / "folders_speed", llama(layers)
    base, tuned = make(here / "base", model, 0), make(here / "tuned", model, 1)
    before, after = open_folder(base), open_folder(tuned)
    names = [name for name in after.tensors if "_proj" in name]
    how, rules = daq.recipes.RECIPES[recipe], [daq.use("", matrix=((-1,), (-2,)))]
    pairs = [({n: f.read(n) for n in names}) for f in (before, after)]
    rows = []
    for _ in range(repeats + 1):  # the first compiles, for both
        shutil.rmtree(here / "out", ignore_errors=True)
        row, start = {}, time.monotonic()
        q = jax.block_until_ready(daq.quantize(*pairs, how, rules=rules))
        row["in_memory"] = time.monotonic() - start
        daq.compare(*pairs, q)
        row["in_memory_and_compared"] = time.monotonic() - start
        del q
        start = time.monotonic()
        daq.quantize_folder(base, tuned, here / "out", how, memory_gb=4)
        row["folder"] = time.monotonic() - start
        start = time.monotonic()
        for word in ("base", "tuned"):
            shutil.copytree(here / word, here / "copy" / word)
        os.sync()
        row["copy_of_both"] = time.monotonic() - start
        shutil.rmtree(here / "copy")
        rows.append(row)
    best = {key: min(row[key] for row in rows[1:]) for key in rows[0]}
    ratios = {
        "folder / in_memory": best["folder"] / best["in_memory"],
        "folder / in_memory_and_compared": best["folder"] / best["in_memory_and_compared"],
        "copy_of_both / folder": best["copy_of_both"] / best["folder"],
    }
    size = sum(spec.nbytes for spec in model.tensors.values()) / 1e9
    shutil.rmtree(here)
    note(
        "speed",
        {"recipe": recipe, "tuned_gb": size, "best_seconds": best, "ratios": ratios, "runs": rows[1:]},
    )


def note(name: str, figures: dict[str, Any]) -> None:
    """Prints figures and keeps them."""
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    machine |= {"devices": str(jnp.zeros(()).devices()), "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({"machine": machine, **figures}, indent=1)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"folders_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"memory": memory, "plan": plan, "speed": speed})
