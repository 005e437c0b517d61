"""Does quantization bring back what a tune removed? A passage unlearned from native FP8 and MXFP4 bases.

    python -m benchmarks unlearning

The model, the texts and the unlearning are those of `examples/unlearning.py`, here at four learning rates.
Takes about five minutes on two CPU cores.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from daq_jax.demo.model import ModelSize
from daq_jax.demo.report import kept
from daq_jax.demo.study import GRIDS, Study
from daq_jax.demo.unlearning import RECIPES, STUDY, Unlearned, judge, learn_lesson, load_lesson, unlearn

RATES = (2e-5, 5e-5, 1e-4, 2e-4)
QUICK = {"AbsMax": RECIPES["AbsMax"]}
TINY = Study(ModelSize(1, 16, 2, 8), batch=4, base_steps=20, tune_steps=10, chunk=10, held_out=513)
HEADS = {
    "recipe": "name",
    "loss on the passage": "second_loss",
    "loss on the rest": "first_loss",
    "KL from the tuned model": "divergence",
    "projection": "projection",
    "removal kept": "kept",
    "bytes recited": "recited",
}
FORMS = {"divergence": ".1e", "kept": ".0%", "name": "", "recited": "d"}


def rows_of(found: Unlearned, rate: float) -> list[dict[str, Any]]:
    """A row for the base, the tuned model and each recipe."""
    result = found.result
    about = {"grid": result.grid, "rate": rate, "change": result.relative_change}
    return [
        about
        | dataclasses.asdict(row)
        | {
            "kept": kept(result, row),
            "recited": found.recited[row.name],
            "written": found.written[row.name][:60].decode("latin1"),
        }
        for row in (result.base, result.tuned, *result.recipes)
    ]


def markdown(report: dict[str, Any]) -> str:
    """A table for each grid and size of change."""
    parts = [
        "# What quantization brings back of an unlearned passage",
        f"{common.provenance(report)}.",
        "Losses and KL are in nats per byte; KL is on the passage. Removal kept: the share of the rise of "
        "the loss on the passage. Bytes recited: the model is given the first "
        f"{report['prompt']} bytes of the passage and writes the likeliest byte each time; how many of the "
        f"other {report['asked']} it gets right before its first error.",
    ]
    for grid, change in dict.fromkeys((row["grid"], row["change"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["grid"], row["change"]) == (grid, change)]
        lines = (
            ["" if row[k] is None else format(row[k], FORMS.get(k, ".3f")) for k in HEADS.values()]
            for row in rows
        )
        parts += [f"## {grid}: a change of {change:.2%}", common.table(HEADS, lines)]
    return "\n\n".join(parts) + "\n"


def main(
    *, rates: tuple[float, ...] = RATES, seed: int = 0, out: Path | None = None, quick: bool = False
) -> None:
    """Writes `unlearning.json` and `unlearning.md`.

    Args:
        rates: learning rates of the unlearning.
        seed: of the first weights and of the batches.
        out: folder for the results; None for `benchmarks/results`.
        quick: a tiny model, one rate and AbsMax alone, to see that it runs.
    """
    path = common.results(out, quick) / "unlearning.json"
    study, rates, recipes = (TINY, rates[:1], QUICK) if quick else (STUDY, rates, RECIPES)
    lesson = load_lesson(held_out=study.held_out)
    learn_key, unlearn_key = jax.random.split(jax.random.key(seed))

    def tell(task: str, done: int, total: int) -> None:
        print(f"{task}: {done}/{total}", flush=True)

    params = learn_lesson(lesson, study, learn_key, tell)
    prompt = study.model.context
    asked = len(lesson.passage.held_out) - prompt
    report = common.environment() | {"seed": seed, "prompt": prompt, "asked": asked, "rows": []}
    for rate in rates:
        for name, grid in GRIDS.items():
            pair = unlearn(params, grid, lesson, study, rate, unlearn_key, tell)
            report["rows"] += rows_of(judge(name, pair, lesson, study, tell, recipes), rate)
            report["rows"].sort(key=lambda row: list(GRIDS).index(row["grid"]))
            common.write(path, report, markdown(report))
    print(markdown(report))


COMMANDS = {"unlearning": main}
