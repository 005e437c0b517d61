"""Tables and plots from the JSON files of a behaviour study, one file for each seed."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from behaviour_recipes import METHODS
from matplotlib.ticker import NullFormatter

Row = dict[str, Any]


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[Row]]:
    """The files, and their rows with three columns more.

    `title`: what to call the base. `ratio`: KL over the floor of the same seed and rate. `general_rise`: loss
    on the general text less that of the tuned model.
    """
    files = [json.loads(path.read_text()) for path in paths]
    kinds = {(file["size"], file["layout"], file.get("stored", "f32")) for file in files}
    if len(kinds) != 1:
        raise SystemExit(f"cannot merge studies of different sizes, layouts or dtypes: {sorted(kinds)}.")
    rows = [row for file in files for row in file["rows"]]
    floor = {
        (row["seed"], row["rate"]): row["kl"]
        for row in rows
        if (row["base_kind"], row["recipe"]) == ("bf16", "absmax")
    }
    native = files[0]["layout"].partition("-")[0].upper()
    key = ("seed", "base_kind", "rate")
    pairs = {tuple(pair[k] for k in key): pair for file in files for pair in file["pairs"]}
    for row in rows:
        tuned = pairs[tuple(row[k] for k in key)]["tuned"]
        row["general_rise"] = row["general_loss"] - tuned["general_loss"]
        row["title"] = "bf16 base" if row["base_kind"] == "bf16" else f"{native}-native base"
        least = floor.get((row["seed"], row["rate"]))
        row["ratio"] = row["kl"] / least if least else None
    return files, rows


def suffix(stored: str) -> str:
    """Of the names of files, for weights that are stored in another dtype than float32."""
    return "" if stored == "f32" else f"_{stored}-stored"


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows that have all these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def unique(rows: list[Row], key: str) -> list[Any]:
    """Values of a column, in the order they come in."""
    return list(dict.fromkeys(row[key] for row in rows))


def in_order(rows: list[Row]) -> list[str]:
    """Recipes of the rows, in the order of the table of methods."""
    return sorted(unique(rows, "recipe"), key=list(METHODS).index)


def mean(rows: list[Row], key: str) -> float | None:
    """Mean over seeds; None where the figure is missing."""
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.fmean(values) if values else None


def show(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def divergence(rows: list[Row]) -> str:
    """Mean KL, its standard deviation over seeds, and the ratio to the floor: mean, and the worst seed's."""
    values = [row["kl"] for row in rows]
    spread = f" ± {statistics.stdev(values):.0e}" if len(values) > 1 else ""
    text = f"{statistics.fmean(values):.1e}{spread}"
    ratios = [row["ratio"] for row in rows]
    if None in ratios:
        return text
    worst = f", {max(ratios):.2f}" if len(ratios) > 1 else ""
    return f"{text} ({statistics.fmean(ratios):.2f}{worst})"


def change_kept(rows: list[Row]) -> str:
    return " / ".join(show(mean(rows, k), "{:.3f}") for k in ("projection", "sign_rate", "cosine"))


def style_kept(rows: list[Row]) -> str:
    return f"{show(mean(rows, 'style_kept'), '{:.1%}')} / {show(mean(rows, 'general_loss'), '{:.3f}')}"


def other(rows: list[Row]) -> str:
    keys = {"general_kl": "{:.1e}", "mse": "{:.1e}", "same_codes": "{:.1%}"}
    return " / ".join(show(mean(rows, key), pattern) for key, pattern in keys.items())


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "KL from the tuned model, mean ± deviation over seeds (over the floor: mean, worst seed)": divergence,
    "Of the change of the weights: projection / sign rate / cosine": change_kept,
    "Style kept / loss on the general text": style_kept,
    "KL on the general text / mse of the weights / codes that equal AbsMax's": other,
}


def table(rows: list[Row], cell: Callable[[list[Row]], str]) -> str:
    """A Markdown table: recipes down, sizes of change across."""
    rates = unique(rows, "rate")
    sizes = [show(mean(select(rows, rate=rate), "change"), "{:.2%}") for rate in rates]
    lines = [f"| recipe, by change | {' | '.join(sizes)} |", "|---" * (len(rates) + 1) + "|"]
    for name in in_order(rows):
        cells = [cell(select(rows, rate=rate, recipe=name)) for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(files: list[dict[str, Any]], rows: list[Row]) -> str:
    """The whole report."""
    first = files[0]
    seeds = ", ".join(map(str, unique(files, "seed")))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    parts = [
        f"# What quantization keeps of a tune: size {first['size']}, {first['layout']}, "
        f"stored as {first.get('stored', 'f32')}",
        f"Seeds {seeds}; {first['date'][:10]}; {first['device']}; {versions}.",
        f"Made by {', '.join(f'`{command}`' for command in unique(files, 'command'))}.",
        "Change: |tuned - base| / |base| over the quantized matrices. KL and losses in nats per byte of "
        "held-out text. Floor: the KL of AbsMax on the bf16 base at the same seed and learning rate, "
        "which is the noise of the format. Style kept: the share of the loss that tuning gained "
        "on its own text. A KL without ± is of one seed.",
    ]
    for kind in unique(rows, "base_kind"):
        parts.append(f"## {select(rows, base_kind=kind)[0]['title']}")
        pairs = [pair for file in files for pair in file["pairs"] if pair["base_kind"] == kind]
        for rate in unique(pairs, "rate"):
            same = select(pairs, rate=rate)
            said = [
                f"{model} {statistics.fmean(p[model]['loss'] for p in same):.3f} / "
                f"{statistics.fmean(p[model]['general_loss'] for p in same):.3f}"
                for model in ("base", "tuned")
            ]
            parts.append(f"Rate {rate:g}, loss on the tuning / general text: {', '.join(said)}.")
        for title, cell in TABLES.items():
            parts.append(f"{title}:\n\n{table(select(rows, base_kind=kind), cell)}")
    return "\n\n".join(parts) + "\n"


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


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Writes `<size>_<layout>.md`, `.._kl.png` and `.._style.png` to `out`, and prints the first."""
    files, rows = load(paths)
    stem = f"{files[0]['size']}_{files[0]['layout']}{suffix(files[0].get('stored', 'f32'))}"
    text = markdown(files, rows)
    (out / f"{stem}.md").write_text(text)
    print(text)
    for word, title, draw in (
        ("kl", "How far quantization moves the tuned model", draw_divergence),
        ("style", "Style kept against general ability: one point for each size of change", draw_style),
    ):
        figure = panels(rows, title, draw)
        figure.savefig(out / f"{stem}_{word}.png", dpi=160)
        plt.close(figure)
