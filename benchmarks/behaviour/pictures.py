"""Pictures of a behaviour study: the KL divergence by size of change, and style kept. Needs matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from benchmarks.behaviour.methods import METHODS
from benchmarks.behaviour.report import Row, in_order, mean, select, unique


def panels(rows: list[Row], title: str, draw: Callable[[Any, list[Row]], None]) -> Any:
    """One panel for each kind of base, with one legend on the right."""
    kinds = unique(rows, "base_kind")
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(3 + 4.2 * len(kinds), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = select(rows, base_kind=kind)
        draw(axis, own)
        axis.set_title(own[0]["title"])
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def looks(name: str) -> dict[str, Any]:
    method = METHODS[name]
    return {"color": method.colour, "marker": method.marker, "label": name, "markersize": 6}


def draw_divergence(axis: Any, rows: list[Row]) -> None:
    for name in in_order(rows):
        own = select(rows, recipe=name)
        groups = [select(own, rate=rate) for rate in unique(own, "rate")]
        x, y = ([mean(group, key) for group in groups] for key in ("change", "kl"))
        axis.plot(x, y, linewidth=1.2, alpha=0.9, **looks(name))
        for group, place in zip(groups, x, strict=True):  # the spread over seeds
            values = [row["kl"] for row in group]
            axis.plot([place] * 2, [min(values), max(values)], color=METHODS[name].colour, linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="|tuned - base| / |base|")
    axis.set_xticks([0.003, 0.01, 0.03, 0.1], ["0.3 %", "1 %", "3 %", "10 %"])
    axis.xaxis.set_minor_formatter(NullFormatter())
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel("KL from the tuned model, nats per byte")


def draw_style(axis: Any, rows: list[Row]) -> None:
    for name in in_order(rows):
        own = select(rows, recipe=name)
        groups = [select(own, rate=rate) for rate in unique(own, "rate")]
        x, y = ([mean(group, key) for group in groups] for key in ("general_rise", "style_kept"))
        axis.plot(x, y, linestyle="none", alpha=0.8, **looks(name))
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="loss on the general text above the tuned model's, nats per byte")
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel("style kept: share of tuning's gain")


def draw_pictures(rows: list[Row], out: Path, stem: str) -> None:
    """Writes `<stem>_kl.png` and `<stem>_style.png` to `out`."""
    for word, title, draw in (
        ("kl", "How far quantization moves the tuned model", draw_divergence),
        ("style", "Style kept against general ability: one point for each size of change", draw_style),
    ):
        figure = panels(rows, title, draw)
        figure.savefig(out / f"{stem}_{word}.png", dpi=160)
        plt.close(figure)
