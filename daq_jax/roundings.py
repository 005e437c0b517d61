"""Which code stands for each element, once its tile's scale is chosen.

A rounding takes the cut weights (`Tiles`) and one scale per tile, and returns the value of each element's
code, float32, in code units, in the shape of the cut weights. The search scores what it returns.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

from daq_jax.arithmetic import divide
from daq_jax.tiles import Tiles

Rounding = Callable[[Tiles, Array], Array]  # (tiles, scale per tile) -> value of each code


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The code nearest to the tuned weight."""

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """Code values; see the module's docstring."""
        return tiles.format.round(divide(tiles.tuned, scale))
