"""Tables from the JSON file of a density study."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import common

Row = dict[str, Any]


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows that have all these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def cell(row: Row) -> str:
    return f"{row['increase'] * 1e3:+.2f} / {row['kl']:.2e} / {row['output_loss']:.3g}"


def table(rows: list[Row], across: str) -> str:
    """Methods down, the values of one column across."""
    heads = list(dict.fromkeys(row[across] for row in rows))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [select(rows, method=method, **{across: h}) for h in heads]
        lines.append([method, *(cell(c[0]) if c else "-" for c in cells)])
    return common.table(["method", *("per channel" if h is None else h for h in heads)], lines)


def against_peers(rows: list[Row], best: str) -> list[Row]:
    """For each setting, the best peer by each figure, and the reduction of it that `best` reaches."""
    found = []
    settings = dict.fromkeys((r["format"], r["group"], r["tokens"]) for r in rows)
    for fmt, group, tokens in settings:
        own = select(rows, format=fmt, group=group, tokens=tokens)
        peers, ours = select(own, kind="peer"), select(own, method=best)
        if not peers or not ours:
            continue
        entry: Row = {"format": fmt, "group": group, "tokens": tokens}
        for figure in ("increase", "kl"):
            least = min(peers, key=lambda r: r[figure])
            entry[figure] = 1 - ours[0][figure] / least[figure]
            entry[f"{figure}_peer"] = least["method"]
        found.append(entry)
    return found


def summary(found: list[Row]) -> str:
    lines = []
    for f in found:
        cells = [f"{f[x]:+.1%} against {f[f'{x}_peer']}" for x in ("increase", "kl")]
        group = "per channel" if f["group"] is None else f["group"]
        lines.append([f["format"], group, f"{f['tokens']} x 512", *cells])
    means = [f"{statistics.fmean(f[x] for f in found):+.1%}" for x in ("increase", "kl")]
    heads = ["format", "group", "tokens", "perplexity increase", "KL"]
    return common.table(heads, [*lines, ["mean", "", "", *means]])


def layers(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        evaluations = f"{r['released_evaluations']} / {r['our_evaluations']}"
        lines.append([r["layer"], f"{r['released']:.4g}", f"{r['ours']:.4g}", evaluations])
    return common.table(["layer", "released", "ours", "evaluations, released / ours"], lines)


UNITS = {"increase": 1e3, "even": 1e3, "kl": 1e4}


def mean_of(rows: list[Row], figure: str) -> float:
    return statistics.fmean(row[figure] for row in rows) * UNITS[figure]


def over_draws(rows: list[Row], best: str) -> str:
    """Means over models and samples of the calibration text, and by how much `best` is below each."""
    heads = ["format", "method", "runs"]
    for figure in ("perplexity increase", "its even part", "KL"):
        heads += [figure, "reduction"]
    lines = []
    for fmt in dict.fromkeys(row["format"] for row in rows):
        own = select(rows, format=fmt)
        for method in dict.fromkeys(row["method"] for row in own):
            some = select(own, method=method)
            cells = []
            for figure, unit in UNITS.items():
                error = statistics.stdev(r[figure] for r in some) * unit / len(some) ** 0.5
                reduced = "" if method == best else reductions(own, method, best, figure)
                cells += [f"{mean_of(some, figure):.2f} ± {error:.2f}", reduced]
            lines.append([fmt, method, len(some), *cells])
    return common.table(heads, lines)


def reductions(rows: list[Row], method: str, best: str, figure: str) -> str:
    """By how much the mean of `best` is below that of a method: over all models, and for each."""

    def reduced(**models: Any) -> str:
        ours, theirs = (mean_of(select(rows, method=m, **models), figure) for m in (best, method))
        return f"{1 - ours / theirs:+.0%}"

    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    each = f" ({', '.join(reduced(seed=seed) for seed in seeds)})" if len(seeds) > 1 else ""
    return reduced() + each


def markdown(result: dict[str, Any], best: str) -> str:
    """The whole report."""
    rows = result["rows"]
    first = rows[0]
    standard = [r for r in rows if (r["group"], r["tokens"]) == (first["group"], first["tokens"])]
    parts = [
        f"# 4-bit codes and the perplexity of a language model: size {result['size']}",
        f"{common.provenance(result)}, {result['seconds']:.0f} s.",
    ]
    perplexity = ", ".join(f"{x:.4f}" for x in result["perplexities"].values())
    if "layers" not in result:
        parts.append(
            f"Groups of 128, {first['tokens']} x 512 tokens. Increase of the perplexity in thousandths "
            f"over the float model's {perplexity} a byte of held-out text, its even part (the mean of the "
            "increases under the error of the weights and under its negative), and KL divergence from the "
            "float model in 1e-4 nats a byte: mean over models and samples of the calibration text ± its "
            f"standard error. Reduction: of a peer's mean, by {best}; in brackets, for each model.\n\n"
            f"{over_draws(rows, best)}"
        )
        return "\n\n".join(parts) + "\n"
    parts += [
        f"Perplexity of the float model {perplexity} a byte of held-out text. Cells: increase "
        "of the perplexity in thousandths / KL divergence from the float model, nats a byte / squared error "
        "of all layers' outputs on the calibration text. Any small change of the weights moves the "
        "perplexity a little up or down, by chance; the KL divergence has less of that noise. One model.",
        f"## Reduction by {best} against the best peer\n\n{summary(against_peers(rows, best))}",
        f"## Groups of 128, {first['tokens']} x 512 tokens\n\n{table(standard, 'format')}",
    ]
    nf4 = select(rows, format="nf4")
    by_tokens = sorted(select(nf4, group=128), key=lambda r: r["tokens"])
    varied = {r["method"] for r in by_tokens if r["tokens"] != first["tokens"]}
    if varied:
        kept = [r for r in by_tokens if r["method"] in varied]
        parts.append(f"## Tokens of calibration, in 512; nf4, groups of 128\n\n{table(kept, 'tokens')}")
    grouped = {r["method"] for r in nf4 if r["group"] != 128}
    if grouped:
        kept = [r for r in nf4 if r["method"] in grouped and r["tokens"] == first["tokens"]]
        parts.append(f"## Size of group; nf4, {first['tokens']} x 512 tokens\n\n{table(kept, 'group')}")
    parts.append(
        "## Stage 2 against the released program's\n\nLoss of the layers' outputs, nearest codes, fp4_bnb, "
        f"groups of 128, on some outputs of each layer.\n\n{layers(result['layers'])}"
    )
    return "\n\n".join(parts) + "\n"


def write_report(path: Path, best: str) -> None:
    """Writes the table beside a JSON file, and prints it."""
    text = markdown(json.loads(path.read_text()), best)
    path.with_suffix(".md").write_text(text)
    print(text)
