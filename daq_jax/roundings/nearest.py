"""Roundings that look at one element at a time: to the nearest code, or to either neighbour by chance."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.formats import dither
from daq_jax.numerics.arithmetic import divide
from daq_jax.roundings.rounding import Rounding
from daq_jax.tiles import Tiles

_SALT = 0x5EED  # any number


@dataclasses.dataclass(frozen=True)
class Nearest(Rounding):
    """The code nearest to the tuned weight."""

    scope = "tile"
    in_lines = True
    bytes_per_element = 24

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        return tiles.format.round(tiles.over(scale))


@dataclasses.dataclass(frozen=True)
class Stochastic(Rounding):
    """One of the two codes around the tuned weight, the nearer the likelier, so that errors average out.

    The draws depend on `seed`, the weight's path and the element's place, and on nothing else. The base is
    not looked at. The mean squared error is twice that of `Nearest`.
    """

    scope = "tile"
    draws = True
    in_lines = True

    seed: int = 0

    def draw(self, shape: tuple[int, ...], stream: Array) -> Array:
        """Uniform numbers in [0, 1), float32."""
        # A salt of our own: without it the noise could repeat the draws that made the weights.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _SALT), stream)
        return jax.random.uniform(key, shape, jnp.float32)

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        assert tiles.noise is not None
        return dither(tiles.format, divide(tiles.tuned, scale), tiles.noise)
