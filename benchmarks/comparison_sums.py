"""Do the sums of `compare` hold on a leaf of 64M elements? Prints a table; exit status 1 if they do not.

    python -m benchmarks comparison_sums [--size SIZE]

Every figure of a `[SIZE, SIZE]` leaf (8192 unless said otherwise) is compared with NumPy in float64, for
bfloat16 and float32 weights with small changes, eagerly and inside `jax.jit`. A plain float32 sum of that
many terms can be wrong in the third digit; ours must agree to 1e-5 relative.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import daq_jax as daq
from benchmarks import common
from tests import oracles

BOUND = 1e-5  # relative
TILE = (128, 128)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
WAYS: dict[str, Callable[..., Any]] = {"eager": lambda f: f, "jit": jax.jit}


def pair(size: int, dtype: Any) -> tuple[NDArray, NDArray]:
    """Weights of standard deviation 0.02 and a change of 1 % of that."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((size, size), np.float32) * np.float32(0.02)).astype(dtype)
    change = rng.standard_normal((size, size), np.float32) * np.float32(0.0002)
    return base, (base.astype(np.float32) + change).astype(dtype)


def expected(base: NDArray, tuned: NDArray, q: daq.QTensor) -> dict[str, Any]:
    """Every figure, in float64, from the stored codes."""
    number = oracles.FORMATS["fp8_e4m3fn"]
    kept = oracles.dequantized(np.asarray(q.codes), np.asarray(q.scale), number, TILE)
    on_grid = oracles.on_grid(base, number, TILE)
    flat = (x.astype(np.float32).ravel() for x in (base, tuned, kept))
    return oracles.figures(*flat, on_grid.ravel())


def difference(name: str, got: Any, wanted: Any) -> float:
    """Largest relative difference; of `on_grid`, the difference in the share of all elements.

    An element exactly half a unit from a code times a scale may count as on the grid or not. There are a few
    in 64M, and not many more on the grid by chance.
    """
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    unit = 1 if name == "on_grid" else np.maximum(np.abs(wanted), np.finfo(np.float64).tiny)
    return float(np.max(np.abs(got - wanted) / unit))


def rows(size: int, dtype: str) -> dict[str, dict[str, float]]:
    """For each figure its value in float64, and the relative difference of each way to run `compare`."""
    base, tuned = pair(size, DTYPES[dtype])
    q = daq.quantize(jnp.asarray(base), jnp.asarray(tuned), daq.recipes.absmax)
    truth = expected(base, tuned, q)
    found = {way: wrap(daq.compare)(base, tuned, q).total for way, wrap in WAYS.items()}
    # Counts are of one decade each; their sum stands for them in the table.
    return {
        name: {"float64": float(np.sum(wanted))}
        | {way: difference(name, getattr(figures, name), wanted) for way, figures in found.items()}
        for name, wanted in truth.items()
    }


def main(*, size: int = 8192, quick: bool = False) -> int:
    """Prints a table.

    Args:
        size: rows and columns of the leaf.
        quick: a leaf of 512 rows, to see that it runs.
    """
    size, bad, lines = 512 if quick else size, [], []
    for dtype in DTYPES:
        for name, row in rows(size, dtype).items():
            lines.append([dtype, name, f"{row['float64']:.9g}", f"{row['eager']:.1e}", f"{row['jit']:.1e}"])
            bad += [f"{dtype} {name}, {way}" for way in WAYS if not row[way] <= BOUND]
    print(common.table(["dtype", "figure", "float64", "eager, relative difference", "in jit"], lines))
    print(f"\n{common.provenance(common.environment())}:")
    print(f"FAILED: {'; '.join(bad)}" if bad else f"all within {BOUND:g} on {size * size} elements")
    return int(bool(bad))


COMMANDS = {"comparison_sums": main}
