"""Draws `docs/assets/how_it_works.png`: the dead zone of a grid, unbiased rounding, and what recipes keep.

    python docs/tools/how_it_works.py docs/assets/how_it_works.png

Needs the extra `plot`. The third panel is measured here, on drawn weights.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import daq_jax as daq

BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#888888"


def grid(axes: Axes) -> None:
    """The codes of e4m3 between 12 and 18, and a change that rounds back to its base."""
    codes = [12, 13, 14, 15, 16, 18]
    axes.vlines(codes, -0.25, 0.25, GREY)
    axes.axvspan(13.5, 14.5, color=ORANGE, alpha=0.2, lw=0)
    axes.plot(14, 0, "o", color=GREY, ms=9)
    axes.plot(14.35, 0, "o", color=BLUE, ms=9)
    axes.annotate("", (14.0, 0.3), (14.35, 0.3), arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2})
    axes.text(13.95, -0.45, "base", ha="right", color=GREY)
    axes.text(14.4, -0.45, "tuned", ha="left", color=BLUE)
    axes.text(14.1, 0.55, "rounds back", ha="center", color=ORANGE)
    axes.text(14.0, -0.75, "dead zone", ha="center", color=ORANGE)
    axes.set(
        ylim=(-1, 1), yticks=[], xticks=codes, xlabel="weight / scale", title="Codes of e4m3 near a weight"
    )


def staircase(axes: Axes) -> None:
    """The kept change over the true change of one weight on a code, by rounding."""
    change = np.linspace(-1.5, 1.5, 601)
    axes.plot(change, np.rint(change), color=ORANGE, label="to nearest")
    axes.plot(change, change, color=BLUE, label="unbiased, on average")
    axes.axvspan(-0.5, 0.5, color=ORANGE, alpha=0.2, lw=0)
    axes.set(xlabel="true change, in steps", ylabel="kept change, in steps", title="What is kept of a change")
    axes.legend(frameon=False)


def measured(axes: Axes) -> None:
    """The projection of the kept change, for changes of rank 8 on a base on the grid of FP8 blocks."""
    keys = jax.random.split(jax.random.key(0), 3)
    weight = jax.random.normal(keys[0], (1024, 1024))
    base = daq.quantize(weight, weight, daq.recipes.absmax).dequantize()
    change = jax.random.normal(keys[1], (1024, 8)) @ jax.random.normal(keys[2], (8, 1024))
    change *= jnp.linalg.norm(base) / jnp.linalg.norm(change)
    sizes = (0.001, 0.003, 0.01, 0.03, 0.1)
    for name, colour in (("absmax", ORANGE), ("default", BLUE)):
        kept = []
        for size in sizes:
            tuned = base + size * change
            q = daq.quantize(base, tuned, daq.recipes.RECIPES[name])
            kept.append(float(daq.compare(base, tuned, q).total.projection))
        print(name, [f"{x:.3f}" for x in kept])
        axes.semilogx([100 * s for s in sizes], kept, "o-", color=colour, label=name)
    axes.axhline(1, color=GREY, lw=0.8)
    axes.set(
        xlabel="size of the change, % of the base",
        ylabel="projection",
        title="Measured: share kept",
        ylim=(0, 1.2),
    )
    axes.legend(frameon=False)


def main(path: str) -> None:
    """Draws the three panels into one file."""
    picture = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, draw in zip(picture.subplots(1, 3), (grid, staircase, measured), strict=True):
        draw(axes)
    picture.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
