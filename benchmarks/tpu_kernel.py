"""Would a kernel of our own search faster on TPUs than XLA's program? By the compiler's counts, with no TPU.

    python -m benchmarks tpu_kernel [--topology v6e:2x2] [--quick]

`paper_cosine` in blocks of 128 x 128, written in Pallas from the library's own arithmetic: a grid step reads
some tiles once, scores their 16 candidates and writes codes and scales. It is interpreted first, and its
codes and scales compared with those of `quantize`. Then libtpu compiles it ahead of time (extra `tpu`), and
three numbers of cycles stand side by side: the instructions of the kernel, each of which takes a cycle at
least; the least that its vector arithmetic alone needs, whatever the schedule; and libtpu's own estimate of
XLA's program. Writes `tpu_kernel.json` and `.md`.
"""

import functools
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

import daq_jax as daq
from benchmarks import common, tpu
from daq_jax.numerics.arithmetic import divide, divide_short, multiply
from daq_jax.scales import usable

TILE, FORMAT, RECIPE = 128, daq.fp8_e4m3fn, daq.recipes.paper_cosine
_AT_ONCE = 4  # tiles of a grid step
_ROWS = 8  # of scales: the least that a block has
_ARITHMETIC, _SLOTS = 2, 4  # its column in the dump, and how many operations an instruction has room for
_LEAST = 1e-38  # of the squares that a cosine divides by


def _scored(scale: Any, base: Any, tuned: Any) -> Any:
    """Cosine of the change and the change kept at a scale, `[1, 1]`."""
    change = tuned - base
    kept = multiply(FORMAT.round(divide_short(tuned, scale)), scale) - base
    along, size, whole = (jnp.sum(x, keepdims=True) for x in (change * kept, kept * kept, change * change))
    return along / jnp.sqrt(jnp.maximum(whole * size, _LEAST))


def _search(base: Any, tuned: Any) -> Any:
    """The scale of one tile, `[1, 1]`, as `CoarseToFine` finds it."""
    search = RECIPE.search
    assert isinstance(search, daq.CoarseToFine)
    largest = jnp.max(jnp.abs(tuned), keepdims=True)
    absmax = usable(divide(largest, jnp.full_like(largest, FORMAT.largest)))

    def better(best: tuple, ratio: Any, ties: bool = False) -> tuple:
        scale = ratio * absmax
        score = _scored(scale, base, tuned)
        take = score >= best[1] if ties else score > best[1]
        return tuple(jnp.where(take, new, old) for new, old in zip((scale, score, ratio), best, strict=True))

    one = jnp.ones_like(absmax)
    best = (absmax, -jnp.inf * one, one)
    for ratio in search.coarse_ratios:
        best = better(best, float(ratio) * one)
    winner = best[2]
    best = better(best, one, ties=True)
    for points in search.fine_ratios:
        ratio = one
        for around, point in zip(search.coarse_ratios, points, strict=True):
            ratio = jnp.where(winner == float(around), float(point), ratio)
        best = better(best, ratio)
    return best[0]


def _kernel(base_ref: Any, tuned_ref: Any, codes_ref: Any, scale_ref: Any) -> None:
    for k in range(base_ref.shape[1] // TILE):
        here = slice(k * TILE, (k + 1) * TILE)
        base, tuned = (ref[:, here].astype(jnp.float32) for ref in (base_ref, tuned_ref))
        scale = _search(base, tuned)
        value = FORMAT.round(divide(tuned, scale))
        signed = jnp.where(value == 0, jnp.where(tuned < 0, -0.0, 0.0), value)
        codes_ref[:, here] = signed.astype(FORMAT.dtype)
        scale_ref[0, :, here] = jnp.broadcast_to(scale, (_ROWS, TILE))


@functools.partial(jax.jit, static_argnames="interpret")
def by_kernel(base: Any, tuned: Any, *, interpret: bool = False) -> tuple[Any, Any]:
    """Codes `[R, C]` and scales `[R / 128, C / 128]` of two bfloat16 weights of whole grid steps."""
    rows, columns = base.shape
    grid = rows // TILE, columns // (TILE * _AT_ONCE)
    tiles = pl.BlockSpec((TILE, TILE * _AT_ONCE), lambda i, j: (i, j))
    codes, scale = pl.pallas_call(
        _kernel,
        grid=grid,
        in_specs=[tiles, tiles],
        out_specs=[tiles, pl.BlockSpec((1, _ROWS, TILE * _AT_ONCE), lambda i, j: (i, 0, j))],
        out_shape=[
            jax.ShapeDtypeStruct(base.shape, FORMAT.dtype),
            jax.ShapeDtypeStruct((grid[0], _ROWS, columns), jnp.float32),
        ],
        interpret=interpret,
        name="search",
    )(base, tuned)
    return codes, scale[:, 0, ::TILE]


def check() -> None:
    """Holds the interpreted kernel against `quantize`, code for code."""
    keys = jax.random.split(jax.random.key(0))
    base = jax.random.normal(keys[0], (2 * TILE, TILE * _AT_ONCE), jnp.bfloat16)
    tuned = base + 0.01 * jax.random.normal(keys[1], base.shape, jnp.bfloat16)
    codes, scale = by_kernel(base, tuned, interpret=True)
    wanted = daq.quantize(base, tuned, RECIPE)
    for found, right in ((codes.view(jnp.uint8), wanted.codes.view(jnp.uint8)), (scale, wanted.scale)):
        np.testing.assert_array_equal(found, right)


def instructions(folder: Path) -> tuple[int, int]:
    """Instructions of a grid step, and the vector operations in them, by what libtpu wrote of the kernel."""
    (path,) = folder.glob("*search*-final_hlo-static-per-bundle-utilization.txt")
    _, _, found = path.read_text().partition("== UTILIZATION:\n")
    rows = [[int(x) for x in line.split()] for line in found.splitlines() if line[:1].isdigit()]
    return len(rows), sum(row[_ARITHMETIC] for row in rows)


def main(topology: str = "v6e:2x2", quick: bool = False, out: Path | None = None) -> int:
    """Checks the kernel, compiles it and XLA's program, and writes their cycles.

    Args:
        topology: for whose first chip is compiled.
        quick: only checks the kernel.
        out: folder for the results.
    """
    if not quick and not tpu.has_compiler():
        print("no libtpu here: pip install 'daq-jax[tpu]'")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        # Read by libtpu when it is loaded, which the first computation may do.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        where = None if quick else tpu.on_one_chip(topology)
        check()
        print("interpreted: codes and scales are those of quantize", flush=True)
        if where is None:
            return 0
        like = jax.ShapeDtypeStruct(tpu.SHAPE, jnp.bfloat16, sharding=where)
        kernel = tpu.compiled(by_kernel.lower(like, like), math.prod(tpu.SHAPE))
        step, operations = instructions(Path(folder))
        xla = tpu.compiled(tpu.quantizing("paper_cosine", where), math.prod(tpu.SHAPE))
    steps = math.prod(tpu.SHAPE) // (TILE * TILE * _AT_ONCE)
    found = {
        "kernel: instructions": step * steps,
        "kernel: vector arithmetic alone": operations * steps // _SLOTS,
        "XLA: libtpu's estimate": xla.cycles,
    }
    report = {**common.environment(), "topology": topology, "shape": tpu.SHAPE, "cycles": found}
    report |= {"kernel": kernel._asdict(), "xla": xla._asdict()}
    common.write(common.results(out, quick) / "tpu_kernel.json", report, markdown(report))
    return 0


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    elements, xla = report["shape"][0] * report["shape"][1], report["xla"]["cycles"]
    lines = [
        (what, round(n / 1e6, 2), round(elements / n, 1), round(xla / n, 2))
        for what, n in report["cycles"].items()
    ]
    heads = ("", "million cycles", "elements a cycle", "times XLA's speed")
    shape = " x ".join(map(str, report["shape"]))
    opening = (
        f"# A kernel for TPUs, by their compiler\n\n`paper_cosine`, one weight of {shape} in bfloat16, "
        f"{report['topology']}. Nothing was run on a TPU."
    )
    return f"{opening}\n\n{common.table(heads, lines)}\n\n{common.provenance(report)}\n"


COMMANDS = {"tpu_kernel": main}
