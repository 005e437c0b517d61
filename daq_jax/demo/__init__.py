"""The main job on an embedded example: train, tune, quantize by each recipe, and see what the tune kept.

Nothing is downloaded. A byte-level Flax model learns Lincoln's messages to Congress, is rounded to FP8 as a
model that ships in FP8 is, and is tuned on Macbeth: a real base and a real tune, made in about two minutes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from daq_jax.demo.report import progress_on, sentence_of, table_of
from daq_jax.demo.study import RECIPES, Study, make_pair, measure
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
        recipes: by name; the closing sentence compares the first with the last.

    Returns:
        What JSON can hold: `seed`, `study`, `first` and `second` (names of the texts), `relative_change`,
        the rows `base`, `tuned` and the list `recipes` (see `daq_jax.demo.study.Row`), and `sentence`.
    """
    if json:
        console = Console(quiet=True)
    first, second = (load_text(name, held_out=study.held_out) for name in ("lincoln", "macbeth"))
    with progress_on(console) as tell:
        pair = make_pair(study, first, second, jax.random.key(seed), tell)
        result = measure(recipes, pair, study, first, second, tell)
    sentence = sentence_of(result)
    console.print(table_of(result))
    console.print(sentence, highlight=False)
    found = dataclasses.asdict(result) | {"recipes": [dataclasses.asdict(row) for row in result.recipes]}
    return {"seed": seed, "study": dataclasses.asdict(study)} | found | {"sentence": sentence}
