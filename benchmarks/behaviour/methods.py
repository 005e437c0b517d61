"""What the behaviour study compares: one table of recipes and baselines. To add a row, edit `METHODS`."""

import dataclasses
from typing import Any, NamedTuple

import daq_jax as daq
from benchmarks.behaviour.baselines import Baseline, awq, smoothquant
from daq_jax.formats import Format
from daq_jax.metrics import Metric, neg_bias
from daq_jax.roundings.rounding import Rounding
from daq_jax.tilings import Tiling


class Method(NamedTuple):
    """A row of the table, and how the plots draw it."""

    means: daq.Recipe | daq.DensityRecipe | Baseline
    colour: str
    marker: str


# Okabe and Ito's colours, which colour-blind readers can tell apart: one for each family of methods.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip


def _with(rounding: Rounding, **parts: Any) -> daq.Recipe:
    return dataclasses.replace(daq.recipes.absmax, rounding=rounding, **parts)


def _of_the_change(metric: Metric) -> daq.DensityRecipe:
    """Both stages with a metric of the change in place of the output's loss; needs no text."""
    return daq.DensityRecipe(metric=metric, adjust=daq.SignSteps(epochs=2, turns=50), sweeps=0)


METHODS: dict[str, Method] = {
    "absmax": Method(daq.recipes.absmax, BLACK, "o"),
    "mse": Method(daq.recipes.mse, ORANGE, "v"),
    "paper_sign": Method(daq.recipes.paper_sign, RED, "s"),
    "paper_cosine": Method(daq.recipes.paper_cosine, RED, "D"),
    "released_sign": Method(daq.recipes.released_sign, PINK, "s"),
    "released_cosine": Method(daq.recipes.released_cosine, PINK, "D"),
    "smoothquant": Method(smoothquant, GREY, "<"),
    "awq": Method(awq, GREY, ">"),
    "stochastic": Method(_with(daq.Stochastic(seed=0)), PINK, "x"),
    "gain_row": Method(_with(daq.UnbiasedGain(per="row")), GREEN, "^"),
    "gain_tile": Method(_with(daq.UnbiasedGain(per="tile")), GREEN, "s"),
    "gain_column": Method(_with(daq.UnbiasedGain(per="column")), GREEN, "v"),
    "subspace_64": Method(_with(daq.UnbiasedSubspace(rank=64)), SKY, ">"),
    "subspace_128": Method(_with(daq.UnbiasedSubspace(rank=128)), SKY, "*"),
    "feedback": Method(_with(daq.UnbiasedFeedback()), BLUE, "P"),
    "feedback_power_of_two": Method(_with(daq.UnbiasedFeedback(), scales=daq.PowerOfTwo()), BLUE, "v"),
    "default": Method(daq.recipes.default, BLUE, "*"),
    "density": Method(daq.DensityRecipe(loss="row"), ORANGE, "P"),
    "density_cosine": Method(_of_the_change(daq.cosine), ORANGE, "D"),
    "density_bias": Method(_of_the_change(neg_bias), ORANGE, "o"),
}

# Format and tiling of every method in a run; the FP8-native base of the study lies on the same grid.
LAYOUTS: dict[str, tuple[Format, Tiling]] = {
    "fp8-block": (daq.fp8_e4m3fn, daq.Block(128, 128)),
    "fp8-channel": (daq.fp8_e4m3fn, daq.Channel()),
    "int8-channel": (daq.int8, daq.Channel()),
    "nf4-group": (daq.nf4, daq.Group(128)),
}


def methods_for(layout: str) -> list[str]:
    """Names of the methods that can be had in a layout: density-aware ones are for 4 bits."""
    four_bits = layout == "nf4-group"
    return [name for name, m in METHODS.items() if four_bits or not isinstance(m.means, daq.DensityRecipe)]


def in_layout(recipe: daq.Recipe, layout: str) -> daq.Recipe:
    """The recipe with the format and the tiling of a layout."""
    number, tiling = LAYOUTS[layout]
    return dataclasses.replace(recipe, format=number, tiling=tiling)
