"""Folders larger than memory: what memory the command takes, how long a plan takes, how fast work streams.

    python -m benchmarks folders memory --disk DIR     # 6 GB and 12 GB of tuned weights under --memory 2
    python -m benchmarks folders peaks --disk DIR      # 30 shapes and recipes, beside their plans
    python -m benchmarks folders plan --disk DIR       # headers of 671B parameters over sparse files
    python -m benchmarks folders plan-as-base --disk DIR     # of 2.8T parameters in MXFP4
    python -m benchmarks folders speed --disk DIR      # beside the same tensors in memory, and beside a copy
    python -m benchmarks folders speed --disk DIR --recipe default --layers 8     # on a GPU

Each prints its figures and writes them to `folders_memory.json`, `folders_peaks.json`, `folders_plan.json`,
`folders_plan_as_base.json` or `folders_speed_DEVICE.json`. Folders are made below DIR and removed. Peak
memory is that of a process of its own, as the system counts it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

import daq_jax as daq
from benchmarks import common
from benchmarks.folders import peaks as drawn
from benchmarks.folders.models import WIDTH, deepseek, kimi, llama, make
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from tests.peaks import run as run_counted

RUN = "import sys; from daq_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def run(*words: str | Path) -> dict[str, float]:
    """Seconds and peak memory of `daq-jax` with these words, as a process of its own."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", RUN, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"daq-jax ended with {status}")
    return {"seconds": time.monotonic() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def memory(
    *,
    disk: Path,
    recipe: str = "absmax",
    layers: tuple[int, int] = (27, 56),
    limit: float = 2,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Peak memory on two checkpoints, one twice the other.

    Args:
        disk: where to make the folders.
        recipe: by name.
        layers: of the smaller and of the larger model.
        limit: GB, for `--memory` of the command.
        out: folder for the results; None for `benchmarks/results`.
        quick: models of one and two narrow layers, to see that it runs.
    """
    rows, size_of = [], {"vocabulary": 1024, "width": 384} if quick else {}
    for n in (1, 2) if quick else layers:
        here, model = disk / "folders_memory", llama(n, **size_of)
        base, tuned = make(here / "base", model, 0), make(here / "tuned", model, 1)
        size = sum(spec.nbytes for spec in model.tensors.values()) / 1e9
        found = run("quantize", base, tuned, here / "out", "--recipe", recipe, "--memory", str(limit))
        rows.append({"layers": n, "tuned_gb": size, **found})
        shutil.rmtree(here)
    first, second = (row["peak_gb"] for row in rows)
    figures = {"recipe": recipe, "limit_gb": limit, "runs": rows, "ratio": second / first}
    note(common.results(out, quick) / "folders_memory.json", figures)


def peaks(*, disk: Path, count: int = 30, seed: int = 0, out: Path | None = None, quick: bool = False) -> int:
    """Peak memory of jobs on drawn shapes and recipes, beside what plans promise. Returns 1 if one is above.

    Args:
        disk: where to make the folders.
        count: of jobs.
        seed: of the jobs that are drawn. The model of memory was fitted on those of 0.
        out: folder for the results; None for `benchmarks/results`.
        quick: two jobs, to see that it runs.
    """
    rows = []
    for case in drawn.cases(2 if quick else count, seed):
        here = disk / "folders_peaks"
        shutil.rmtree(here, ignore_errors=True)
        base, tuned = make(here / "base", case.model, 0), make(here / "tuned", case.model, 1)
        how = ["--recipe", case.recipe, "--memory", case.memory]
        if (coded := case.format.removeprefix("as-base ")) != case.format:
            run_counted("quantize", base, base, here / "coded", "--recipe", "absmax", "--format", coded)
            found = run_counted("quantize", here / "coded", tuned, here / "out", *how)
        else:
            found = run_counted("quantize", base, tuned, here / "out", *how, "--format", case.format)
        size = sum(spec.nbytes for spec in case.model.tensors.values())
        largest = max(case.model.tensors.values(), key=lambda spec: spec.size)
        row = {"kind": case.kind, "recipe": case.recipe, "format": case.format, "memory_gb": case.memory}
        row |= {"tensors": len(case.model.tensors), "largest": list(largest.shape), "tuned_mb": size / 1e6}
        row |= {"promise_mb": found.said["memory_bytes"] / 1e6, "peak_mb": found.peak / 1e6}
        rows.append(row | {"promise / peak": found.said["memory_bytes"] / found.peak})
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(here)
        report = common.environment() | {"jobs": rows}
        common.write(common.results(out, quick) / "folders_peaks.json", report, drawn.markdown_of(report))
    return int(any(row["promise / peak"] < 1 for row in rows))


def plan(*, disk: Path, layers: int = 61, out: Path | None = None, quick: bool = False) -> None:
    """Time and memory of the plan of a folder of 671B parameters.

    Args:
        disk: where to make the folders; they take little of it, as their files are sparse.
        layers: of the model; 61 in DeepSeek-V3.
        out: folder for the results; None for `benchmarks/results`.
        quick: four layers, to see that it runs.
    """
    here, model = disk / "folders_plan", deepseek(4 if quick else layers)
    base, tuned = make(here / "base", model, None), make(here / "tuned", model, None)
    parameters = sum(spec.size for spec in model.tensors.values() if spec.dtype != "F32")
    found = run("quantize", base, tuned, here / "out", "--plan", "--recipe", "absmax", "--memory", "8")
    shutil.rmtree(here)
    figures = {"parameters": parameters, "tensors": len(model.tensors), **found}
    note(common.results(out, quick) / "folders_plan.json", figures)


def plan_as_base(*, disk: Path, layers: int = 92, out: Path | None = None, quick: bool = False) -> None:
    """Time and memory of the plan of a folder of 2.8T parameters with 247,296 weights in MXFP4.

    Args:
        disk: where to make the folders; they take little of it, as their files are sparse.
        layers: of the model.
        out: folder for the results; None for `benchmarks/results`.
        quick: one layer, to see that it runs.
    """
    here, models = disk / "folders_plan_as_base", kimi(1 if quick else layers)
    base, tuned = (make(here / word, m, None) for word, m in zip(("base", "tuned"), models, strict=True))
    parameters = sum(spec.size for spec in models[1].tensors.values())
    packed = sum(name.endswith("_packed") for name in models[0].tensors)
    found = run("quantize", base, tuned, here / "out", "--plan", "--memory", "8")
    shutil.rmtree(here)
    figures = {"parameters": parameters, "packed": packed, **found}
    note(common.results(out, quick) / "folders_plan_as_base.json", figures)


def speed(
    *,
    disk: Path,
    layers: int = 4,
    recipe: str = "default",
    repeats: int = 3,
    width: int = WIDTH,
    seconds: float = 75,
    format: str | None = None,
    out: Path | None = None,
    quick: bool = False,
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
        out: folder for the results; None for `benchmarks/results`.
        quick: one narrow layer, AbsMax and one repeat, to see that it runs.
    """
    if quick:
        layers, width, repeats, recipe = 1, 384, 1, "absmax"
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
    figures |= {"best_seconds": best, "rates": rates, "ratios": ratios, "runs": rows}
    note(common.named("folders_speed", common.environment(), common.results(out, quick)), figures)


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


def note(path: Path, figures: dict[str, Any]) -> None:
    """Prints figures and keeps them."""
    report = common.environment() | figures
    print(json.dumps(report, indent=1))
    common.write(path, report)


COMMANDS = {"memory": memory, "peaks": peaks, "plan": plan, "plan-as-base": plan_as_base, "speed": speed}
