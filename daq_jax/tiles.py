"""A pair of weights, cut into tiles: what searches and roundings work on.

Arrays keep two axes for the elements of a tile, its rows and its columns, wherever they lie; every other axis
runs over tiles. A scale has length 1 on those two axes, so that it broadcasts.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.arithmetic import multiply
from daq_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A pair of weights, cut into tiles.

    Attributes:
        stored_base: weights before tuning, in the dtype they came in.
        stored_tuned: weights after, of the same shape.
        axes: positions of a tile's rows and of its columns.
        format: the number format of the codes.
    """

    stored_base: Array
    stored_tuned: Array
    axes: tuple[int, int]
    format: Format

    @property
    def base(self) -> Array:
        """Weights before tuning, float32."""
        return self.stored_base.astype(jnp.float32)

    @property
    def tuned(self) -> Array:
        """Weights after tuning, float32."""
        return self.stored_tuned.astype(jnp.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the cut weights."""
        return self.stored_tuned.shape

    @property
    def change(self) -> Array:
        """The true change d."""
        return self.tuned - self.base

    def kept(self, values: Array, scale: Array) -> Array:
        """The kept change q of codes with these values."""
        return multiply(values, scale) - self.base

    def flat(self, x: Array) -> Array:
        """An array of the tiles' shape as `[T, K]`."""
        moved = jnp.moveaxis(x, self.axes, (-2, -1))
        return moved.reshape(-1, math.prod(moved.shape[-2:]))

    def per_tile(self, x: Array) -> Array:
        """`[T]` in the shape of a scale."""
        return x.reshape([1 if i in self.axes else n for i, n in enumerate(self.shape)])
