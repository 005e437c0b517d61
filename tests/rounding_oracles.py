"""What a rounding must do, from its definition, in NumPy float64: neighbours, sets, gains and projections.

A rounding is judged by the codes that were stored. A code fixes an interval of gains `g` for which it is the
nearest to `base + g d`; elements that share a gain must have intervals with a point in common.
"""

from __future__ import annotations

import math
import statistics

import numpy as np
from numpy.typing import NDArray

from tests import oracles

SMALLEST_SET = 64  # narrow tiles join up until a set has as many elements
LARGEST_GAIN = 1024.0


# --- Values of the formats ----------------------------------------------------------------------------------


def nf4_levels() -> NDArray:
    """Quantiles of the normal distribution, eight below zero's and nine from it on (arXiv:2305.14314)."""
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort([*below, 0.0, *above])
    return levels / levels[-1]


def grids() -> dict[str, NDArray]:
    """Every value of each format in rising order, float64."""
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    bnb = np.array([0, 0.0625, 2, 3, 4, 6, 8, 12])
    return {name: number.grid()[0] for name, number in oracles.FORMATS.items()} | {
        "int4": np.arange(-7.0, 8.0),
        "fp4_e2m1": np.union1d(-e2m1, e2m1),
        "fp4_bnb": np.union1d(-bnb, bnb),
        "nf4": nf4_levels(),
    }


def floor(x: NDArray, grid: NDArray) -> NDArray:
    """Largest value of a rising grid not above each `x`; the least of all below it."""
    return grid[np.maximum(np.searchsorted(grid, x, side="right") - 1, 0)]


def ceil(x: NDArray, grid: NDArray) -> NDArray:
    """Smallest value of a rising grid not below each `x`; the greatest of all above it."""
    return grid[np.minimum(np.searchsorted(grid, x, side="left"), len(grid) - 1)]


# --- Weights ------------------------------------------------------------------------------------------------


def native(
    seed: int,
    shape: tuple[int, int],
    change: float,
    *,
    tile: oracles.TileSize = (128, 128),
    number: oracles.NumberFormat = oracles.FORMATS["fp8_e4m3fn"],
    rank: int | None = None,
) -> tuple[NDArray, NDArray]:
    """Float32 pair: the base is codes times scales; the change is `change` times as large, and normal.

    The largest weight of each tile does not change, so that the base's grid is the tuned weights' too. With
    `rank`, the change is that many directions of falling size, and a tenth as much of noise.
    """
    rng = np.random.default_rng(seed)
    raw = rng.normal(0, 0.02, shape).astype(np.float32)
    scale = oracles.spread(oracles.absmax_scales(raw, number, tile), shape, tile)
    base = number.round(raw / scale).astype(np.float32) * scale
    d = rng.normal(0, 1, shape)
    if rank is not None:
        u, v = (rng.normal(0, 1, (n, rank)) for n in shape)
        d = (u * np.linspace(2, 0.5, rank)) @ v.T / math.sqrt(rank) + 0.1 * d
    d *= change * 0.02 / np.std(d)
    for _, where in oracles.tiles(shape, tile):
        d[where] *= np.abs(base[where]) < np.max(np.abs(base[where]))
        over = np.abs(base[where] + d[where]) >= np.max(np.abs(base[where]))
        d[where] = np.where(over, -np.abs(d[where]) * np.sign(base[where]), d[where])
    return base, (base + d).astype(np.float32)


# --- Sets of elements that share a gain ---------------------------------------------------------------------


def tile_labels(shape: tuple[int, int], tile: oracles.TileSize) -> NDArray:
    """`[R, C]` whole numbers: which tile an element is in."""
    rows, columns = (np.arange(n) // (t or n) for n, t in zip(shape, tile, strict=True))
    return rows[:, None] * shape[1] + columns


def set_labels(shape: tuple[int, int], tile: oracles.TileSize, per: str) -> NDArray:
    """`[R, C]` whole numbers: which set an element is in; equal numbers share a gain.

    A set is a row, a column or the whole of a tile. Where that has fewer than 64 elements in a whole tile it
    reaches over as many tiles in line as make 64: a row to the right, a column down, a tile its longer way.
    """
    r, c = (min(t or n, n) for n, t in zip(shape, tile, strict=True))
    i, j = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    elements = {"row": c, "column": r, "tile": r * c}[per]
    run = math.ceil(SMALLEST_SET / elements)
    down = per == "column" or (per == "tile" and r >= c)
    rows = i // (r * (run if down else 1)) if per != "row" else i
    columns = j // (c * (1 if down else run)) if per != "column" else j
    _, labels = np.unique(
        np.stack(np.broadcast_arrays(rows, columns)).reshape(2, -1), axis=1, return_inverse=True
    )
    return labels.reshape(shape)


def over_sets(x: NDArray, labels: NDArray) -> NDArray:
    """Sum of `x` over each set, float64, by label."""
    return np.bincount(labels.ravel(), x.astype(np.float64).ravel())


# --- Gains --------------------------------------------------------------------------------------------------


def gain_intervals(
    base: NDArray, tuned: NDArray, values: NDArray, scale: NDArray, grid: NDArray
) -> tuple[NDArray, NDArray]:
    """The gains, from `low` to `high`, for which each stored value is nearest to `base + g d`.

    All `[R, C]`; `values` in code units, `scale` spread. Both ends give way by a few float32 roundings of the
    target. An element without change allows any gain, or none if its value is not nearest to the base.
    """
    at = np.searchsorted(grid, values)
    assert np.array_equal(grid[at], values)
    edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
    b, d, s = base.astype(np.float64), tuned.astype(np.float64) - base, scale.astype(np.float64)
    from_below, to_above = edges[at] * s, edges[at + 1] * s
    slack = [2.0**-21 * np.where(np.isfinite(x), np.abs(x) + np.abs(b), 0.0) for x in (from_below, to_above)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = (from_below - slack[0] - b) / d, (to_above + slack[1] - b) / d
    low, high = np.where(d > 0, ends[0], ends[1]), np.where(d > 0, ends[1], ends[0])
    fits = (from_below - slack[0] <= b) & (b <= to_above + slack[1])
    return np.where(d == 0, np.where(fits, -np.inf, np.inf), low), np.where(d == 0, np.inf, high)


def shared_gains(low: NDArray, high: NDArray, labels: NDArray) -> tuple[NDArray, NDArray]:
    """What the intervals of each set have in common, by label: empty where the first is above the second."""
    lows, highs = np.full(labels.max() + 1, -np.inf), np.full(labels.max() + 1, np.inf)
    np.maximum.at(lows, labels.ravel(), low.ravel())
    np.minimum.at(highs, labels.ravel(), high.ravel())
    return lows, highs


def projection_at(
    gains: NDArray,
    base: NDArray,
    tuned: NDArray,
    scale: NDArray,
    number: oracles.NumberFormat,
    labels: NDArray,
) -> NDArray:
    """Projection of each set if its codes were the nearest to `base + g d`; NaN where nothing changed."""
    b, d = base.astype(np.float64), tuned.astype(np.float64) - base
    kept = number.round((b + gains[labels] * d) / scale) * scale - b
    with np.errstate(invalid="ignore"):
        return over_sets(d * kept, labels) / over_sets(d * d, labels)


def projection(base: NDArray, tuned: NDArray, kept: NDArray) -> float:
    """<d, q> / <d, d> of flat or whole weights."""
    d, q = tuned.astype(np.float64) - base, kept.astype(np.float64) - base
    return float(np.sum(d * q) / np.sum(d * d))


def bias_in_noise(base: NDArray, tuned: NDArray, kept: NDArray, labels: NDArray) -> NDArray:
    """Size of <d, e> over each set in standard deviations of its own noise, by label."""
    d, e = tuned.astype(np.float64) - base, kept.astype(np.float64) - tuned
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(over_sets(d * e, labels)) / np.sqrt(over_sets((d * e) ** 2, labels))
