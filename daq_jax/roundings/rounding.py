"""What a rounding is: it chooses the code of each element, once the scale of each tile is known."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

from jaxtyping import Array

from daq_jax.tiles import Tiles


class Rounding(abc.ABC):
    """Chooses a code for each element of a weight, given the scale of each tile.

    A plain function `(tiles, scale) -> values` serves as well: a `Recipe` turns it into a rounding with the
    defaults below. Subclasses are frozen, hashable dataclasses; they override what differs.

    Attributes:
        scope: "tile" if a code depends on nothing outside a few neighbouring tiles (see `alignment`), which
            allows a CPU to take the weight in parts and each device of a mesh to take its own shard;
            "matrix" if the rounding must see the whole weight at once.
        draws: whether `tiles.noise` is needed; `draw` makes it.
        multiplies: whether much of its work is products of whole matrices. On a GPU several weights of one
            shape are then quantized as one batch.
        bytes_per_element: working memory, in bytes for each element of a weight, two inputs of 16 bits
            included. Folders larger than memory are planned by it.
        in_lines: whether it reduces over tiles by `Tiles.total` and `Tiles.within` alone, so that a TPU may
            cut a weight into lines of tiles (`daq_jax.tilings.TileView.lines`).
        squares: whether it adds up squares of weights as they are, so that none may be beyond
            `daq_jax.numerics.arithmetic.LARGEST_SQUARED`.
    """

    scope: ClassVar[Literal["tile", "matrix"]] = "matrix"
    draws: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    bytes_per_element: ClassVar[int] = 64
    in_lines: ClassVar[bool] = False
    squares: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code.

        Args:
            tiles: the pair of weights, cut into tiles.
            scale: weight units per code unit of each tile, float32; broadcasts over the tiles.

        Returns:
            Float32 in code units, in the shape of the tiles: values that `tiles.format.round` can return.
        """

    def alignment(self, tiles: Tiles) -> int:
        """For `scope = "tile"`: a weight may be taken apart at multiples of this number of tiles."""
        return 1

    def scored_as(self) -> "Rounding":
        """The rounding whose codes a search scores in place of this one's: itself unless overridden."""
        return self

    def draw(self, shape: tuple[int, ...], stream: Array) -> Array:
        """For `draws = True`: float32 numbers in [0, 1), in the weight's shape.

        Args:
            shape: of the weight.
            stream: uint32, different for each weight of a tree.
        """
        raise NotImplementedError(f"{type(self).__name__} draws no numbers")


@dataclasses.dataclass(frozen=True)
class OfFunction(Rounding):
    """The rounding that a plain function of the signature is."""

    function: Callable[[Tiles, Array], Array]

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        return self.function(tiles, scale)


def as_rounding(value: Callable[[Tiles, Array], Array]) -> Rounding:
    """A rounding, or a plain function as one."""
    return value if isinstance(value, Rounding) else OfFunction(value)
