"""The main job on an embedded example: train, tune, quantize by each recipe, and see what the tune kept.

Nothing is downloaded. A byte-level Flax model learns Lincoln's messages to Congress, is rounded to FP8 and to
MXFP4 as models that ship in these are, and each is tuned on Macbeth: real bases and real tunes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from daq_jax.demo.report import progress_on, sentence_of, table_of
from daq_jax.demo.study import GRIDS, RECIPES, Study, make_pairs, measure
from daq_jax.demo.texts import load_text
from daq_jax.recipe import Recipe

__all__ = ["FULL_SIZE", "RECIPES", "Study", "run"]

FULL_SIZE = Study()


def run(
    console: Console,
    *,
    seed: int = 0,
    json: bool = False,
    study: Study = FULL_SIZE,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> dict[str, Any]:
    """Runs the demo and prints what it found.

    Args:
        console: where progress, the table and the closing sentence go.
        seed: of the first weights and of the batches. Equal seeds give equal figures on one machine.
        json: print nothing; the caller prints what is returned.
        study: sizes of the model and of its training.
        recipes: by name; the closing sentences compare the first with the last.

    Returns:
        What JSON can hold: `seed`, `study`, and the list `bases`, each with `grid`, `first` and `second`
        (names of the texts), `relative_change`, the rows `base`, `tuned` and the list `recipes` (see
        `daq_jax.demo.study.Row`), and `sentence`.
    """
    if json:
        console = Console(quiet=True)
    first, second = (load_text(name, held_out=study.held_out) for name in ("lincoln", "macbeth"))
    with progress_on(console) as tell:
        pairs = make_pairs(study, GRIDS, first, second, jax.random.key(seed), tell)
        results = [measure(recipes, grid, pairs[grid], study, first, second, tell) for grid in GRIDS]
    console.print(table_of(results))
    bases = []
    for result in results:
        console.print(sentence_of(result), highlight=False)
        rows = [dataclasses.asdict(row) for row in result.recipes]
        bases.append(dataclasses.asdict(result) | {"recipes": rows, "sentence": sentence_of(result)})
    return {"seed": seed, "study": dataclasses.asdict(study), "bases": bases}
