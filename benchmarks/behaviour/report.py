"""Tables from the JSON files of a behaviour study, one file for each seed."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.behaviour.methods import METHODS

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
    names = in_order(rows)
    lines = ([name, *(cell(select(rows, rate=rate, recipe=name)) for rate in rates)] for name in names)
    return common.table(["recipe, by change", *sizes], lines)


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


def write_report(paths: Sequence[Path], out: Path, pictures: bool = False) -> None:
    """Writes `<size>_<layout>.md` to `out`, and prints it; with `pictures`, draws two pictures too."""
    files, rows = load(paths)
    stem = f"{files[0]['size']}_{files[0]['layout']}{suffix(files[0].get('stored', 'f32'))}"
    text = markdown(files, rows)
    (out / f"{stem}.md").write_text(text)
    print(text)
    if pictures:
        from benchmarks.behaviour.pictures import draw_pictures  # needs matplotlib

        draw_pictures(rows, out, stem)
