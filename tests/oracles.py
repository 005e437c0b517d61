"""What the library must compute, written from the definitions in NumPy alone.

Nothing here is fast or shared with the code under test: codes are looked up in a table of all values, tiles
are visited one after the other and cut without padding, and scores are taken in float64. Only what the
definition itself fixes in float32 (weights, scales, quotients and products) is rounded to float32.

A tile is given by its size `(r, c)`, None meaning the whole axis: Block(r, c) is `(r, c)`, Channel
`(None, 1)`, PerTensor `(None, None)` and Group(n) `(n, 1)`. A matrix is `(in_axes, out_axes)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

TileSize = tuple[int | None, int | None]
Matrix = tuple[tuple[int, ...], tuple[int, ...]]
Metric = Callable[[NDArray, NDArray], NDArray]  # d [K], q [N, K] -> [N] float64, higher is better
Search = Callable[[Callable[[NDArray], NDArray]], float]  # (ratios [N] -> scores [N]) -> the picked ratio

LAST_TWO: Matrix = ((-2,), (-1,))
SMALLEST_NORMAL = np.float32(2.0**-126)  # scales below it become 1, as on all-zero tiles
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
SMALLEST_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126}


# --- Number formats -----------------------------------------------------------------------------------------


def e4m3fn_value(code: int) -> float:
    """Sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity, one NaN a sign (arXiv:2209.05433)."""
    e, m = (code >> 3) & 15, code & 7
    size = math.nan if (e, m) == (15, 7) else m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
    return -size if code >> 7 else size


def e5m2_value(code: int) -> float:
    """Sign, 5 exponent bits of bias 15, 2 mantissa bits; infinity and NaN as in IEEE (arXiv:2209.05433)."""
    e, m = (code >> 2) & 31, code & 3
    if e == 31:
        size = math.nan if m else math.inf
    else:
        size = m / 4 * 2.0**-14 if e == 0 else (1 + m / 4) * 2.0 ** (e - 15)
    return -size if code >> 7 else size


def int8_value(code: int) -> float:
    """Two's complement."""
    return float(code - 256 if code >= 128 else code)


@dataclasses.dataclass(frozen=True, eq=False)
class NumberFormat:
    """The values of all 256 codes, and how numbers are rounded to those within `largest` of zero."""

    name: str
    values: NDArray  # [256] float64, indexed by the code's bits
    largest: float

    def decode(self, codes: NDArray) -> NDArray:
        """Float64 values of codes of any one-byte dtype."""
        return self.values[np.ascontiguousarray(codes).view(np.uint8)]

    def grid(self) -> tuple[NDArray, NDArray]:
        """Distinct finite values in rising order, and for each whether its code is even."""
        codes = np.flatnonzero(np.isfinite(self.values) & (np.abs(self.values) <= self.largest))
        values, first = np.unique(self.values[codes] + 0.0, return_index=True)  # + 0.0 joins -0 and 0
        return values, codes[first] % 2 == 0

    def midpoints(self) -> NDArray:
        """Float64 numbers half-way between neighbouring codes."""
        values, _ = self.grid()
        return (values[1:] + values[:-1]) / 2

    def round(self, x: NDArray) -> NDArray:
        """Float64 value nearest to each `x` after clipping; half-way goes to the even code."""
        values, even = self.grid()
        x = np.clip(x.astype(np.float64), -self.largest, self.largest)
        above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
        low, high = values[above - 1], values[above]
        take_high = (high - x < x - low) | ((high - x == x - low) & even[above])
        return np.where(take_high, high, low)


FORMATS = {
    "fp8_e4m3fn": NumberFormat("fp8_e4m3fn", np.array([e4m3fn_value(c) for c in range(256)]), 448.0),
    "fp8_e5m2": NumberFormat("fp8_e5m2", np.array([e5m2_value(c) for c in range(256)]), 57344.0),
    "int8": NumberFormat("int8", np.array([int8_value(c) for c in range(256)]), 127.0),
}


# --- Matrix view and tiles ----------------------------------------------------------------------------------


def matrix_view(array: NDArray, matrix: Matrix | None = None) -> NDArray:
    """`[..., R, C]`: batch axes in their order, then the input axes as one, then the output axes."""
    rows, columns = ([axis % array.ndim for axis in axes] for axes in matrix or LAST_TWO)
    batch = [axis for axis in range(array.ndim) if axis not in rows + columns]
    sizes = [math.prod(array.shape[axis] for axis in axes) for axes in (rows, columns)]
    return array.transpose(batch + rows + columns).reshape([array.shape[axis] for axis in batch] + sizes)


def grid_shape(view_shape: tuple[int, ...], tile: TileSize) -> tuple[int, ...]:
    """Shape of the scales of a matrix view; a partial tile at the edge counts as a tile."""
    *batch, rows, columns = view_shape
    return (*batch, math.ceil(rows / (tile[0] or rows)), math.ceil(columns / (tile[1] or columns)))


def tiles(view_shape: tuple[int, ...], tile: TileSize) -> Iterator[tuple[tuple[int, ...], tuple]]:
    """Each tile as (index into the scales, index into the matrix view)."""
    r, c = tile[0] or view_shape[-2], tile[1] or view_shape[-1]
    for index in np.ndindex(*grid_shape(view_shape, tile)):
        *batch, i, j = index
        yield index, (*batch, slice(i * r, (i + 1) * r), slice(j * c, (j + 1) * c))


def spread(scale: NDArray, view_shape: tuple[int, ...], tile: TileSize) -> NDArray:
    """Each scale repeated over its tile: the shape of the matrix view."""
    full = np.empty(view_shape, scale.dtype)
    for index, where in tiles(view_shape, tile):
        full[where] = scale[index]
    return full


def dequantized(
    codes: NDArray, scale: NDArray, number: NumberFormat, tile: TileSize, matrix: Matrix | None = None
) -> NDArray:
    """`[..., R, C]` float32: value of the code times its tile's scale, rounded once."""
    values = number.decode(matrix_view(codes, matrix)).astype(np.float32)
    return values * spread(np.asarray(scale, np.float32), values.shape, tile)


# --- Scales and rounding ------------------------------------------------------------------------------------


def absmax_scale(target: NDArray, number: NumberFormat) -> np.float32:
    """float32(absmax) / float32(largest), or 1 where that is below the smallest normal number."""
    scale = np.float32(np.max(np.abs(target))) / np.float32(number.largest)
    return np.float32(1) if scale < SMALLEST_NORMAL else scale


def power_of_two_above(scale: NDArray) -> NDArray:
    """Smallest power of two that is not below each scale."""
    mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)


def absmax_scales(
    tuned: NDArray, number: NumberFormat, tile: TileSize, matrix: Matrix | None = None
) -> NDArray:
    """The AbsMax scale of every tile of one leaf."""
    view = matrix_view(np.asarray(tuned), matrix).astype(np.float32)
    scale = np.empty(grid_shape(view.shape, tile), np.float32)
    for index, where in tiles(view.shape, tile):
        scale[index] = absmax_scale(view[where], number)
    return scale


def round_trip(target: NDArray, scale: NDArray, number: NumberFormat) -> NDArray:
    """`[K]` float32 weights and `[N]` scales -> `[N, K]` float32 dequantized weights."""
    scale = np.asarray(scale, np.float32)[:, None]
    return number.round(target / scale).astype(np.float32) * scale


# --- Metrics ------------------------------------------------------------------------------------------------


def cosine(d: NDArray, q: NDArray) -> NDArray:
    """<d, q> / (|d| |q|); 0 where the change is erased."""
    norms = np.sqrt(np.sum(d * d, -1)) * np.sqrt(np.sum(q * q, -1))
    return np.sum(d * q, -1) / np.where(norms > 0, norms, 1.0)


def sign_rate(d: NDArray, q: NDArray, threshold: float = 1e-5) -> NDArray:
    """Share of the |d| > threshold whose q has d's sign; 1 where there is none."""
    counted = np.broadcast_to(np.abs(d) > threshold, q.shape)
    kept = np.sum(counted & (np.sign(d) == np.sign(q)), -1)
    total = np.sum(counted, -1)
    return np.where(total > 0, kept / np.maximum(total, 1), 1.0)


def neg_mse(d: NDArray, q: NDArray) -> NDArray:
    """Minus the mean squared error."""
    return -np.mean((d - q) ** 2, -1)


# --- Searches -----------------------------------------------------------------------------------------------


def pick(ratios: NDArray, scores: NDArray) -> int:
    """Index of the best score; ties go to the ratio nearest 1, then to the smaller."""
    ratios = np.asarray(ratios, np.float32).astype(np.float64)
    return int(np.lexsort((ratios, np.abs(ratios - 1), -scores))[0])


def absmax() -> Search:
    """No search."""
    return lambda score: 1.0


def grid(low: float, high: float, n: int) -> Search:
    """Equally spaced ratios, and AbsMax."""
    ratios = np.append(np.linspace(low, high, n), 1.0)
    return lambda score: ratios[pick(ratios, score(ratios))]


def coarse_to_fine(low: float, high: float, coarse: int, fine: int) -> Search:
    """The best of equally spaced ratios, refined within half a step on both sides of it."""
    points = np.linspace(low, high, coarse)
    half = (points[1] - points[0]) / 2 if coarse > 1 else (high - low) / 2

    def search(score: Callable[[NDArray], NDArray]) -> float:
        winner = points[pick(points, score(points))]
        near = np.linspace(max(winner - half, low), min(winner + half, high), fine)
        ratios = np.concatenate([[winner], near, [1.0]])
        return ratios[pick(ratios, score(ratios))]

    return search


@dataclasses.dataclass(frozen=True)
class Best:
    """What a search must find in one leaf; all arrays have the shape of its scales."""

    scale: NDArray  # float32
    score: NDArray  # float64; NaN where the tile did not change
    absmax: NDArray  # float64, the score of the AbsMax scale


def search_leaf(
    base: NDArray,
    tuned: NDArray,
    number: NumberFormat,
    tile: TileSize,
    metric: Metric,
    search: Search,
    *,
    matrix: Matrix | None = None,
    finish: Callable[[NDArray], NDArray] = lambda scale: scale,
) -> Best:
    """Search every tile of one leaf. `finish` turns candidate scales into those that may be stored."""
    base, tuned = (matrix_view(np.asarray(x), matrix).astype(np.float32) for x in (base, tuned))
    shape = grid_shape(tuned.shape, tile)
    best = Best(np.empty(shape, np.float32), np.empty(shape), np.empty(shape))
    for index, where in tiles(tuned.shape, tile):
        b, t = base[where].ravel(), tuned[where].ravel()
        d = (t - b).astype(np.float64)
        start = absmax_scale(t, number)

        def score(ratios: NDArray, b: NDArray = b, t: NDArray = t, d: NDArray = d, start: np.float32 = start):
            scales = finish(np.asarray(ratios, np.float32) * start)
            return metric(d, round_trip(t, scales, number).astype(np.float64) - b)

        changed = bool(np.any(d))
        ratio = search(score) if changed else 1.0
        best.scale[index] = finish(np.array([np.float32(ratio) * start]))[0]
        best.score[index], best.absmax[index] = score(np.array([ratio, 1.0])) if changed else (np.nan, np.nan)
    return best


def stored_scores(
    base: NDArray,
    tuned: NDArray,
    codes: NDArray,
    scale: NDArray,
    number: NumberFormat,
    tile: TileSize,
    metric: Metric,
    *,
    matrix: Matrix | None = None,
) -> NDArray:
    """Score of what is stored, per tile, in float64; NaN where the tile did not change."""
    kept = dequantized(codes, scale, number, tile, matrix).astype(np.float64)
    base, tuned = (matrix_view(np.asarray(x), matrix).astype(np.float32) for x in (base, tuned))
    scores = np.empty(grid_shape(tuned.shape, tile))
    for index, where in tiles(tuned.shape, tile):
        d = (tuned[where] - base[where]).astype(np.float64).ravel()
        q = (kept[where] - base[where]).ravel()
        scores[index] = metric(d, q[None])[0] if np.any(d) else np.nan
    return scores


# --- The released program -----------------------------------------------------------------------------------


def released_scales(
    base: NDArray, tuned: NDArray, tile: TileSize, metric: str, low=0.8, high=1.5, coarse=5, fine=10
) -> NDArray:
    """The scales that the program released with arXiv:2603.22324 picks for e4m3 weights.

    It scores another quantizer than it ships (the quotient is rounded to an integer before the FP8 cast),
    takes the first of equal scores, which is the lowest ratio, does not look at the coarse winner again, and
    falls back to AbsMax only if the fine winner is strictly worse.
    """
    number = FORMATS["fp8_e4m3fn"]
    base, tuned = (matrix_view(np.asarray(x)).astype(np.float32) for x in (base, tuned))
    scales = np.empty(grid_shape(tuned.shape, tile), np.float32)
    points = np.linspace(low, high, coarse, dtype=np.float32)
    half = (high - low) / (coarse - 1) / 2
    for index, where in tiles(tuned.shape, tile):
        b, t = base[where].ravel(), tuned[where].ravel()
        d = (t - b).astype(np.float64)
        start = np.float32(np.max(np.abs(t))) / np.float32(number.largest)

        def score(ratios: NDArray, b: NDArray = b, t: NDArray = t, d: NDArray = d, start: np.float32 = start):
            s = (ratios * start)[:, None]
            q = number.round(np.rint(t / s)).astype(np.float32) * s - b.astype(np.float64)
            if metric == "cosine":
                return q @ d / np.maximum(np.linalg.norm(q, axis=-1), 1e-10) / max(np.linalg.norm(d), 1e-10)
            counted = np.abs(d) > 1e-5
            return np.sum(counted & (np.sign(d) == np.sign(q)), -1) / max(1, np.sum(counted))

        winner = points[np.argmax(score(points))]
        near = np.linspace(max(winner - half, low), min(winner + half, high), fine, dtype=np.float32)
        scores = score(near)
        default = score(np.ones(1, np.float32))[0]
        scales[index] = start * (np.float32(1) if scores.max() < default else near[np.argmax(scores)])
    return scales


# --- What was kept ------------------------------------------------------------------------------------------


def figures(base: NDArray, tuned: NDArray, kept: NDArray, on_grid: NDArray) -> dict[str, float | NDArray]:
    """Every figure of a comparison from flat float32 arrays; a pool of leaves is their concatenation."""
    d = (tuned - base).astype(np.float64)
    q = kept.astype(np.float64) - base
    counted = np.abs(d) > 1e-5
    signs = (np.sign(d) * np.sign(q))[counted]
    with np.errstate(divide="ignore", invalid="ignore"):
        dd, qq, dq, ee = (np.float64(np.sum(x)) for x in (d * d, q * q, d * q, (q - d) ** 2))
        share = [np.sum(signs == s) / np.float64(signs.size) for s in (1, -1, 0)]
        return {
            "elements": d.size,
            "sign_rate": share[0],
            "flipped": share[1],
            "lost": share[2],
            "unchanged": np.mean(q == 0),
            "cosine": dq / np.sqrt(dd * qq),
            "projection": dq / dd,
            "norm_ratio": np.sqrt(qq / dd),
            "mse": ee / d.size,
            "snr_db": 10 * np.log10(dd / ee),
            "counts": np.histogram(np.abs(d), [0, 1e-5, 1e-4, 1e-3, np.inf])[0],
            "on_grid": np.mean(on_grid),
        }


def on_grid(
    base: NDArray,
    number: NumberFormat,
    tile: TileSize,
    scale: NDArray | None = None,
    matrix: Matrix | None = None,
) -> NDArray:
    """`[..., R, C]` bool: is a base weight within half an ulp of its dtype of a code times the scale?"""
    name = np.asarray(base).dtype.name
    scale = absmax_scales(base, number, tile, matrix) if scale is None else np.asarray(scale)
    view = matrix_view(np.asarray(base), matrix).astype(np.float32)
    full = spread(scale, view.shape, tile)
    nearest = number.round(view / full) * full.astype(np.float64)
    _, exponent = np.frexp(view.astype(np.float64))  # |w| = m 2^exponent with m in [0.5, 1)
    ulp = np.ldexp(1.0, np.maximum(exponent - 1, SMALLEST_EXPONENT[name]) - MANTISSA_BITS[name])
    return np.abs(view - nearest) <= ulp / 2
