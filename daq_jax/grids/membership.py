"""Whether a weight lies on the grid of a number format: whether it is a code times a scale.

The weights of a model that was shipped in FP8 lie on such a grid. Rounding a fine-tune of it to the same grid
takes small changes back. A weight that is stored in bfloat16 is `code * scale` rounded once more.

Two tests. `lies_on_grid` asks of each element whether it is within half a unit in the last place of the dtype
it is stored in, and is strict. `is_native` asks of each tile whether its elements are near codes on average.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from daq_jax.formats import Format, weights_of
from daq_jax.numerics.arithmetic import divide, power_below
from daq_jax.tiles import Tiles

_NATIVE = 0.01  # mean squared distance to the nearest code, in steps; weights off the grid have about 1/12


def lies_on_grid(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    fmt: Format,
    dtype: np.dtype,
    zero: Float[Array, "..."] | float = 0.0,
) -> Bool[Array, "..."]:
    """Whether each element is a code times the scale, to half a unit in the last place.

    Args:
        x: float32, the weights.
        scale: float32, weight units per code unit; broadcasts to `x`.
        fmt: the number format of the codes.
        dtype: dtype in which the weights were stored.
        zero: code value that stands for weight 0; broadcasts to `x`.
    """
    nearest = weights_of(fmt.round(divide(x, scale) + zero), scale, zero)
    return jnp.abs(x - nearest) <= half_unit(x, dtype)


def half_unit(x: Float[Array, "..."], dtype: np.dtype) -> Float[Array, "..."]:
    """Half a unit in the last place of a float dtype at each number; float32."""
    return power_below(x) * 2.0 ** -(1 + jnp.finfo(dtype).nmant)


def is_native(tiles: Tiles, scale: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Whether the base of each tile lies on the grid of a scale, all elements taken together.

    It does if the mean squared distance of its elements from their nearest codes is below 0.01, in steps of
    the format at each element, less what rounding to the dtype of the base explains: half a unit in the last
    place. Zeros are on every grid and are not counted; a tile of zeros is native.

    Args:
        tiles: the pair of weights, of which the base is looked at.
        scale: float32, weight units per code unit of each tile; broadcasts over the tiles.

    Returns:
        Bool, in the shape of a scale; False for a tile that is not finite.
    """
    base = tiles.base
    allowed = half_unit(base, tiles.stored_base.dtype) * (1 / scale)
    squares = tiles.total(distance_in_steps(divide(base, scale), tiles.format, allowed) ** 2)
    return squares <= _NATIVE * tiles.total((base != 0).astype(jnp.float32))


def distance_in_steps(
    x: Float[Array, "..."], fmt: Format, allowed: Float[Array, "..."] | float = 0.0
) -> Float[Array, "..."]:
    """Distance from each number to the nearest code, in steps: gaps between the two codes around it.

    Args:
        x: float32, in code units.
        fmt: the number format of the codes.
        allowed: a distance that counts as none, in code units; broadcasts to `x`.

    Returns:
        Float32, at most half; more for a number beyond the last code, whose step is the last one.
    """
    low, high = fmt.floor(x), fmt.ceil(x)
    gap = high - low
    last = fmt.largest - fmt.floor(jnp.float32(fmt.largest * (1 - 2.0**-10)))
    distance = jnp.where(gap > 0, jnp.minimum(x - low, high - x), jnp.abs(x - low))
    return jnp.maximum(distance - allowed, 0) / jnp.where(gap > 0, gap, last)
