"""Whether the base of a tile lies on the grid of a scale."""

import jax.numpy as jnp
from jaxtyping import Array

from daq_jax.formats import step_towards
from daq_jax.numerics.arithmetic import divide
from daq_jax.tiles import Tiles

_NEAR = 0.01  # mean square of the distance to the nearest code, in steps; weights on no grid have 1 / 12


def is_native(tiles: Tiles, scale: Array) -> Array:
    """Bool in the shape of a scale: whether base weights are codes times the scale, to a tenth of a step."""
    number, base = tiles.format, divide(tiles.base, scale)
    code = number.round(base)
    step = step_towards(base, base > code, number)
    off = jnp.where(step > 0, (base - code) / jnp.where(step > 0, step, 1), 0)
    return jnp.mean(off * off, tiles.axes, keepdims=True) < _NEAR
