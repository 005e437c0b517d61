"""A study: make real pairs of weights, quantize them by several recipes, measure what each one keeps.

The base is first rounded to a grid, as a model that ships in FP8 or in MXFP4 is: there AbsMax rounds a small
change straight back to the base. Figures come back as plain numbers; `report.py` shows them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import daq_jax as daq
from daq_jax.demo.model import (
    ModelSize,
    Params,
    learning_rates,
    make_params,
    mean_divergence,
    mean_loss,
    start_training,
    to_dtype,
    train,
)
from daq_jax.demo.texts import Text
from daq_jax.errors import DaqError

Tell = Callable[[str, int, int], None]  # (what is being done, how much of it is done, how much there is)

# The grids of the bases, by name, as the parts of a recipe that say them.
GRIDS: Mapping[str, daq.Recipe] = {
    "FP8": daq.recipes.absmax,
    "MXFP4": daq.Recipe(format=daq.fp4_e2m1, tiling=daq.Group(32), scales=daq.PowerOfTwo()),
}

# The closing sentences compare the first with the last.
RECIPES: Mapping[str, daq.Recipe] = {
    "absmax": daq.recipes.absmax,
    "mse": daq.recipes.mse,
    "paper_sign": daq.recipes.paper_sign,
    "paper_cosine": daq.recipes.paper_cosine,
    "unbiased gain": daq.Recipe(rounding=daq.UnbiasedGain()),
    "default": daq.recipes.default,
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes of a study.

    The tuning rate is low on purpose: it moves the weights by about one percent, less than half a step of
    FP8, which is where recipes differ.
    """

    model: ModelSize = ModelSize()
    batch: int = 8  # sequences in a step
    base_steps: int = 500
    base_rate: float = 2e-3  # the highest learning rate
    tune_steps: int = 150
    tune_rate: float = 2e-5
    chunk: int = 50  # steps between two reports of progress
    held_out: int = 8193  # bytes of each text, for judging

    def __post_init__(self) -> None:
        for steps in (self.base_steps, self.tune_steps):
            if min(steps, self.chunk) < 1 or steps % self.chunk:
                raise DaqError(f"step counts must be multiples of `chunk`, to share one program; got {self}.")


class Pair(NamedTuple):
    """Weights before and after tuning, bfloat16."""

    base: Params
    tuned: Params


@dataclasses.dataclass(frozen=True)
class Row:
    """What one set of weights keeps of the tuned model.

    The figures of the change (see `daq_jax.compare`) are None where nothing was quantized, or undefined.
    Losses and divergence are in nats per byte of held-out text.
    """

    name: str
    first_loss: float  # on the text that the base learned
    second_loss: float  # on the text of the tuning
    divergence: float  # KL, on the second text, from the tuned model's distributions to these
    sign_rate: float | None = None
    cosine: float | None = None
    projection: float | None = None
    mse: float | None = None  # weight units squared


@dataclasses.dataclass(frozen=True)
class Result:
    """What a study found on a base."""

    grid: str  # that the base lies on
    first: str  # name of the text that the base learned
    second: str  # name of the text of the tuning
    relative_change: float  # |tuned - base| / |base| over the quantized weights
    base: Row
    tuned: Row
    recipes: tuple[Row, ...]


def on_grid(params: Params, grid: daq.Recipe) -> Params:
    """The weights as a model that ships on a grid has them, dequantized to bfloat16."""
    return to_dtype(daq.dequantize(daq.quantize(params, params, grid)), jnp.bfloat16)


def of_grid(recipe: daq.Recipe, grid: daq.Recipe) -> daq.Recipe:
    """A recipe with the format, the tiles and the scales of a grid."""
    return recipe.replace(format=grid.format, tiling=grid.tiling, scales=grid.scales)


def learn(
    params: Params,
    text: Text,
    steps: int,
    rate: float,
    key: Array,
    study: Study,
    tell: Tell,
    weights: Float[Array, " N"] | None = None,
) -> Params:
    """Trains weights on a text, `study.chunk` steps between two calls of `tell`. Returns them in float32.

    `weights` are those of the bytes of `text.train`; see `daq_jax.demo.model.train`.
    """
    state, data = start_training(params), jnp.asarray(text.train)
    rates = learning_rates(steps, rate, warmup=max(1, steps // 10))
    for done in range(0, steps, study.chunk):
        tell(f"train on {text.name}", done, steps)
        chunk, chunk_key = rates[done : done + study.chunk], jax.random.fold_in(key, done)
        state, losses = train(
            state, data, chunk, chunk_key, size=study.model, batch=study.batch, weights=weights
        )
        losses.block_until_ready()  # else `tell` would run ahead of the work
    tell(f"train on {text.name}", steps, steps)
    return state.params


def make_pairs(
    study: Study, grids: Mapping[str, daq.Recipe], first: Text, second: Text, key: Array, tell: Tell
) -> dict[str, Pair]:
    """Trains a base on the first text, rounds it to each grid, and tunes each of these on the second."""
    length = max(len(first.train), len(second.train))
    # Repeat the shorter text, so that both have one shape and share one compiled program.
    first, second = (text._replace(train=np.resize(text.train, length)) for text in (first, second))
    params_key, base_key, tune_key = jax.random.split(key, 3)
    tell("make the first weights", 0, 1)
    params = jax.block_until_ready(make_params(study.model, params_key))
    tell("make the first weights", 1, 1)
    params = learn(params, first, study.base_steps, study.base_rate, base_key, study, tell)
    pairs = {}
    for name, grid in grids.items():
        base, text = on_grid(params, grid), second._replace(name=f"{second.name} from {name}")
        tuned = learn(base, text, study.tune_steps, study.tune_rate, tune_key, study, tell)
        pairs[name] = Pair(base, to_dtype(tuned, jnp.bfloat16))
    return pairs


def relative_change(pair: Pair, quantized: Params) -> float:
    """`|tuned - base| / |base|` over the weights that were quantized."""
    leaves, structure = jax.tree.flatten(quantized, is_leaf=lambda leaf: isinstance(leaf, daq.QTensor))
    change = size = 0.0
    for leaf, *weights in zip(leaves, *map(structure.flatten_up_to, pair), strict=True):
        if isinstance(leaf, daq.QTensor):
            base, tuned = (np.asarray(w, np.float64) for w in weights)
            change, size = change + np.sum((tuned - base) ** 2), size + np.sum(base**2)
    return math.sqrt(change / size)


def measure(
    recipes: Mapping[str, daq.Recipe],
    grid: str,
    pair: Pair,
    study: Study,
    first: Text,
    second: Text,
    tell: Tell,
) -> Result:
    """Quantizes a pair to the grid of its base by each recipe, and measures what each one keeps."""
    first_text, second_text = jnp.asarray(first.held_out), jnp.asarray(second.held_out)
    reference = to_dtype(pair.tuned, jnp.float32)

    def row(name: str, params: Params, **change: float | None) -> Row:
        params = to_dtype(params, jnp.float32)  # the values as stored, in the dtype a CPU is fast in
        return Row(
            name,
            float(mean_loss(params, first_text, size=study.model)),
            float(mean_loss(params, second_text, size=study.model)),
            float(mean_divergence(reference, params, second_text, size=study.model)),
            **change,
        )

    rows: list[Row] = []
    for done, (name, recipe) in enumerate(recipes.items()):
        tell(f"quantize to {grid} and judge", done, len(recipes))
        quantized = daq.quantize(*pair, of_grid(recipe, GRIDS[grid]))
        figures = daq.compare(*pair, quantized).total.to_dict()
        change = {word: figures[word] for word in ("sign_rate", "cosine", "projection", "mse")}
        rows.append(row(name, daq.dequantize(quantized, dtype=jnp.float32), **change))
    tell(f"quantize to {grid} and judge", len(recipes), len(recipes))
    return Result(
        grid,
        first.name,
        second.name,
        relative_change(pair, daq.quantize(*pair, GRIDS[grid])),
        row("base", pair.base),
        row("tuned", pair.tuned),
        tuple(rows),
    )
