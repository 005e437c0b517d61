"""Is what `quantize` returned right? Sampled tiles are held against the oracles of the tests."""

from collections.abc import Iterator

import jax
import numpy as np
from jax import lax
from numpy.typing import NDArray

import daq_jax as daq
from tests import oracles, rounding_oracles

TILE = 128  # rows and columns of a tile in every recipe that is timed
SAMPLE = 32  # tiles checked
PAPER = oracles.coarse_to_fine(0.8, 1.5, 5, 10)
ORACLES = {  # metric and search, by recipe
    "paper_cosine": (oracles.cosine, PAPER),
    "paper_sign": (oracles.sign_rate, PAPER),
    "mse": (oracles.neg_mse, PAPER),
    "absmax": (oracles.cosine, oracles.absmax()),
}

Tree = dict[str, jax.Array]


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
        raise SystemExit(
            f"{recipe}: WRONG: {wrong} codes are not the nearest; a score is {shortfall:.1e} too low"
        )
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
        raise SystemExit(f"{recipe}: WRONG: projection {dq / dd:.4f}; {no_gain} columns are of no one gain")
    return {"tiles_checked": SAMPLE, "projection": float(dq / dd)}
