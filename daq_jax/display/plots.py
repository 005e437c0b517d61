"""Pictures of a comparison, with matplotlib: `pip install 'daq-jax[plot]'`.

Each function returns a new matplotlib figure, made without pyplot. Show it in a notebook or call its
`savefig`. Colours are of the cividis map, whose lightness rises evenly, so that pictures read the same in
greyscale and to colour-blind eyes. Series differ by marker and line style too.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from daq_jax.analysis.comparison import Comparison
from daq_jax.analysis.histograms import CHANGE_EDGES, RATIO_EDGES, SIZE_EDGES, Details
from daq_jax.analysis.names import on_one_line
from daq_jax.errors import DaqError

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Picture
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'daq-jax[plot]'.") from error

_MAP = "cividis"
_DARK, _MIDDLE, _LIGHT = "#00224e", "#7d7c78", "#d8c45b"  # of that map, far apart in lightness too
_FEWEST = 20  # elements that a rate is worth drawing of
_WRITTEN = 16  # columns up to which a heat map has its numbers in it
_HIGHEST = 2.0  # projection at the end of the colours


def _picture(width: float = 6.0, height: float = 4.0) -> tuple[Picture, Axes]:
    picture = Picture(figsize=(width, height), layout="constrained")
    return picture, picture.add_subplot()


def _plain(name: str) -> str:
    """A name in a picture, where matplotlib would set what is between two dollar signs as a formula."""
    return on_one_line(name).replace("$", r"\$")


def _details(comparison: Comparison, path: str | None) -> Details:
    """Details of one leaf, or of all leaves together."""
    if not comparison.details:
        raise DaqError("this comparison has no details; make it by `compare(..., details=True)`.")
    if path is not None and path not in comparison.details:
        raise DaqError(f"there is no leaf {path!r} in this comparison.")
    first, *rest = [comparison.details[path]] if path is not None else comparison.details.values()
    return sum(rest, first)


def density(comparison: Comparison, path: str | None = None) -> Picture:
    """Kept against true change: a two-dimensional histogram, with a logarithmic scale of colour.

    A change on the diagonal is kept, on the horizontal axis it is lost. Farther from the axis than the
    diagonal it is overdone, and on the other side of the axis it has the wrong sign.

    Args:
        comparison: made with `details=True`.
        path: path of the leaf to show; None for all leaves together.
    """
    found = _details(comparison, path)
    picture, axes = _picture(5.2, 4.4)
    counts = np.ma.masked_equal(found.density.T, 0)
    mesh = axes.pcolormesh(CHANGE_EDGES, CHANGE_EDGES, counts, cmap=_MAP, norm=LogNorm(1), rasterized=True)
    ends = CHANGE_EDGES[[0, -1]]
    axes.plot(ends, ends, color="black", linewidth=1, linestyle="--", label="kept: q = d")
    axes.axhline(0, color="black", linewidth=1, linestyle=":", label="lost: q = 0")
    axes.set(
        xlabel="true change d, in root mean squares of the leaf's d",
        ylabel="kept change q, in the same unit",
        title=f"{found.looked_at:,} elements looked at",
    )
    axes.legend(loc="lower right", fontsize="small")
    picture.colorbar(mesh, label="elements")
    return picture


def sign_rate_by_size(comparison: Comparison, path: str | None = None) -> Picture:
    """Share of the elements whose kept change has the right sign, by the size of the true change.

    Args:
        comparison: made with `details=True`.
        path: path of the leaf to show; None for all leaves together.
    """
    found = _details(comparison, path)
    picture, axes = _picture()
    middle = np.sqrt(SIZE_EDGES[1:] * SIZE_EDGES[:-1])
    enough = found.moved >= _FEWEST
    rate = 100 * found.same_sign[enough] / found.moved[enough]
    share = 100 * found.moved / max(1, found.moved.sum())
    axes.bar(
        middle,
        share,
        width=np.diff(SIZE_EDGES),
        color=_LIGHT,
        edgecolor="white",
        label="elements, share in %",
    )
    axes.plot(middle[enough], rate, color=_DARK, marker="o", label="sign kept, %")
    axes.axhline(50, color=_MIDDLE, linewidth=1, linestyle=":", label="by chance")
    shown = np.flatnonzero(enough)
    if shown.size:
        axes.set_xlim(float(SIZE_EDGES[shown[0]]), float(SIZE_EDGES[shown[-1] + 1]))
    axes.set(xscale="log", ylim=(0, 103), xlabel="size of the true change |d|, weight units", ylabel="%")
    axes.legend(fontsize="small")
    return picture


def scale_ratios(comparison: Comparison, path: str | None = None) -> Picture:
    """Number of tiles by the ratio of the chosen scale to the AbsMax scale.

    Args:
        comparison: made with `details=True`.
        path: path of the leaf to show; None for all leaves together.
    """
    found = _details(comparison, path)
    picture, axes = _picture()
    axes.bar(RATIO_EDGES[:-1], found.ratios, width=np.diff(RATIO_EDGES), align="edge", color=_DARK)
    axes.axvline(1, color=_MIDDLE, linewidth=1, linestyle="--", label="AbsMax")
    shown = np.flatnonzero(found.ratios)
    low, high = (shown[0], shown[-1] + 1) if shown.size else (0, -1)
    axes.set_xlim(min(0.7, RATIO_EDGES[low] * 0.98), max(1.6, RATIO_EDGES[high] * 1.02))
    axes.set(xlabel="chosen scale / AbsMax scale", ylabel="tiles", yscale="symlog")
    axes.legend(fontsize="small")
    return picture


def place_of(path: str) -> tuple[str, int]:
    """The kind of matrix that a path names, and its layer: the first number in the path, or -1.

    >>> place_of("model.layers.12.mlp.up_proj.weight")
    ('model.layers.*.mlp.up_proj', 12)
    """
    kind = re.sub(r"[./](weight|kernel|w)$", "", path)
    found = re.search(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])|(?<=_)\d+", kind)
    if not found:
        return kind, -1
    return f"{kind[: found.start()]}*{re.sub(r'(?<=[./])[0-9]+(?=[./])', '*', kind[found.end() :])}", int(
        found[0]
    )


def projection_by_layer(comparison: Comparison) -> Picture:
    """A heat map of projections, with a column for each layer and a row for each kind of matrix.

    Experts of one layer and kind are pooled. Above 1, where a change is overdone, colours are light; below 1,
    where it is lost, they are dark.
    """
    sums: dict[tuple[str, int], list[float]] = {}
    for path, figures in comparison.leaves.items():
        pooled = sums.setdefault(place_of(path), [0.0, 0.0])
        pooled[0] += float(figures.dq)
        pooled[1] += float(figures.dd)
    kinds = sorted({kind for kind, _ in sums})
    layers = sorted({layer for _, layer in sums})
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), (dq, dd) in sums.items():
        grid[kinds.index(kind), layers.index(layer)] = dq / dd if dd > 0 else np.nan
    picture, axes = _picture(min(14.0, 4.5 + 0.45 * len(layers)), min(12.0, 1.6 + 0.35 * len(kinds)))
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=_MAP, vmin=0, vmax=_HIGHEST, aspect="auto")
    every = math.ceil(len(layers) / 24)
    axes.set_xticks(range(0, len(layers), every), [str(n) if n >= 0 else "-" for n in layers[::every]])
    axes.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds], fontsize="small")
    axes.set(xlabel="layer", title="projection: 1 keeps the change at its size")
    if len(layers) <= _WRITTEN:
        for (i, j), value in np.ndenumerate(grid):
            ink = "black" if value > _HIGHEST / 2 else "white"
            words = "" if np.isnan(value) else f"{value:.2f}"
            axes.text(j, i, words, ha="center", va="center", color=ink, fontsize="x-small")
    picture.colorbar(image, label="projection", extend="max")
    return picture


def recipes_side_by_side(comparisons: Mapping[str, Comparison]) -> Picture:
    """Projection, cosine and sign rate of several recipes: a bar for each leaf, a diamond for the total.

    Args:
        comparisons: comparisons of one pair of models, by the name of the recipe.
    """
    if not comparisons:
        raise DaqError("there is no comparison to draw.")
    panels = (
        ("projection", 1.0, 1.0, "projection"),
        ("cosine", None, 1.0, "cosine"),
        ("sign_rate", 50, 100, "sign rate, %"),
    )
    picture = Picture(figsize=(9.0, 1.4 + 0.45 * len(comparisons)), layout="constrained")
    for number, (figure, line, unit, title) in enumerate(panels, 1):
        axes = picture.add_subplot(1, len(panels), number)
        for row, table in enumerate(comparisons.values()):
            values = np.array([float(getattr(leaf, figure)) for leaf in table.leaves.values()]) * unit
            axes.scatter(values, np.full(values.shape, row), s=12, marker="|", color=_MIDDLE)
            total = float(getattr(table.total, figure)) * unit
            axes.scatter(total, row, s=45, marker="D", color=_DARK, zorder=3)
        if line is not None:
            axes.axvline(line, color=_MIDDLE, linewidth=1, linestyle=":")
        names: Any = [_plain(name) for name in comparisons] if number == 1 else []
        axes.set_yticks(range(len(comparisons)) if names else [], names)
        axes.set_ylim(len(comparisons) - 0.5, -0.5)
        axes.set_xlabel(title)
    picture.supxlabel("diamond: all leaves together; bar: one leaf", fontsize="small")
    return picture
