"""Whether a weight lies on the grid of a number format: whether it is codes times a scale, and which scale.

The weights of a model that was shipped in FP8 lie on such a grid. Rounding a fine-tune of it to the same grid
takes small changes back. A weight that is stored in bfloat16 is `code * scale` rounded once more. So an
element counts as on the grid if it is within half a unit in the last place of the dtype it is stored in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from daq_jax.formats import Format, weights_of
from daq_jax.numerics.arithmetic import divide, power_below
from daq_jax.scales import usable

_MOST_TOPS = 16  # formats with more codes in their top octave are as fine as bfloat16 there: nothing to fit
_NUDGES = np.arange(-4, 5) / 4  # of the scale, in units of what one rounding of the largest weight can do


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
    half_unit = power_below(x) * 2.0 ** -(1 + jnp.finfo(dtype).nmant)
    return jnp.abs(x - nearest) <= half_unit


def lies_on_fitted_grid(
    tiles: Float[Array, "..."],
    scale: Float[Array, "..."],
    axes: tuple[int, int],
    fmt: Format,
    dtype: np.dtype,
) -> Bool[Array, "..."]:
    """Whether each element lies on the grid of the scale that puts most elements of its tile on it.

    The AbsMax scale of a base that was shipped in FP8 need not be the scale it was made with: rounding to
    bfloat16 moved its largest weight, and the largest code may not have been used. The scales tried make the
    tile's largest weight each code of the top octave in turn, and values a little above and below it.

    Args:
        tiles: float32, the weights cut into tiles.
        scale: float32, AbsMax scale of each tile; broadcasts to `tiles`.
        axes: the axes of `tiles` that run over the elements of a tile.
        fmt: the number format of the codes.
        dtype: dtype in which the weights were stored.
    """
    ratios = jnp.asarray(fitting_ratios(fmt, np.dtype(dtype).name))

    def better(best: Array, ratio: Array) -> tuple[Array, None]:
        on = lies_on_grid(tiles, usable(scale * ratio), fmt, dtype)
        more = jnp.sum(on, axes, keepdims=True) > jnp.sum(best, axes, keepdims=True)
        return jnp.where(more, on, best), None

    found, _ = lax.scan(better, jnp.zeros(tiles.shape, bool), ratios)
    return found


@functools.cache
def fitting_ratios(fmt: Format, dtype: str) -> np.ndarray:
    """Scales to try, as float32 ratios to the AbsMax scale. The first is 1, and it wins ties."""
    with jax.ensure_compile_time_eval():
        octave = fmt.round(jnp.linspace(fmt.largest / 2, fmt.largest, 1025))
    tops = np.unique(np.asarray(octave))[1:]  # the lowest is the highest, an octave down
    tops = tops if len(tops) <= _MOST_TOPS else tops[-1:]
    unit = max(2.0 ** -(jnp.finfo(dtype).nmant + 2), 2.0**-23)
    ratios = np.outer(fmt.largest / tops[::-1], 1 + unit * _NUDGES[np.argsort(abs(_NUDGES))])
    return ratios.ravel().astype(np.float32)
