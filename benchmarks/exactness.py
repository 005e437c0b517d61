"""Is the arithmetic exact on this machine's accelerator? Prints and writes what was found.

    python -m benchmarks exactness

Run it with XLA's default flags on every kind of accelerator that is claimed to work: the traps it looks for
do not show on a CPU. Every line compares with NumPy, ml_dtypes or the oracles of the tests; the last ones
show what the obvious code would have done here. Exit status 1 if a line that must hold does not.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import daq_jax as daq
from benchmarks import common
from daq_jax.numerics.arithmetic import divide, multiply
from tests import oracles, rounding_oracles

FORMATS = {"fp8_e4m3fn": daq.fp8_e4m3fn, "fp8_e5m2": daq.fp8_e5m2, "int8": daq.int8}
TILE = (128, 128)


def samples(number: oracles.NumberFormat, n: int) -> np.ndarray:
    """All bfloat16 values, all midpoints between codes with their neighbours, and `n` random float32."""
    bf16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    middle = number.midpoints().astype(np.float32)
    near = np.concatenate(
        [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    )
    rng = np.random.default_rng(0)
    wide = rng.normal(size=n) * 2.0 ** rng.uniform(-16, 12, n)
    return np.concatenate([bf16, near, wide.astype(np.float32)])


def rounded(x: np.ndarray, name: str, largest: float) -> np.ndarray:
    clipped = np.clip(x, -largest, largest)
    np.seterr(invalid="ignore")  # NaN is among the samples
    if name == "int8":
        return np.rint(clipped).astype(np.float32)
    return clipped.astype(
        {"fp8_e4m3fn": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}[name]
    ).astype(np.float32)


def differing(a: np.ndarray, b: np.ndarray) -> int:
    """Elements whose bits differ; any NaN equals any other, and -0 equals 0."""
    a, b = np.asarray(a), np.asarray(b)
    return int(np.sum(~((a == b) | (np.isnan(a) & np.isnan(b)))))


def check_rounding(n: int) -> dict[str, int]:
    """Rounds `n` random values and all hard ones; counts what differs from ml_dtypes."""
    found = {}
    for name, fmt in FORMATS.items():
        x = samples(oracles.FORMATS[name], n)
        truth = rounded(x, name, fmt.largest)
        with np.errstate(all="ignore"):
            codes = np.nan_to_num(truth).astype(fmt.dtype)
        for way, wrap in (("eager", lambda f: f), ("jit", jax.jit)):
            found[f"{name} round, {way}: values differing from ml_dtypes"] = differing(
                wrap(fmt.round)(jnp.asarray(x)), truth
            )
            stored = wrap(lambda v, fmt=fmt: fmt.encode(fmt.round(v)))(
                jnp.asarray(np.nan_to_num(x, posinf=1e30, neginf=-1e30))
            )
            same = np.asarray(stored).view(np.uint8) == codes.view(np.uint8)
            found[f"{name} encode, {way}: codes differing"] = int(
                np.sum(~same & np.isfinite(x) & (truth != 0))
            )
    return found


def check_arithmetic() -> dict[str, int]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4096, 1024)).astype(np.float32)
    y = (rng.uniform(0.5, 2, (4096, 1)) * 2.0 ** rng.integers(-12, 0, (4096, 1))).astype(np.float32)
    dx, dy, db = jnp.asarray(x), jnp.asarray(y), jnp.asarray((x * y).astype(np.float32))
    return {
        "division by a broadcast: quotients differing from IEEE": differing(jax.jit(divide)(dx, dy), x / y),
        "product minus its own value: results that are not zero": int(
            np.sum(np.asarray(jax.jit(lambda a, b, c: multiply(a, b) - c)(dx, dy, db)) != 0)
        ),
    }


def a_pair(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = (rng.normal(size=(size, size)) * 0.02).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + rng.normal(size=base.shape).astype(np.float32) * 2e-4).astype(
        ml_dtypes.bfloat16
    )
    return base, tuned


def check_searches(size: int) -> dict[str, float | int]:
    """Scales and codes of recipes against the oracle's search over every tile."""
    number, found = oracles.FORMATS["fp8_e4m3fn"], {}
    search = oracles.coarse_to_fine(0.8, 1.5, 5, 10)
    base, tuned = a_pair(2, size)
    for name, metric in (
        ("absmax", None),
        ("paper_sign", oracles.sign_rate),
        ("paper_cosine", oracles.cosine),
        ("mse", oracles.neg_mse),
    ):
        recipe = daq.recipes.RECIPES[name]
        oracle = oracles.search_leaf(
            base, tuned, number, TILE, metric or oracles.cosine, search if metric else oracles.absmax()
        )
        for way, run in (("eager", daq.quantize), ("jit", jax.jit(daq.quantize, static_argnums=2))):
            q = run(jnp.asarray(base), jnp.asarray(tuned), recipe)
            codes, scale = np.asarray(q.codes), np.asarray(q.scale)
            view = np.repeat(np.repeat(scale, 128, 0), 128, 1)
            truth = rounded(tuned.astype(np.float32) / view, "fp8_e4m3fn", 448.0)
            found[f"{name}, {way}: codes that are not the nearest for their scale"] = differing(
                codes.astype(np.float32), truth
            )
            got = oracles.stored_scores(base, tuned, codes, scale, number, TILE, metric or oracles.cosine)
            short = np.max((oracle.score - got) / np.abs(oracle.score))
            found[f"{name}, {way}: tiles whose scale differs from the oracle's"] = differing(
                scale, oracle.scale
            )
            found[f"{name}, {way}: largest relative shortfall of a tile's score"] = float(max(short, 0))
    return found


def check_gains(size: int) -> dict[str, float | int]:
    """Unbiased rounding: every set's codes are those of one gain, and the change keeps its size."""
    number, found = oracles.FORMATS["fp8_e4m3fn"], {}
    base, tuned = rounding_oracles.native(5, (size, size), 0.01)
    for per in ("row", "column", "tile"):
        recipe = daq.Recipe(rounding=daq.UnbiasedGain(per))
        q = daq.quantize(jnp.asarray(base), jnp.asarray(tuned), recipe)
        values = np.asarray(q.codes).astype(np.float32)
        scale = np.repeat(np.repeat(np.asarray(q.scale), 128, 0), 128, 1)
        intervals = rounding_oracles.gain_intervals(base, tuned, values, scale, number.grid()[0])
        low, high = rounding_oracles.shared_gains(
            *intervals, rounding_oracles.set_labels(base.shape, TILE, per)
        )
        d, kept = (tuned - base).astype(np.float64), values.astype(np.float64) * scale - base
        found[f"unbiased gain of each {per}: sets that no one gain explains"] = int(np.sum(low > high))
        found[f"unbiased gain of each {per}: projection"] = float(np.sum(d * kept) / np.sum(d * d))
    return found


def check_traps() -> dict[str, float]:
    """What the obvious code does on this machine; none of it is in the library."""
    tuned = jnp.asarray(a_pair(3, 1024)[1], jnp.float32)
    scale = jnp.max(jnp.abs(tuned)) / 448

    def cast(x):
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)

    x = jnp.clip(tuned / scale, -448, 448)
    truth = daq.fp8_e4m3fn.round(x)
    c = 1.5 * 2.0**23
    rng = np.random.default_rng(4)
    a, s = rng.normal(size=(1024, 1024)).astype(np.float32), rng.uniform(1, 2, (1024, 1)).astype(np.float32)
    m = rng.uniform(0.01, 1, 10**6).astype(np.float32)
    ja, js = jnp.asarray(a), jnp.asarray(s)
    product = (a * s).astype(np.float32)
    return {
        "share of values left unrounded by a cast to FP8 and back inside jit": float(
            jnp.mean(jax.jit(cast)(x) != truth)
        ),
        "share left unrounded by (x + c) - c inside jit": float(
            jnp.mean(jax.jit(lambda v: (v + c) - c)(x) != jnp.round(x))
        ),
        "share of quotients by a broadcast that plain `/` gets wrong inside jit": float(
            np.mean(np.asarray(jax.jit(lambda p, r: p / r)(ja, js)) != a / s)
        ),
        "share of absmax / 448 that plain `/` gets wrong inside jit": float(
            np.mean(np.asarray(jax.jit(lambda v: v / 448.0)(jnp.asarray(m))) != m / np.float32(448))
        ),
        "share of lost changes that look kept with plain `code * scale - base` inside jit": float(
            np.mean(np.asarray(jax.jit(lambda p, r, b: p * r - b)(ja, js, jnp.asarray(product))) != 0)
        ),
    }


def failures(report: dict[str, Any]) -> list[str]:
    """The lines of a report that must hold and do not."""
    searches, gains = report["searches"], report["gains"]
    bad = [k for k, v in report["exact"].items() if v]
    bad += [k for k, v in searches.items() if "not the nearest" in k and v]
    bad += [k for k, v in searches.items() if "shortfall" in k and v > 1e-6]
    bad += [k for k, v in searches.items() if k.startswith(("absmax", "paper_sign")) and "differs" in k and v]
    return bad + [k for k, v in gains.items() if "no one gain" in k and v]


def main(*, values: int = 10_000_000, size: int = 1024, out: Path | None = None, quick: bool = False) -> int:
    """Writes `exactness_DEVICE.json`.

    Args:
        values: random values that are rounded.
        size: inputs and outputs of the weights that are quantized.
        out: folder for the results; None for `benchmarks/results`.
        quick: a hundred thousand values and small weights, to see that it runs.
    """
    values, size = (100_000, 256) if quick else (values, size)
    start = time.time()
    report = common.environment() | {
        "exact": {**check_rounding(values), **check_arithmetic()},
        "searches": check_searches(size),
        "gains": check_gains(size),
        "traps": check_traps(),
    }
    report["seconds"] = round(time.time() - start)
    print(json.dumps(report, indent=1))
    bad = failures(report)
    print("FAILED: " + "; ".join(bad) if bad else "all exact")
    common.write(common.named("exactness", report, common.results(out, quick)), report)
    return int(bool(bad))


COMMANDS = {"exactness": main}
