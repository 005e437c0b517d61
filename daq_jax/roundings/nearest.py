"""Which code stands for each element, once its tile's scale is chosen.

A rounding takes the cut weights (`Tiles`) and one scale per tile, and returns the value of each element's
code, float32, in code units, in the shape of the cut weights. The search scores what it returns. Any callable
of that signature will do; it may also have

- `draw(shape, stream)`, which makes the noise it finds in `tiles.noise`, in the shape of the weight;
- `alignment(tiles)`, if it needs only some tiles at a time: a CPU may then take the weight part by part,
  parts beginning at multiples of that number of tiles;
- `scored_as`, a rounding that a search scores in its place, if it needs the whole weight at once.

The unbiased roundings are in `unbiased`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.formats import dither
from daq_jax.numerics.arithmetic import divide
from daq_jax.tiles import Tiles

_SALT = 0x5EED  # any number

Rounding = Callable[[Tiles, Array], Array]  # (tiles, scale per tile) -> value of each code


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The code nearest to the tuned weight."""

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """Code values; see the module's docstring."""
        return tiles.format.round(tiles.over(scale))


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """One of the two codes around the tuned weight, the nearer the likelier, so that errors average out.

    Draws depend on `seed`, the weight's path and the element's place, and on nothing else. It needs neither a
    base nor a change; the price is twice the mean squared error of `Nearest`.
    """

    seed: int = 0

    def draw(self, shape: tuple[int, ...], stream: Array) -> Array:
        """Uniform numbers in [0, 1), float32."""
        # A salt of our own: without it the noise could repeat the draws that made the weights.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _SALT), stream)
        return jax.random.uniform(key, shape, jnp.float32)

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """Code values; see the module's docstring."""
        assert tiles.noise is not None
        return dither(tiles.format, divide(tiles.tuned, scale), tiles.noise)
