"""Which code stands for each element, once its tile's scale is chosen.

A rounding takes the cut weights (`Tiles`) and one scale per tile, and returns the value of each element's
code, float32, in code units, in the shape of the cut weights. The search scores what it returns.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

from daq_jax.arithmetic import divide, multiply
from daq_jax.formats import Format
from daq_jax.tilings import TileView


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A pair of weights, cut into tiles.

    Attributes:
        base: float32, cut by `view`. Weights before tuning.
        tuned: float32, cut by `view`. Weights after.
        view: how they were cut; `view.tile_axes` are the axes of a tile's elements.
        format: the number format of the codes.
        stream: uint32, a hash of the weight's path, for roundings that draw.
    """

    base: Array
    tuned: Array
    view: TileView
    format: Format
    stream: Array

    @property
    def change(self) -> Array:
        """The true change d."""
        return self.tuned - self.base

    def kept(self, values: Array, scale: Array) -> Array:
        """The kept change q of codes with these values."""
        return multiply(values, scale) - self.base


Rounding = Callable[[Tiles, Array], Array]  # (tiles, scale per tile) -> value of each code


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The code nearest to the tuned weight."""

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """Code values; see the module's docstring."""
        return tiles.format.round(divide(tiles.tuned, scale))
