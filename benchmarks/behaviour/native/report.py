"""Tables of the study of native bases, one for each base, and what the default has to show."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.behaviour.native.layouts import BF16
from benchmarks.behaviour.native.methods import ALSO_CALLED, METHODS, OTHERS

Row = dict[str, Any]
AT_BASE = "absmax at base scale"
LEAST_CHANGE = 0.003  # of a tune that is held against the floor


class Ratios(NamedTuple):
    """The default against other columns, of one pair and one seed; None where a column is missing."""

    others: float | None  # over the least of `OTHERS`
    at_base: float | None  # over AbsMax at the base's scale
    floor: float | None  # over AbsMax in the same format on the bf16 base, tuned at the same rate


# What the default is to show: name, column of `Ratios`, limit. Which pairs it is asked of is in `_asked`.
LIMITS = {
    "no more than 1.1 x the least of the others": ("others", 1.1),
    "no more than 1.3 x AbsMax at the base's scale": ("at_base", 1.3),
    "native base, tune of 0.3 % and more: at most 0.5 x the floor": ("floor", 0.5),
    "bf16 base: at most 0.60 x the floor": ("floor", 0.6),
}


def _asked(limit: str, row: Row) -> bool:
    """Whether a limit is asked of a cell."""
    if limit.startswith("native"):
        return row["base_kind"] != BF16 and row["what"] == "tune" and row["change"] >= LEAST_CHANGE
    if limit.startswith("bf16"):
        return row["base_kind"] == BF16 and row["what"] == "tune" and row["change"] >= LEAST_CHANGE
    return True


class Study:
    """All rows of a size, by cell."""

    def __init__(self, files: Sequence[dict[str, Any]]) -> None:
        self.rows = [row | {"seed": file["seed"]} for file in files for row in file["rows"]]
        self.kl = {self._key(row, row["method"]): row["kl"] for row in self.rows}

    @staticmethod
    def _key(row: Row, method: str, kind: str | None = None) -> tuple:
        pair = (row[k] for k in ("seed", "what", "rate", "stored", "layout"))
        return (kind or row["base_kind"], *pair, method)

    def ratios(self, row: Row) -> Ratios:
        """Of a row of the default."""

        def over(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return row["kl"] / min(known) if known and min(known) > 0 else None

        others = OTHERS if row["base_kind"] != BF16 else (*OTHERS, "absmax")
        return Ratios(
            over(self.kl.get(self._key(row, name)) for name in others),
            over([self.kl.get(self._key(row, AT_BASE))]),
            over([self.kl.get(self._key(row, "absmax", BF16))]) if row["what"] != "noise" else None,
        )

    def pairs(self, kind: str) -> list[list[Row]]:
        """The rows of each pair and grid of a base, all seeds, by kind of change and size."""
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            if row["base_kind"] == kind and row["what"] != "zero":
                key = tuple(row[k] for k in ("layout", "what", "stored", "rate"))
                groups.setdefault(key, []).append(row)
        order = ("tune", "lora", "noise")
        return [
            groups[k] for k in sorted(groups, key=lambda k: (k[0], order.index(k[1]), k[2] == "bf16", k[3]))
        ]


def _mean(values: Sequence[float | None], pattern: str) -> str:
    """Mean over seeds, and the worst of several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    worst = f" ({pattern.format(max(known))})" if len(known) > 1 and pattern != "{:.1e}" else ""
    return pattern.format(statistics.fmean(known)) + worst


def _cells(study: Study, rows: list[Row], methods: Sequence[str]) -> list[str]:
    """The line of a table."""
    first = rows[0]
    what = {"tune": "tune", "lora": "LoRA tune", "noise": "random noise"}[first["what"]]
    stored = ", stored in bfloat16" if first["stored"] == "bf16" else ""
    change = f"{statistics.fmean(r['change'] for r in rows):.2g}"
    grid = [first["layout"]] if first["base_kind"] == BF16 else []
    means = {
        m: statistics.fmean(found) for m in methods if (found := [r["kl"] for r in rows if r["method"] == m])
    }
    least = min(means.values())
    shown = {m: f"**{kl:.1e}**" if kl <= 1.1 * least else f"{kl:.1e}" for m, kl in means.items()}
    kept = {m: statistics.fmean(r["projection"] for r in rows if r["method"] == m) for m in means}
    ratios = [study.ratios(row) for row in rows if row["method"] == "default"]
    return [
        *grid,
        f"{what} {float(change):.2%}{stored}",
        *(f"{shown[m]} ({kept[m]:.2f})" if m in shown else "-" for m in methods),
        *(_mean([getattr(r, name) for r in ratios], "{:.2f}") for name in Ratios._fields),
    ]


def table(study: Study, kind: str) -> str:
    """KL from the tuned model and projection by change and method, and the ratios of the default."""
    groups = study.pairs(kind)
    methods = [m for m in METHODS if any(row["method"] == m for rows in groups for row in rows)]
    heads = [*(["grid"] if kind == BF16 else []), "change", *methods]
    heads += ["default / least of others", "/ AbsMax at base scale", "/ floor"]
    return common.table(heads, (_cells(study, rows, methods) for rows in groups))


def shortfalls(study: Study) -> dict[str, tuple[int, list[str]]]:
    """By limit: of how many cells it was asked, and the cells that miss it by the mean ratio over seeds."""
    found = {}
    for limit, (column, most) in LIMITS.items():
        asked, missed = 0, []
        for kind in dict.fromkeys(row["base_kind"] for row in study.rows):
            for rows in study.pairs(kind):
                own = [row for row in rows if row["method"] == "default" and _asked(limit, row)]
                known = [x for row in own if (x := getattr(study.ratios(row), column)) is not None]
                if not known:
                    continue
                asked += 1
                if (mean := statistics.fmean(known)) > most:
                    row = own[0]
                    stored = ", bfloat16" if row["stored"] == "bf16" else ""
                    grid = f" on {row['layout']}" if kind == BF16 else ""
                    missed.append(f"{kind}{grid}, {row['what']} {row['change']:.2%}{stored}: {mean:.2f}")
        found[limit] = asked, missed
    return found


def zero_change(study: Study) -> str:
    """Whether the base comes back bit for bit where nothing changed."""
    rows = [row for row in study.rows if row["what"] == "zero" and row["method"] == "default"]
    if not rows:
        return "Zero change: not run."
    wrong = [row for row in rows if row["moved"] or row["scales_changed"]]
    if not wrong:
        return f"Zero change: the base's own codes and scales in all {len(rows)} cells (bases and seeds)."
    named = (f"{r['base_kind']} ({r['moved']:.2%} of weights, {r['scales_changed']} scales)" for r in wrong)
    return f"Zero change: moved in {', '.join(named)}."


def provenance(files: Sequence[dict[str, Any]]) -> str:
    """Devices, dates and commands of all runs."""
    runs = [run for file in files for run in file["runs"] if "seconds" in run]
    lines = dict.fromkeys(
        f"- seed {f['seed']}: {common.provenance(r)}" for f in files for r in f["runs"] if r in runs
    )
    return "\n".join(lines)


_LEGEND = (
    "KL from the tuned model, nats per byte of held-out tuning text, mean over seeds, and in brackets the "
    "share of the change that is kept (projection); bold within 1.1 x the least of the line. Change: "
    "|tuned - base| / |base| over the quantized matrices. The last three columns are ratios of the default, "
    "mean over seeds and in brackets the worst seed: to the least of {others} (on bf16: and absmax); to "
    "AbsMax at the base's scale; to the floor, which is AbsMax in the same format on the bf16 base, changed "
    "the same way."
)


def markdown(files: Sequence[dict[str, Any]]) -> str:
    """The whole report."""
    study, size = Study(files), files[0]["size"]
    parts = [
        f"# What each method keeps of a tune of a native base: size {size}",
        provenance(files),
        _LEGEND.format(others=", ".join(OTHERS)),
        "\n".join(f"- **{name}**: {words}." for name, words in ALSO_CALLED.items()),
        "## What the default is to show",
        zero_change(study),
    ]
    for limit, (asked, missed) in shortfalls(study).items():
        named = "".join(f"\n  - {cell}" for cell in missed)
        parts.append(f"- {limit}: {asked - len(missed)} of {asked} cells.{named}")
    for kind in dict.fromkeys(row["base_kind"] for row in study.rows):
        parts.append(f"## Base: {kind}\n\n{table(study, kind)}")
    return "\n\n".join(parts) + "\n"


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Writes the report on the files of one size, and prints it."""
    text = markdown([json.loads(path.read_text()) for path in paths])
    out.write_text(text)
    print(text)
