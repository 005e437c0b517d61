"""A recipe: every choice that decides the codes of a weight, as one frozen value.

Equal recipes share one compiled program. `recipe.replace(...)` changes one thing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from daq_jax.errors import DaqError, check_takes
from daq_jax.formats import Format, fp8_e4m3fn
from daq_jax.metrics import cosine
from daq_jax.roundings.nearest import Nearest
from daq_jax.scales import AnyScale
from daq_jax.searches.candidates import AbsMax
from daq_jax.searches.trials import Trials
from daq_jax.tiles import Tiles
from daq_jax.tilings import Block, Tiling


class UnnamedPartError(DaqError, TypeError):
    """A part of a recipe was passed without its name."""


# What the parts that may be plain functions are called with.
_CALLED = {"metric": ("d", "q"), "search": ("trials",), "rounding": ("tiles", "scale"), "scales": ("scale",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a weight is quantized: frozen, hashable, and every part may be a value of one's own.

    Attributes:
        format: number format of the codes; see `Format`.
        tiling: which elements share a scale; see `Tiling`.
        metric: what the search maximizes, `(d, q) -> score per tile`; see `Metric`.
        search: which scales are tried; see `Search`.
        rounding: which code stands for an element; see `Rounding`.
        scales: which scales may be stored; see `Scales`.

    Raises:
        DaqError: naming the part that cannot be used, or that is not hashable.

    >>> Recipe(tiling=Block(64, 64)).replace(search=AbsMax()).tiling
    Block(r=64, c=64)
    """

    format: Format = fp8_e4m3fn
    tiling: Tiling = Block(128, 128)
    metric: Callable[[Array, Array], Array] = cosine
    search: Callable[[Trials], Array] = AbsMax()
    rounding: Callable[[Tiles, Array], Array] = Nearest()
    scales: Callable[[Array], Array] = AnyScale()

    def __new__(cls, *unnamed: Any, **parts: Any) -> "Recipe":
        """Refuses parts without a name, which all look alike."""
        if unnamed:
            raise UnnamedPartError(
                f"Recipe: parts go by name, such as Recipe(format=daq.int8); got {unnamed[0]!r} without one. "
                "To change one thing of a recipe: recipe.replace(format=daq.int8)."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for part, word in (("format", "round"), ("tiling", "tile")):
            value = getattr(self, part)
            if isinstance(value, type) or not hasattr(value, word):
                raise DaqError(f"Recipe: `{part}` has no `{word}` method; got {value!r}.")
        for part, arguments in _CALLED.items():
            value = getattr(self, part)
            if isinstance(value, type) or not callable(value):
                hint = f"; did you mean {value.__name__}()?" if isinstance(value, type) else "."
                raise DaqError(f"Recipe: `{part}` must be a callable value; got {value!r}{hint}")
            check_takes(f"Recipe: `{part}`", value, *arguments)
        try:
            hash(self)
        except TypeError as error:
            raise DaqError(
                f"Recipe: every part must be hashable ({error}); use frozen dataclasses."
            ) from error

    def __repr__(self) -> str:
        """The parts that are not those of `Recipe()`; the whole as Python code where its parts are."""
        parts = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        own = [f"{field.name}={value!r}" for field, value in parts if value != field.default]
        return f"Recipe({', '.join(own)})"

    def replace(self, **parts: Any) -> "Recipe":
        """This recipe with other parts.

        Raises:
            DaqError: as `Recipe` does, and for a name that is no part.
        """
        known = [field.name for field in dataclasses.fields(self)]
        strange = [name for name in parts if name not in known]
        if strange:
            raise DaqError(f"Recipe has no part {strange[0]!r}; its parts are {', '.join(known)}.")
        return dataclasses.replace(self, **parts)


def check_recipe(value: Any) -> None:
    """Raises DaqError unless `value` is a Recipe, with the form that was probably meant."""
    if isinstance(value, Recipe):
        return
    if isinstance(value, str):
        meant = f"daq.recipes.{value.replace('-', '_')}, if that is one of daq.recipes.RECIPES"
    elif isinstance(value, Mapping):
        meant = f"daq.Recipe({', '.join(f'{key}=...' for key in value)})"
    elif hasattr(value, "encode") and hasattr(value, "decode"):  # a format
        meant = f"daq.Recipe(format=daq.{value.name})"
    else:
        meant = "daq.recipes.default"
    raise DaqError(f"recipe: got {value!r}, needed a Recipe, such as {meant}.")
