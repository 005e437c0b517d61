"""How fast is `quantize`, and how much memory does it need? The answer is checked before it is timed.

    python benchmarks/run.py --workload square_1024 square_4096 --recipe paper_cosine absmax --reference
    python benchmarks/run.py --gpu

For each workload and recipe: sampled tiles are compared with the NumPy oracles of the tests, and a wrong one
ends the run with exit status 1. Then the eager call `daq_jax.quantize(base, tuned, recipe)` is timed, its
look for NaN included and compilation apart, and several calls without a look or a wait in between, as in a
pipeline ("queued"). Beside them stand the released search (`reference.py`) and the floor, a program that does
no more than read both weights and write a byte for each. `--gpu` runs all that the README says of a GPU, some
of it without our kernels as well ("plain"), in about four minutes. Writes `speed_DEVICE.json` and
`speed_DEVICE.md`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave the reference its share of a GPU's memory

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import reference
import workloads
from jax import lax
from numpy.typing import NDArray

import daq_jax as daq
from daq_jax import leaves
from daq_jax.roundings import gains

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import oracles
import rounding_oracles

HERE = pathlib.Path(__file__).parent
TILE = 128  # rows and columns of a tile in every recipe below
SAMPLE = 32  # tiles checked
_WARM_UP = 0.3  # seconds
PAPER = oracles.coarse_to_fine(0.8, 1.5, 5, 10)
ORACLES = {  # metric and search, by recipe
    "paper_cosine": (oracles.cosine, PAPER),
    "paper_sign": (oracles.sign_rate, PAPER),
    "mse": (oracles.neg_mse, PAPER),
    "absmax": (oracles.cosine, oracles.absmax()),
}

RECIPES = daq.recipes.RECIPES | {"unbiased_gain": daq.Recipe(rounding=daq.UnbiasedGain())}


class Job(NamedTuple):
    """What a row of the table measures."""

    workload: str
    recipe: str
    reference: bool = False  # time the released program too
    plain: bool = False  # without kernels of ours


GPU = [
    Job("square_16384", "paper_cosine", reference=True),
    Job("square_16384", "paper_cosine", plain=True),
    *(Job("square_16384", recipe) for recipe in ("paper_sign", "mse", "absmax", "unbiased_gain")),
    Job("llama_7b", "paper_cosine", reference=True),
    Job("llama_7b", "absmax"),
    Job("llama_7b", "unbiased_gain"),
    *(Job(f"deepseek_v3_{name}", "paper_cosine") for name in ("up", "down", "expert")),
    *(Job(name, "paper_cosine") for name in ("moe_experts", "llama_7b_up", "square_8192", "square_32768")),
    *(Job("llama_8b_up", recipe) for recipe in ("paper_cosine", "unbiased_gain", "default")),
    Job("square_16384", "default"),
    Job("llama_7b", "default"),
]

Tree = dict[str, jax.Array]


def trees(workload: workloads.Workload) -> tuple[Tree, Tree]:
    """Base and tuned. Leaves of one shape have equal values, each in a buffer of its own."""
    pairs = {shape: [*map(jnp.asarray, workloads.pair(shape))] for shape in set(workload.shapes.values())}
    base, tuned = ({p: jnp.array(pairs[s][i]) for p, s in workload.shapes.items()} for i in (0, 1))
    return base, tuned


# --- Is the answer right? -----------------------------------------------------------------------------------


def sampled_tiles(q: dict[str, daq.QTensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and index into the scales of some tiles: the first, the last, and others at random."""
    rng, paths = np.random.default_rng(0), list(q)
    last = q[paths[-1]].scale.shape
    yield paths[0], (0,) * len(last)
    yield paths[-1], tuple(n - 1 for n in last)
    for _ in range(SAMPLE - 2):
        path = paths[rng.integers(len(paths))]
        yield path, tuple(int(rng.integers(n)) for n in q[path].scale.shape)


def tile_of(x: jax.Array, index: tuple[int, ...]) -> NDArray:
    """One tile of a weight or of its codes, `[r, c]`; smaller at an edge."""
    *batch, i, j = index
    start = (*batch, i * TILE, j * TILE)
    size = [1] * len(batch) + [min(TILE, n - s) for n, s in zip(x.shape[-2:], start[-2:], strict=True)]
    return np.asarray(lax.dynamic_slice(x, start, size)).reshape(size[-2:])


def check(recipe: str, base: Tree, tuned: Tree, q: dict[str, daq.QTensor]) -> dict[str, float]:
    """Compares sampled tiles with the oracle: nearest codes, and a score as good as the best.

    Raises:
        SystemExit: with what was wrong.
    """
    if recipe not in ORACLES:
        return check_unbiased(recipe, base, tuned, q)
    metric, search = ORACLES[recipe]
    number, whole = oracles.FORMATS["fp8_e4m3fn"], (None, None)
    wrong, shortfall = 0, 0.0
    for path, index in sampled_tiles(q):
        b, t, codes = (tile_of(x, index) for x in (base[path], tuned[path], q[path].codes))
        scale = np.asarray(q[path].scale[index]).reshape(1, 1)
        nearest = number.round(t.astype(np.float32) / scale)
        wrong += int(np.sum(number.decode(codes) != nearest))
        best = oracles.search_leaf(b, t, number, whole, metric, search).score
        got = oracles.stored_scores(b, t, codes, scale, number, whole, metric)
        shortfall = max(shortfall, float(np.nanmax((best - got) / np.abs(best), initial=0)))
    if wrong or shortfall > 1e-6:
        sys.exit(f"{recipe}: WRONG: {wrong} codes are not the nearest; a score is {shortfall:.1e} too low")
    return {"tiles_checked": SAMPLE, "worst_shortfall": shortfall}


def check_unbiased(recipe: str, base: Tree, tuned: Tree, q: dict[str, daq.QTensor]) -> dict[str, float]:
    """Checks that the sampled tiles keep their change at its size, and that each column has one gain.

    Raises:
        SystemExit: with what was wrong.
    """
    number, dd, dq, no_gain = oracles.FORMATS["fp8_e4m3fn"], 0.0, 0.0, 0
    for path, index in sampled_tiles(q):
        b, t = (tile_of(x[path], index).astype(np.float32) for x in (base, tuned))
        values, scale = number.decode(tile_of(q[path].codes, index)), np.float32(q[path].scale[index])
        d = (t - b).astype(np.float64)
        dd, dq = dd + np.sum(d * d), dq + np.sum(d * (values.astype(np.float64) * scale - b))
        if recipe == "unbiased_gain":
            spread = np.full(b.shape, scale)
            interval = rounding_oracles.gain_intervals(b, t, values, spread, number.grid()[0])
            columns = rounding_oracles.set_labels(b.shape, (TILE, TILE), "column")
            low, high = rounding_oracles.shared_gains(*interval, columns)
            no_gain += int(np.sum(low > high))
    if no_gain or abs(dq / dd - 1) > 0.02:
        sys.exit(f"{recipe}: WRONG: projection {dq / dd:.4f}; {no_gain} columns are of no one gain")
    return {"tiles_checked": SAMPLE, "projection": float(dq / dd)}


# --- Time and memory ----------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall time of each of several calls, after others that are not counted: an idle GPU is slow at first."""
    start = time.perf_counter()
    while True:
        jax.block_until_ready(call())
        if time.perf_counter() - start > _WARM_UP:
            break
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def queued_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call where a program goes on giving the device work, and nothing is waited for in between."""
    start, last = time.perf_counter(), None
    for _ in range(repeats):
        last = call()
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / repeats


def compiled_by(call: Callable[[], Any]) -> list[tuple[float, Any]]:
    """The programs that a call of `quantize` runs on its leaves: seconds to compile each, and the program."""
    run, found = leaves._quantize_pair, []

    def record(*args: Any, **static: Any) -> Any:
        start = time.perf_counter()
        compiled = run.lower(*args, **static).compile()
        found.append((time.perf_counter() - start, compiled))
        return run(*args, **static)

    with mock.patch.object(leaves, "_quantize_pair", record):
        call()
    return found


def programs(recipe: daq.Recipe, base: Tree) -> dict[str, float]:
    """Compile time of all programs, and temporary memory an element of the one that needs most.

    `temp_bytes_per_element` is that of the program an eager call runs on each leaf,
    `temp_bytes_per_element_in_jit` that of `jax.jit(daq_jax.quantize)` on one leaf.
    """
    quantize = functools.partial(daq.quantize, recipe=recipe, rules=())
    compile_seconds, temp, temp_in_jit = 0.0, [], []
    for leaf in {x.shape: x for x in base.values()}.values():
        ((took, eager),) = compiled_by(functools.partial(quantize, leaf, leaf))
        compile_seconds += took
        temp.append(eager.memory_analysis().temp_size_in_bytes / leaf.size)
        in_jit = jax.jit(quantize).lower(leaf, leaf).compile()
        temp_in_jit.append(in_jit.memory_analysis().temp_size_in_bytes / leaf.size)
    return {
        "compile_seconds": compile_seconds,
        "temp_bytes_per_element": max(temp),
        "temp_bytes_per_element_in_jit": max(temp_in_jit),
    }


@jax.jit
def _touch(base: jax.Array, tuned: jax.Array) -> jax.Array:
    """The least that any quantizer does: reads both weights, writes a byte for each."""
    base, tuned = (lax.bitcast_convert_type(x, jnp.uint16) for x in (base, tuned))
    return (base ^ tuned).astype(jnp.uint8)


def without_kernels() -> contextlib.ExitStack:
    """While this is open, `quantize` compiles plain programs."""
    stack = contextlib.ExitStack()
    for module in (leaves, gains):
        stack.enter_context(mock.patch.object(module, "has_fp8_gpu", return_value=False))
    return stack


def measure(job: Job, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    jax.clear_caches()  # of programs with other kernels
    name, recipe_name = job.workload, job.recipe
    recipe, elements = RECIPES[recipe_name], workloads.WORKLOADS[name].elements
    base, tuned = trees(workloads.WORKLOADS[name])
    call = functools.partial(daq.quantize, base, tuned, recipe, rules=())
    start = time.perf_counter()
    q = jax.block_until_ready(call())
    first = time.perf_counter() - start
    row = {"workload": name, "recipe": recipe_name + ", plain" * job.plain, "elements": elements}
    row |= {"first_call_seconds": first, **programs(recipe, base), **check(recipe_name, base, tuned, q)}
    moved = sum(x.nbytes for x in jax.tree.leaves((base, tuned, q)))
    del q
    times = seconds(call, repeats)
    queued = queued_seconds(functools.partial(call, check_finite=False), repeats)
    floor = seconds(lambda: jax.tree.map(_touch, base, tuned), repeats)
    median, floor_median = statistics.median(times), statistics.median(floor)
    return row | {
        "seconds": median,
        "seconds_fastest": min(times),
        "seconds_slowest": max(times),
        "elements_per_second": elements / median,
        "elements_per_second_queued": elements / queued,
        "bytes_per_second": moved / median,
        "floor_seconds": floor_median,
        "floor_elements_per_second": elements / floor_median,
        "load_average": os.getloadavg()[0],
    }


def with_reference(row: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """The row, with what the released program took and how many times faster we were."""
    if found is None:
        return row
    return row | {"reference": found, "times_faster": found["seconds"] / row["seconds"]}


# --- What is written ----------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "daq_jax": daq.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "workload": lambda r: r["workload"],
    "recipe": lambda r: r["recipe"],
    "G elements": lambda r: f"{r['elements'] / 1e9:.4g}",
    "seconds": lambda r: f"{r['seconds']:.3g}",
    "G elements/s": lambda r: f"{r['elements_per_second'] / 1e9:.3g}",
    "queued": lambda r: f"{r['elements_per_second_queued'] / 1e9:.3g}",
    "GB/s": lambda r: f"{r['bytes_per_second'] / 1e9:.3g}",
    "floor, G elements/s": lambda r: f"{r['floor_elements_per_second'] / 1e9:.3g}",
    "times the reference": lambda r: f"{r['times_faster']:.3g}" if "times_faster" in r else "-",
    "temp B/element": lambda r: f"{r['temp_bytes_per_element']:.2f}",
    "in jit": lambda r: f"{r['temp_bytes_per_element_in_jit']:.2f}",
    "reference's": lambda r: f"{r['reference']['temp_bytes_per_element']:.0f}" if "reference" in r else "-",
    "load": lambda r: f"{r['load_average']:.1f}",
    "first call s": lambda r: f"{r['first_call_seconds']:.2g}",
}


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, with where it comes from below."""
    rows = [[cell(row) for cell in COLUMNS.values()] for row in report["rows"]]
    lines = [[*COLUMNS], ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = "\n".join(f"- {key}: {value}" for key, value in report.items() if key != "rows")
    return f"{table}\n\n{about}\n"


def result_path(word: str, report: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """`WORD_DEVICE.json` in a folder."""
    device = report["device"].lower().removeprefix("nvidia ").replace(" ", "_")
    return folder / f"{word}_{device}.json"


def write(report: dict[str, Any], folder: pathlib.Path) -> None:
    """`speed_DEVICE.json` and `.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path("speed", report, folder)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=workloads.WORKLOADS, default=["square_1024"])
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(ORACLES))
    parser.add_argument("--gpu", action="store_true", help="all that is measured on a GPU, and only that")
    parser.add_argument(
        "--reference", action="store_true", help="time the released program too (needs torch)"
    )
    parser.add_argument("--repeats", type=int, help="timed calls; 10, or 7 on a CPU")
    parser.add_argument(
        "--wheels",
        type=pathlib.Path,
        default=HERE.parent / "build" / "wheels",
        help="where its wheel is kept",
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    repeats = args.repeats or (7 if jax.default_backend() == "cpu" else 10)
    report = environment() | {"rows": []}
    jobs = [Job(*pair, args.reference) for pair in itertools.product(args.workload, args.recipe)]
    for job in GPU if args.gpu else jobs:
        found = None
        if job.reference and job.recipe in reference.METRICS:
            found = reference.measure_apart(job.workload, job.recipe, repeats, args.wheels)
        with without_kernels() if job.plain else contextlib.nullcontext():
            report["rows"].append(with_reference(measure(job, repeats), found))
        print(markdown(report | {"rows": report["rows"][-1:]}).splitlines()[2], flush=True)
        write(report, args.out)  # after every row: a long run may be cut short


if __name__ == "__main__":
    main()
