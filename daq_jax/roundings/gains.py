"""Unbiased rounding by gains: choose between neighbouring codes so that the kept change has the true size.

Rounding to the nearest code keeps a weight, not a change. Where a base is on the grid of the codes, as one
that was itself shipped in FP8 is, a change below half a step rounds to nothing. Here the target of rounding
moves instead: the codes nearest to `base + g d`, with a gain `g` for each small set of elements such that the
projection `<d, q> / <d, d>` of the set is 1. The gain is not stored: format, scales and servers are the same
as without it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from daq_jax.errors import DaqError
from daq_jax.numerics.arithmetic import divide, multiply
from daq_jax.numerics.kernel_choice import kernel_or_plain, may_take_kernels
from daq_jax.numerics.reductions import in_runs, sum_as_computed
from daq_jax.roundings import gains_gpu
from daq_jax.roundings.rounding import Rounding
from daq_jax.tiles import Tiles

Per = Literal["row", "column", "tile"]

_SMALLEST_SET = 64  # elements; the projection of fewer is too noisy to aim at
_HALVINGS = 14  # of ten octaves of gain: the last step is 0.04 %
_NO_GAIN = np.float32(1)
_LARGEST_GAIN = np.float32(2**10)  # a change of a thousandth of a step still moves its codes
_SMALLEST_REGION = 4096  # elements; over fewer, a bias does not stand out from the noise
_WINDOW = 64  # tiles; no set, region or running sum reaches over the edge of a window
_TOLERATED = 2.0  # standard deviations of a projection's own noise


@dataclasses.dataclass(frozen=True)
class Sets:
    """The sets of elements that share a gain.

    A set is one row, one column or the whole of a tile; in the matrix view a row is one input and a column
    one output. Where that is fewer than 64 elements, as in narrow tiles of `Channel` and `Group`, a set takes
    in several neighbouring tiles. The bias of nearest rounding is judged over a region, of 4096 elements or
    more: several sets side by side.

    Attributes:
        axes: axes of a tile that a set sums over.
        rest: axis of a tile along which its sets are numbered; None where a tile has one set.
        along: axis over tiles along which a set takes in neighbouring tiles.
        across: axis over tiles along which a region takes in neighbouring sets.
        run: number of tiles in a set, a power of two.
        region: number of sets in a region along `across`, a power of two.
    """

    axes: tuple[int, ...]
    rest: int | None
    along: int
    across: int
    run: int
    region: int

    @classmethod
    def of(cls, per: Per, tiles: Tiles) -> "Sets":
        """The sets of a weight."""
        (r, c), (grid_r, grid_c) = tiles.axes, tiles.grid
        height, width = tiles.shape[r], tiles.shape[c]
        axes, rest, along, across = {
            "row": ((c,), r, grid_c, grid_r),
            "column": ((r,), c, grid_r, grid_c),
            "tile": ((r, c), None, *((grid_r, grid_c) if height >= width else (grid_c, grid_r))),
        }[per]
        if rest is not None and tiles.shape[rest] == 1:
            rest = None
        run = _power_of_two(_SMALLEST_SET / math.prod(tiles.shape[a] for a in axes))
        region = _power_of_two(_SMALLEST_REGION / (height * width * run))
        return cls(axes, rest, along, across, run, region)

    def total(self, x: Array) -> Array:
        """Sum over each set, in a shape that broadcasts over the tiles."""
        return _sum_of_runs(jnp.sum(x, self.axes, keepdims=True), self.along, self.run)

    def total_on_cpu(self, x: Array, *, local: bool) -> Array:
        """As `total`, in the order that is quick on a CPU; `local` if the tiles are on one device."""
        for axis in reversed(self.axes):
            x = sum_as_computed(x, axis, local)
        return _sum_of_runs(x, self.along, self.run)

    def region_total(self, sums: Array) -> Array:
        """Sum, over the region of each set, of the totals of its sets; in the shape of the totals."""
        sums = sums if self.rest is None else jnp.sum(sums, self.rest, keepdims=True)
        return _sum_of_runs(sums, self.across, self.region)

    def spread_evenly(self, share: Array) -> Array:
        """Picks sets so that, of those side by side, a fraction `share` is picked.

        The running sum of shares is rounded: the number picked so far is never off by more than half a set.
        """
        if self.rest is not None:
            running = jnp.cumsum(share, self.rest)
        else:  # one set to a tile: tiles across share out among them
            split = in_runs(share, self.across, _WINDOW)
            running = _from_runs(jnp.cumsum(split, self.across + 1), self.across, share.shape[self.across])
        return jnp.floor(running + 0.5) > jnp.floor(running - share + 0.5)

    @property
    def alignment(self) -> int:
        """A weight may be taken apart at multiples of this number of tiles without cutting a region."""
        return 1 if self.rest is not None and self.run == self.region == 1 else _WINDOW


def _power_of_two(least: float) -> int:
    """Smallest power of two, from 1 to the window, that is not below `least`."""
    return min(1 << max(0, math.ceil(math.log2(least))), _WINDOW)


def _from_runs(x: Array, axis: int, length: int) -> Array:
    """The inverse of `in_runs`."""
    joined = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(joined, 0, length, axis=axis)


def _sum_of_runs(x: Array, axis: int, run: int) -> Array:
    """Each element's sum over its run along an axis."""
    if run == 1:
        return x
    split = in_runs(x, axis, run)
    sums = jnp.broadcast_to(jnp.sum(split, axis + 1, keepdims=True), split.shape)
    return _from_runs(sums, axis, x.shape[axis])


def _between(low: Array, high: Array) -> Array:
    """The float half-way between two positive floats in order of their bits: close to the geometric mean."""
    a, b = (lax.bitcast_convert_type(x, jnp.int32) for x in (low, high))
    return lax.bitcast_convert_type(a + ((b - a) >> 1), jnp.float32)


class Bracket(NamedTuple):
    """What is known of each set when its bisection ends; arrays broadcast over the tiles.

    Attributes:
        size: `<d, d>`.
        excess: `<d, e>`, with the error `e` of nearest rounding.
        squares: the sum of `(d e)^2` over the set.
        low: largest gain tried whose projection is below 1.
        high: smallest gain tried whose projection is 1 or more; next to `low` when the bisection ends.
        at_low: `<d, q>` under the gain `low`.
        at_high: `<d, q>` under the gain `high`.
    """

    size: Array
    excess: Array
    squares: Array
    low: Array
    high: Array
    at_low: Array
    at_high: Array


def bracket(d: Array, kept: Callable[[Array | float], Array], total: Callable[[Array], Array]) -> Bracket:
    """Bisects for the gain of each set.

    Args:
        d: the true change, in the shape of the tiles.
        kept: gives the kept change under a gain, which broadcasts over the tiles.
        total: sums over each set, in a shape that broadcasts over the tiles.
    """
    size, plain = total(d * d), kept(1.0)
    excess, squares, at_one = total(d * (plain - d)), total((d * (plain - d)) ** 2), total(d * plain)
    short = excess < 0
    far = jnp.where(short, _LARGEST_GAIN, 1 / _LARGEST_GAIN)
    at_far = total(d * kept(far))

    def halve(_: Array | int, bracket: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, at_low, at_high = bracket
        middle = _between(low, high)
        reached = total(d * kept(middle))
        under = reached < size
        return (
            jnp.where(under, middle, low),
            jnp.where(under, high, middle),
            jnp.where(under, reached, at_low),
            jnp.where(under, at_high, reached),
        )

    start = (
        jnp.where(short, _NO_GAIN, far),
        jnp.where(short, far, _NO_GAIN),
        jnp.where(short, at_one, at_far),
        jnp.where(short, at_far, at_one),
    )
    return Bracket(size, excess, squares, *lax.fori_loop(0, _HALVINGS, halve, start))


@dataclasses.dataclass(frozen=True)
class UnbiasedGain(Rounding):
    """The codes nearest to `base + g d`, with gains `g` that make the projection of each set of elements 1.

    The gain of a set is found by bisection, since the projection never falls as the gain grows. The codes are
    those of `Nearest` in three cases: where the projection of nearest rounding is 1 within two standard
    deviations of its own noise, where nothing changed, and where no gain up to 1024 reaches 1.

    The projection of a set jumps where an element takes its next code, so no gain may reach 1 exactly. Some
    sets then take the gain before the jump and the others the gain after it, in such shares that the total
    projection is 1.

    Deterministic. Rounds about 18 times.

    Attributes:
        per: the elements that share a gain: a "row" (one input), a "column" (one output) or the whole of a
            "tile", in the matrix view of the weight; of narrow tiles several, until a set has 64 elements.

    >>> UnbiasedGain(per="row")
    UnbiasedGain(per='row')
    """

    scope = "tile"

    per: Per = "column"

    def __post_init__(self) -> None:
        if self.per not in ("row", "column", "tile"):
            raise DaqError(f"`per` must be 'row', 'column' or 'tile'; got {self.per!r}.")

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        return round_towards(tiles, scale, self.gains(tiles, scale))

    def alignment(self, tiles: Tiles) -> int:
        """At multiples of how many tiles a weight may be taken apart."""
        return Sets.of(self.per, tiles).alignment

    def gains(self, tiles: Tiles, scale: Array) -> Array:
        """The gain of each set, in a shape that broadcasts over the tiles."""
        if self.per != "column" or self._kernel_applies(tiles):
            return self._gains(tiles, scale)
        # Sums down a tile took twice the time of sums along it on an H200, so a set's elements are copied
        # to lie side by side.
        r, last = tiles.axes[0], len(tiles.shape) - 1

        def side_by_side(tiles: Tiles, scale: Array) -> Array:
            def move(x: Array) -> Array:
                return jnp.moveaxis(x, r, last)

            def position(axis: int) -> int:
                return last if axis == r else axis - (axis > r)

            axes, grid = (tuple(map(position, pair)) for pair in (tiles.axes, tiles.grid))
            moved, scale = lax.optimization_barrier(jax.tree.map(move, (tiles, scale)))
            return jnp.moveaxis(self._gains(dataclasses.replace(moved, axes=axes, grid=grid), scale), last, r)

        return lax.platform_dependent(tiles, scale, cpu=self._gains, default=side_by_side)

    def _kernel_applies(self, tiles: Tiles) -> bool:
        sets = Sets.of(self.per, tiles)
        return (
            tiles.machine.one_device and may_take_kernels() and gains_gpu.applies(tiles, sets.axes, sets.run)
        )

    def _gains(self, tiles: Tiles, scale: Array) -> Array:
        sets = Sets.of(self.per, tiles)

        def bisect(base: Array, tuned: Array, scale: Array, *, total: Callable[[Array], Array]) -> Bracket:
            pair = dataclasses.replace(tiles, stored_base=base, stored_tuned=tuned)

            def kept(gain: Array | float) -> Array:
                return pair.kept(round_towards(pair, scale, jnp.asarray(gain)), scale)

            return bracket(pair.change, kept, total)

        def plain(*arrays: Array) -> Bracket:
            total_on_cpu = functools.partial(sets.total_on_cpu, local=tiles.machine.one_device)
            on_cpu, elsewhere = (functools.partial(bisect, total=t) for t in (total_on_cpu, sets.total))
            return lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)

        kernel = functools.partial(gains_gpu.per_set, bracket, tiles.format, sets.axes)
        arrays = (tiles.stored_base, tiles.stored_tuned, scale)
        found = kernel_or_plain(kernel, plain, *arrays) if self._kernel_applies(tiles) else plain(*arrays)
        size, excess, squares, low, high, at_low, at_high = found
        noise = jnp.sqrt(sets.region_total(squares))
        unbiased = jnp.abs(sets.region_total(excess)) <= _TOLERATED * noise
        reachable = (at_low <= size) & (at_high >= size) & (size > 0)
        left_alone = unbiased | ~reachable
        share = jnp.where(left_alone, 0, (size - at_low) / jnp.where(at_high > at_low, at_high - at_low, 1))
        return jnp.where(left_alone, 1, jnp.where(sets.spread_evenly(share), high, low))


def target_of(tiles: Tiles, gain: Array) -> Array:
    """`base + gain * d`; exactly `tuned` where the gain is 1."""
    return jnp.where(gain == 1, tiles.tuned, tiles.base + multiply(gain, tiles.change))


def round_towards(tiles: Tiles, scale: Array, gain: Array, correction: Array | float = 0.0) -> Array:
    """Values of the codes nearest to `base + gain * d + correction`."""
    return tiles.format.round(divide(target_of(tiles, gain) + correction, scale))
