"""The scale that a base was made with, found from its weights.

The AbsMax scale of a base that was shipped in FP8 need not be the scale it was made with: rounding to
bfloat16 moved its largest weight, and the largest code may not have been used. So the scales tried make the
largest weight of a tile each code of the top octave in turn. Then rounding to bfloat16 is undone: every
element leaves an interval for the scale, and the middle of their intersection replaces a scale outside it.

Most of a tile says nothing that a part of it does not say. Of a large tile the largest weights of a few runs
of rows are looked at; of a tile of up to 1024 elements, such as a group, all.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from daq_jax.formats import Format
from daq_jax.grids.membership import distance_in_steps, half_unit, lies_on_grid
from daq_jax.numerics.arithmetic import divide
from daq_jax.scales import usable
from daq_jax.tiles import Within

_MOST_TOPS = 16  # formats with more codes in their top octave are as fine as bfloat16 there: nothing to fit
_SAMPLE = 1024  # elements of a tile that are looked at
_LEAST_RUNS = 8  # runs of rows that a tile of many columns is cut into
_NMANT = 23  # bits of a mantissa of float32: weights stored so tell the scale to its last bit
# Mean squared distances, in steps, that differ by less are alike: int8 codes stored in float32 have 1e-10.
_ALIKE = 1e-9


def fitted_scale(
    tiles: Float[Array, "..."],
    within: Within,
    fmt: Format,
    dtype: np.dtype,
    storable: Callable[[Array], Array] = lambda scale: scale,
) -> Float[Array, "..."]:
    """The scale on whose grid the weights of each tile lie nearest, in steps of the format.

    Args:
        tiles: float32, the weights cut into tiles.
        within: which axes of `tiles` run over the rows and over the columns of a tile.
        fmt: the number format of the codes.
        dtype: dtype in which the weights were stored.
        storable: which scales may be stored; applied to each scale before it is tried.

    Returns:
        Float32, weight units per code unit, with length 1 on those axes. The AbsMax scale wins ties;
        a tile of zeros gets 1.
    """
    sample = _largest(tiles, within)
    largest = within.most(jnp.abs(sample))
    counted = jnp.maximum(within.total((sample != 0).astype(jnp.float32)), 1)

    def trial(scale: Array) -> tuple[Array, Array]:
        scale = storable(usable(scale))
        return scale, within.total(distance_in_steps(divide(sample, scale), fmt) ** 2) / counted

    def nearer(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        take = b[1] < a[1] - _ALIKE
        return jnp.where(take, b[0], a[0]), jnp.where(take, b[1], a[1])

    def try_top(best: tuple[Array, Array], top: Array) -> tuple[tuple[Array, Array], None]:
        return nearer(best, trial(divide(largest, top))), None

    first, *others = map(jnp.float32, top_codes(fmt))
    best = trial(divide(largest, lax.optimization_barrier(first)))
    if others:
        best, _ = lax.scan(try_top, best, jnp.stack(others))
    low, high = _consistent(sample, best[0], within, fmt, dtype)
    middle = storable(usable(low + (high - low) / 2))
    better = ((best[0] < low) | (best[0] > high)) & (low <= middle) & (middle <= high)
    found = jnp.where(better, middle, best[0])
    return (
        found if jnp.finfo(dtype).nmant < _NMANT else _to_the_bit(sample, found, within, fmt, dtype, storable)
    )


def _to_the_bit(
    sample: Array,
    scale: Array,
    within: Within,
    fmt: Format,
    dtype: np.dtype,
    storable: Callable[[Array], Array],
) -> Array:
    """The float32 scale next to one, or itself, under which most weights are their codes times it."""

    def count(scale: Array) -> Array:
        return within.total(lies_on_grid(sample, scale, fmt, dtype).astype(jnp.float32))

    bits = lax.bitcast_convert_type(scale, jnp.int32)

    def nudge(best: tuple[Array, Array], by: Array) -> tuple[tuple[Array, Array], None]:
        other = storable(usable(lax.bitcast_convert_type(bits + by, jnp.float32)))
        many = count(other)
        more = many > best[1]
        return (jnp.where(more, other, best[0]), jnp.where(more, many, best[1])), None

    nudges = jnp.asarray([-1, 1, -2, 2], jnp.int32)  # units in the last place
    return lax.scan(nudge, (scale, count(scale)), nudges)[0][0]


def _largest(tiles: Array, within: Within) -> Array:
    """The weight of largest magnitude of each run of rows and each column of a tile, in place of the rows."""
    rows, columns = (tiles.shape[axis] for axis in within.axes)
    runs = min(rows, max(_LEAST_RUNS, _SAMPLE // (columns * within.lines)))
    if runs == rows:
        return tiles
    axis, length = within.axes[0], -(-rows // runs)
    padding = [(0, runs * length - rows if i == axis else 0) for i in range(tiles.ndim)]
    cut = jnp.pad(tiles, padding) if rows % runs else tiles
    cut = cut.reshape(*tiles.shape[:axis], runs, length, *tiles.shape[axis + 1 :])
    high, low = jnp.max(cut, axis + 1), jnp.min(cut, axis + 1)
    return jnp.where(high >= -low, high, low)


def _consistent(x: Array, scale: Array, within: Within, fmt: Format, dtype: np.dtype) -> tuple[Array, Array]:
    """The least and the largest scale under which every weight is its code times the scale, rounded.

    The codes are those nearest under `scale`, corrected by the mean size of the weights over that of their
    codes. The least is above the largest where there is no such scale.
    """
    size = jnp.abs(x)
    code = jnp.abs(fmt.round(divide(x, scale)))
    mean = divide(within.total(size), jnp.maximum(within.total(code), 2.0**-126))
    code = jnp.abs(fmt.round(divide(x, usable(mean))))
    counts, below, above = code > 0, *_rounded_from(size, dtype)
    code = jnp.where(counts, code, 1)
    low = within.most(jnp.where(counts, divide(below, code), -jnp.inf))
    high = within.least(jnp.where(counts, divide(above, code), jnp.inf))
    return low, high


def _rounded_from(size: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """The least and the largest number that a float dtype rounds to each positive number of its own."""
    spare = 23 - min(jnp.finfo(dtype).nmant, 23)  # bits of a float32 that the dtype lacks
    bits = lax.bitcast_convert_type(size, jnp.int32)
    half = half_unit(size, dtype)
    # A tie goes to the even number. Below a power of two the numbers lie twice as close.
    odd = (bits >> spare) & 1 == 1
    half = jnp.where(odd, half * (1 - 2.0**-10), half)
    down = jnp.where(bits & 0x7FFFFF == 0, half / 2, half)
    least = size * 2.0**-22  # four roundings to float32, which is what the bounds are computed in
    return size - jnp.maximum(down, least), size + jnp.maximum(half, least)


@functools.cache
def top_codes(fmt: Format) -> tuple[float, ...]:
    """The values that the largest weight of a tile may have had, the largest value of the format first."""
    with jax.ensure_compile_time_eval():
        octave = fmt.round(jnp.linspace(fmt.largest / 2, fmt.largest, 1025, dtype=jnp.float32))
    tops = np.unique(np.asarray(octave))[::-1]
    if len(tops) > _MOST_TOPS:
        tops = tops[:1]
    # Half the largest value is the largest value of a scale of half the size.
    return tuple(float(top) for top in tops if top * 2 != tops[0])
