"""The way back into 4-bit formats by other tools and by ours: what is left of the change, time and memory.

    python -m benchmarks native_peers --disk DIR

Bases lie on the grids of MXFP4, NVFP4 and INT4 in groups of 32; their tuned models, in bfloat16, differ from
them by a change of rank 16 or of full rank. Each rule writes its result as a process of its own; results are
read by the decoders of the tests. Rules that name a tool call that tool's own functions, and are left out
where it is not installed; the others are written anew in `rules`.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from benchmarks.native_peers.folders import BASES, TUNES, Base, make
from benchmarks.native_peers.installed import INSTALLED, VERSIONS
from benchmarks.native_peers.rules import RULES
from tests.hf_folders import read_tensors
from tests.native_folders import Native

OURS = "daq-jax, the default"
AGAIN = "daq-jax, programs compiled before"
_DIRECTIONS = 8


def carry_out(rule: str, pair: tuple[Path, Path], out: Path, cache: Path) -> dict[str, float]:
    """Runs a rule, or the command of the library with its programs kept in `cache`; its time and memory."""
    words = ["quantize"] if rule in (OURS, AGAIN) else [rule]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.native_peers.one", *words, *map(str, pair), str(out)],
        cwd=common.ROOT,
        env=os.environ | kept,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {"seconds": time.monotonic() - start, "peak_gb": int(done.stdout.split()[-1]) / 1e9}


class Change(NamedTuple):
    """The change of a weight by tuning.

    Attributes:
        native: names and decoder of the weight.
        weight: the weight before tuning, `[out, in]` float64.
        change: the change, `[out, in]` float64.
        left: its leading directions among the outputs, `[out, 8]`.
        right: its leading directions among the inputs, `[8, in]`.
        size: norm of the change along these.
    """

    native: Native
    weight: np.ndarray
    change: np.ndarray
    left: np.ndarray
    right: np.ndarray
    size: float


def changes(base: Base, before: Path, tuned: Path, width: int) -> list[Change]:
    """The change of every weight."""
    found, old = [], read_tensors(before)
    for name, new in read_tensors(tuned).items():
        native = base.native(name, width, width)
        weight = native.decode(old).astype(np.float64)
        change = new.astype(np.float64) - weight
        u, s, v = np.linalg.svd(change, full_matrices=False)
        leading = u[:, :_DIRECTIONS], v[:_DIRECTIONS], float(np.linalg.norm(s[:_DIRECTIONS]))
        found.append(Change(native, weight, change, *leading))
    return found


def kept(wanted: Sequence[Change], before: Path, out: Path) -> dict[str, float]:
    """What is left of the changes, over all matrices.

    Returns:
        `projection` `<d, q> / <d, d>`, `subspace` `|U'(q - d)V| / |U'dV|` with the leading directions `U` and
        `V` of `d`, and `moved_scales`, the share of the scales that are not those of the base.
    """
    old, found = read_tensors(before), read_tensors(out)
    along = size = error = directions = moved = scales = 0.0
    for each in wanted:
        d, q = each.change, each.native.decode(found) - each.weight
        along, size = along + (d * q).sum(), size + (d * d).sum()
        error += ((each.left.T @ (q - d) @ each.right.T) ** 2).sum()
        directions += each.size**2
        stored = [x[each.native.scale].astype(np.float32) for x in (old, found)]
        moved, scales = moved + (stored[0] != stored[1]).sum(), scales + stored[0].size
    return {
        "projection": float(along / size),
        "subspace": float(np.sqrt(error / directions)),
        "moved_scales": float(moved / scales),
    }


def peers(
    *,
    disk: Path,
    matrices: int = 4,
    width: int = 1024,
    size: float = 0.02,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Every rule on every base and tune.

    Args:
        disk: where to make the folders, which are removed.
        matrices: of a model.
        width: rows and columns of a matrix, a multiple of 32.
        size: of the change, relative to the weights.
        out: folder for the results; None for `benchmarks/results`.
        quick: one matrix of 128 x 128 and a change of rank 16, to see that it runs.
    """
    matrices, width = (1, 128) if quick else (matrices, width)
    here, rows = disk / "native_peers", []
    for form, base in BASES.items():
        rules = [rule for rule in (*RULES, *INSTALLED) if rule.startswith(form.split()[0])]
        for tune in list(TUNES)[: 1 if quick else None]:
            pair = make(here, base, tune, size, matrices, width)
            wanted = changes(base, *pair, width)
            for rule in (*rules, OURS, AGAIN):
                cost = carry_out(rule, pair, here / "out", here / "programs")
                what = kept(wanted, pair[0], here / "out")
                rows.append(
                    {"base": form, "tune": tune, "rule": rule.partition(": ")[2] or rule} | what | cost
                )
                print(rows[-1])
                shutil.rmtree(here / "out")
            shutil.rmtree(here)
    how = {"matrices": matrices, "width": width, "size": size, "peers": VERSIONS, "rows": rows}
    report = common.environment() | how
    common.write(common.results(out, quick) / "native_peers.json", report, markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The result as tables."""
    weights = f"{report['matrices']} matrices of {report['width']} x {report['width']}"
    used = ", ".join(f"{name} {version}" for name, version in report["peers"].items())
    lines = [
        "# Back into 4-bit formats: what tools keep of a change\n",
        f"{common.provenance(report)}; {report['cpu']}, {report['cpu_cores']} cores; peers: {used}.\n",
        f"{weights}; change of {100 * report['size']:g} % of the weights, the tuned model in bfloat16. "
        f"Projection: 1 keeps the change at its size. Error: along the {_DIRECTIONS} leading directions of "
        "the change. Scales moved: those that are not the base's. Time and memory are those of a whole "
        "process.\n",
    ]
    for form in dict.fromkeys(row["base"] for row in report["rows"]):
        for tune in dict.fromkeys(row["tune"] for row in report["rows"]):
            rows = [row for row in report["rows"] if (row["base"], row["tune"]) == (form, tune)]
            heads = ("rule", "projection", "error", "scales moved", "seconds", "peak GB")
            lines += [f"## {form}, {tune}\n" if rows else "", common.table(heads, map(_line, rows)) + "\n"]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> list[str]:
    figures = [f"{row['projection']:.2f}", f"{row['subspace']:.3f}", f"{100 * row['moved_scales']:.1f} %"]
    return [row["rule"], *figures, f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}"]


COMMANDS = {"native_peers": peers}
