"""The ready recipes, by name.

`default` did best in the study of native bases (`benchmarks/results/behaviour/native_gpu.md`, which lists
where it did not): KL from the tuned model on seven grids and on a bf16 base, 25M parameters, three seeds, two
of them on the bf16 base. It was within 1.1 times the least of five other methods in 175 of 182 cells, and in
27 of 28 of a model of 341M parameters and one with experts (docs/design/envelope.md). Native FP8 and FP4
bases had 0.05 to 0.46 of the format's own noise for tunes of 0.4 to 2.3 %, on a bf16 base 0.46 to 0.61 from
0.4 % up. Where a change has no directions it is nearest rounding at the base's scale.
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
default = Recipe(search=BaseScale(off_grid="by format"), rounding=DitheredFeedback())

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
