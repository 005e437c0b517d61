"""How fast is `quantize`, and how much memory does it need? The answer is checked before it is timed.

    python -m benchmarks speed --workload square_1024 square_4096 --recipe paper_cosine absmax --reference
    python -m benchmarks speed --gpu

For each workload and recipe: sampled tiles are compared with the NumPy oracles of the tests, and a wrong one
ends the run with exit status 1. Then the eager call `daq_jax.quantize(base, tuned, recipe)` is timed, its
look for NaN included and compilation apart, and several calls without a look or a wait in between, as in a
pipeline ("queued"). Beside them stand the released search (`reference.py`) and the floor, a program that does
no more than read both weights and write a byte for each. `--gpu` runs all that the README says of a GPU, some
of it without our kernels as well ("plain"), in about four minutes. Writes `speed_DEVICE.json` and
`speed_DEVICE.md`.
"""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave the reference its share of a GPU's memory

import jax
import jax.numpy as jnp
from jax import lax

import daq_jax as daq
from benchmarks import common, workloads
from benchmarks.speed import reference
from benchmarks.speed.checks import ORACLES, Tree, check
from benchmarks.speed.programs import compiled
from daq_jax.numerics.kernel_choice import kernels

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


def trees(workload: workloads.Workload) -> tuple[Tree, Tree]:
    """Base and tuned. Leaves of one shape have equal values, each in a buffer of its own."""
    pairs = {shape: [*map(jnp.asarray, workloads.pair(shape))] for shape in set(workload.shapes.values())}
    base, tuned = ({p: jnp.array(pairs[s][i]) for p, s in workload.shapes.items()} for i in (0, 1))
    return base, tuned


# --- Time and memory ----------------------------------------------------------------------------------------


def programs(recipe: daq.Recipe, base: Tree) -> dict[str, float]:
    """Compile time of all programs, and temporary memory an element of the one that needs most.

    `temp_bytes_per_element` is that of the program an eager call runs on each leaf,
    `temp_bytes_per_element_in_jit` that of `jax.jit(daq_jax.quantize)` on one leaf.
    """
    quantize = functools.partial(daq.quantize, recipe=recipe, rules=())
    compile_seconds, temp, temp_in_jit = 0.0, [], []
    for leaf in {x.shape: x for x in base.values()}.values():
        took, eager = compiled(leaf, leaf, recipe)
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


def measure(job: Job, repeats: int) -> dict[str, Any]:
    """One row of the table."""
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
    times = common.seconds(call, repeats)
    queued = common.queued_seconds(functools.partial(call, check_finite=False), repeats)
    floor = common.seconds(lambda: jax.tree.map(_touch, base, tuned), repeats)
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


def released(job: Job, repeats: int, wheels: Path) -> dict[str, Any] | None:
    """What the released program takes for a job; None where it is not asked for, or knows no such recipe."""
    if not job.reference or job.recipe not in reference.METRICS:
        return None
    return reference.measure_apart(job.workload, job.recipe, repeats, wheels)


# --- What is written ----------------------------------------------------------------------------------------

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
    table = common.table(COLUMNS, ([cell(row) for cell in COLUMNS.values()] for row in report["rows"]))
    about = [f"- {key}: {value}" for key, value in report.items() if key not in ("rows", "versions")]
    about += [f"- {name}: {version}" for name, version in report["versions"].items()]
    return "\n".join([table, "", *about, ""])


def main(
    *,
    workload: tuple[Literal[*workloads.WORKLOADS], ...] = ("square_1024",),
    recipe: tuple[Literal[*RECIPES], ...] = tuple(ORACLES),
    gpu: bool = False,
    reference: bool = False,
    repeats: int | None = None,
    wheels: Path = common.CACHE,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Times recipes on workloads.

    Args:
        workload: weights by name.
        recipe: recipes by name.
        gpu: all that is measured on a GPU, and only that.
        reference: time the released program too; needs torch.
        repeats: timed calls; None for 10, or 7 on a CPU.
        wheels: folder that holds the wheel of the released program, or gets it.
        out: folder for the results; None for `benchmarks/results`.
        quick: two recipes and two calls of each, to see that it runs.
    """
    if quick:
        recipe, repeats = ("absmax", "paper_cosine"), 2
    repeats = repeats or (7 if jax.default_backend() == "cpu" else 10)
    jobs = [Job(*pair, reference) for pair in itertools.product(workload, recipe)]
    report, folder = common.environment() | {"rows": []}, common.results(out, quick)
    for job in GPU if gpu else jobs:
        found = released(job, repeats, wheels)
        with kernels("never" if job.plain else "where possible"):
            report["rows"].append(with_reference(measure(job, repeats), found))
        text = markdown(report)
        print(text.splitlines()[1 + len(report["rows"])], flush=True)
        common.write(common.named("speed", report, folder), report, text)  # a long run may be cut short


COMMANDS = {"speed": main}
