"""The ready recipes, by name.

`default` is what did best in the behaviour study (`benchmarks/results/behaviour/gpu_fp8-block.md`), at every
size of change and on both kinds of base. Its KL from the tuned model was 0.18 to 0.61 of the format's own
noise on an FP8-native base, where AbsMax had 9 to 518 and `paper_cosine` 14 to 258 times that noise, and
0.57 to 0.61 on a bf16 base, where AbsMax is that noise; with both weights stored in bfloat16, 0.30 to 0.61
and 0.57 to 0.71 (`gpu_fp8-block_bf16-stored.md` beside it).
"""

import difflib
from typing import TYPE_CHECKING, Any

from daq_jax.metrics import SignRate, cosine, neg_mse
from daq_jax.recipe import Recipe
from daq_jax.roundings.dithered import DitheredFeedback
from daq_jax.searches.base_scale import BaseScale
from daq_jax.searches.candidates import CoarseToFine, Released

if TYPE_CHECKING:  # what `__getattr__` gives, for editors and type checkers
    from daq_jax.density.recipe import (  # noqa: F401
        DENSITY_RECIPES,
        density,
        density_paper,
        density_released,
    )

_PAPER = CoarseToFine(0.8, 1.5, 5, 10)

absmax = Recipe()
mse = Recipe(metric=neg_mse, search=_PAPER)
paper_sign = Recipe(metric=SignRate(), search=_PAPER)
paper_cosine = Recipe(metric=cosine, search=_PAPER)
released_sign = Recipe(metric=SignRate(), search=Released())
released_cosine = Recipe(metric=cosine, search=Released())
default = Recipe(search=BaseScale(off_grid=1.19), rounding=DitheredFeedback())

RECIPES: dict[str, Recipe] = {
    "default": default,
    "absmax": absmax,
    "mse": mse,
    "paper_sign": paper_sign,
    "paper_cosine": paper_cosine,
    "released_sign": released_sign,
    "released_cosine": released_cosine,
}

# Recipes of the density wing, which is loaded when one of them is first asked for.
_OF_DENSITY = ("density", "density_paper", "density_released")


def __getattr__(name: str) -> Any:
    if name in (*_OF_DENSITY, "DENSITY_RECIPES"):
        from daq_jax.density import recipe

        return getattr(recipe, name)
    known = [*RECIPES, *_OF_DENSITY]
    close = difflib.get_close_matches(name, known)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise AttributeError(f"there is no recipe {name!r}.{hint} There are {', '.join(known)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_DENSITY, "DENSITY_RECIPES"})
