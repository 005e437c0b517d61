"""What the default costs on native bases, beside the default before it: FP8 blocks and groups of 32.

    python -m benchmarks native_speed [--shape 1024 4096]

The base lies on the grid of the format, stored in bfloat16, and the change has rank 16 and 2 % of the size of
the weights. Before a recipe is timed its answer is checked: without change the codes are those of the base,
and the size of the kept change along the true one is within 5 % of 1 for recipes that promise that. The
calls are eager, their look for NaN included, and compilation apart. Writes `native_speed_DEVICE.json` and
`.md`.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import daq_jax as daq
from benchmarks import common

PREVIOUS = daq.Recipe(search=daq.OffGrid(), rounding=daq.UnbiasedFeedback())
RECIPES = {"absmax": daq.recipes.absmax, "previous default": PREVIOUS, "default": daq.recipes.default}
GRIDS: dict[str, dict[str, Any]] = {
    "FP8 blocks of 128 x 128": {"format": daq.fp8_e4m3fn, "tiling": daq.Block(128, 128)},
    "FP4 groups of 32": {
        "format": daq.fp4_e2m1,
        "tiling": daq.Group(32),
        "scales": daq.PowerOfTwo("floor", daq.fp4_e2m1),
    },
    "INT4 groups of 32": {"format": daq.int4, "tiling": daq.Group(32)},
}
RANK, SIZE = 16, 0.02
WITHIN = 0.05  # of 1, the projection of a recipe that keeps changes


class Native(NamedTuple):
    """A native base and its tune, bfloat16 `[in, out]`, and the codes that the base was made of."""

    base: jax.Array
    tuned: jax.Array
    codes: jax.Array


def pair(shape: tuple[int, int], grid: dict[str, Any]) -> Native:
    """A native base and its tune."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02)
    change = rng.standard_normal((shape[0], RANK), np.float32) @ rng.standard_normal(
        (RANK, shape[1]), np.float32
    )
    made = daq.quantize({"w": weight}, {"w": weight}, daq.Recipe(**grid), rules=())["w"]
    base = made.dequantize(jnp.bfloat16)
    change *= SIZE * float(jnp.linalg.norm(base.astype(jnp.float32))) / np.linalg.norm(change)
    return Native(base, (base.astype(jnp.float32) + change).astype(jnp.bfloat16), made.codes)


def check(name: str, recipe: daq.Recipe, native: Native) -> dict[str, float]:
    """The projection of what is kept, and the share of the base's codes that come back without change.

    Raises:
        SystemExit: if either is not what the recipe promises.
    """
    base = {"w": native.base}
    before, after = (np.asarray(x, np.float64) for x in (native.base, native.tuned))
    kept = np.asarray(daq.quantize(base, {"w": native.tuned}, recipe, rules=())["w"].dequantize(jnp.float32))
    d = after - before
    projection = float(np.sum((kept - before) * d) / np.sum(d * d))
    same = daq.quantize(base, base, recipe, rules=())["w"].codes
    given_back = float(np.mean(np.asarray(same) == np.asarray(native.codes)))
    if name == "default" and (abs(projection - 1) > WITHIN or given_back < 1):
        raise SystemExit(
            f"{name}: WRONG: projection {projection:.4f}, {given_back:.4%} of the base given back"
        )
    return {"projection": projection, "given_back": given_back}


def measure(grid: str, name: str, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """One row of the table."""
    native = pair(shape, GRIDS[grid])
    recipe = RECIPES[name].replace(**GRIDS[grid])
    call = functools.partial(daq.quantize, {"w": native.base}, {"w": native.tuned}, recipe, rules=())
    start, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    first, first_busy = time.perf_counter() - start, time.process_time() - busy
    row = {"grid": grid, "recipe": name, "shape": shape, **check(name, recipe, native)}
    times = common.seconds(call, repeats)
    queued = common.queued_seconds(functools.partial(call, check_finite=False), repeats)
    return row | {
        "seconds": statistics.median(times),
        "seconds_fastest": min(times),
        "seconds_slowest": max(times),
        "seconds_queued": queued,
        "first_call_seconds": first,
        "first_call_cpu_seconds": first_busy,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "grid": lambda r: r["grid"],
    "recipe": lambda r: r["recipe"],
    "ms": lambda r: f"{1e3 * r['seconds']:.3g}",
    "ms, fastest": lambda r: f"{1e3 * r['seconds_fastest']:.3g}",
    "ms, queued": lambda r: f"{1e3 * r['seconds_queued']:.3g}",
    "first call s": lambda r: f"{r['first_call_seconds']:.2g}",
    "first call, CPU s": lambda r: f"{r['first_call_cpu_seconds']:.2g}",
    "projection": lambda r: f"{r['projection']:.3f}",
    "codes of the base given back": lambda r: f"{r['given_back']:.2%}",
}


def main(
    *, shape: tuple[int, int] = (1024, 4096), repeats: int = 7, out: Path | None = None, quick: bool = False
) -> None:
    """Times the default, the default before it and AbsMax on native bases.

    Args:
        shape: rows (inputs) and columns (outputs) of the weight.
        repeats: timed calls.
        out: folder for the results; None for `benchmarks/results`.
        quick: a small weight and two calls, to see that it runs.
    """
    if quick:
        shape, repeats = (128, 256), 2
    report, folder = common.environment() | {"rows": []}, common.results(out, quick)
    for grid in GRIDS:
        for name in RECIPES:
            report["rows"].append(measure(grid, name, shape, repeats))
            table = common.table(
                COLUMNS, ([cell(row) for cell in COLUMNS.values()] for row in report["rows"])
            )
            print(table.splitlines()[1 + len(report["rows"])], flush=True)
            about = [f"- {key}: {value}" for key, value in report.items() if key not in ("rows", "versions")]
            text = "\n".join([table, "", f"One weight of {shape[0]} x {shape[1]}.", "", *about, ""])
            common.write(common.named("native_speed", report, folder), report, text)


COMMANDS = {"native_speed": main}
