"""Which weights carry a change on the grid of the base, and what that costs.

A weight that lies on a code can be moved by a mean `x` only by going whole steps `h` with probability
`|x| / h`. The noise of that is `|x| (h - |x|)`: linear in `|x|`, and in the weight's own step. So weights
with small steps carry the change for their rows and columns, the others stay. Which weights they are is
decided by their steps and never by their own changes: a choice by changes would favour some directions over
others. docs/design/envelope.md has the figures.

Arrays are `[B, t, r, C]`: matrices, rows of tiles, rows of a tile, columns; `r = 1` for what holds for tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from daq_jax.formats import Format, step_towards, weights_of
from daq_jax.numerics.arithmetic import divide, multiply
from daq_jax.numerics.linalg import rough

REACH = 4.0  # see `carry`; 2 lost 5 to 50 %
_TURNS = 4  # of rows and columns; after them projections are 1.00
_MOST_PER_TURN = 8.0  # times or parts that a row or column may take on in one turn
_HALVINGS = 16  # of the share of weights that carry
_FEWEST = 1e-5  # share of weights that carry at least
_SAMPLE = 2**18  # elements of a matrix from which that share is found
_NEARER = 8  # steps towards the size of a change before it was stored
_WITHIN = 0.4  # units in the last place: smaller changes are single units, if any
_TOLD = 0.5  # units in the last place: beside an exact base, smaller changes leave too few traces to count
_NOISIEST = 10.0  # times the squares of a change that rounding of the stored weights may make of them
_MEAN_SIZE = 0.8  # of a normal variable, in units of its root mean square
_RANDOM = 1.5  # times the coherence of a random matrix counts as none
_TINY = 1e-37

PerMatrix = Float[Array, "B 1 1 1"]


class Pair(NamedTuple):
    """Matrices before and after tuning, by rows of tiles.

    Attributes:
        base: `[B, t, r, C]` float32, weights before tuning.
        tuned: `[B, t, r, C]` float32, weights after tuning.
        scale: `[B, t, 1, C]` float32, weight units per code unit.
        native: `[B, t, 1, C]` bool, whether the base of the tile lies on the grid of its scale.
        unit: `[B, t, r, C]` float32, a unit in the last place of each weight as it is stored.
        held: `[B, t, r, C]` bool, whether the base is a number of the dtype of the stored tuned weights.
        both: whether both weights are stored in such units; if not, the base is as it was before.
    """

    base: Array
    tuned: Array
    scale: Array
    native: Array
    unit: Array
    held: Array
    both: bool

    @property
    def change(self) -> Array:
        """The true change d."""
        return self.tuned - self.base


class Carried(NamedTuple):
    """What moving weights on the grid of the base comes to.

    Attributes:
        move: `[B, t, r, C]` float32, mean move of each weight in weight units; the change off the grid.
        plain: squared error of rounding the tuned weights to nearest, a sum.
        excess: squared error expected beyond that, a sum.
        size: squared change, a sum.
        known: the part of `size` that the change is expected to have been before it was stored, a sum.
        moves: how many weights are expected to move, those off the grid included, a sum.
        price: what a move costs in units of its square: the sum of `|x| h` over the sum of `x^2`.
    """

    move: Array
    plain: PerMatrix
    excess: PerMatrix
    size: PerMatrix
    known: PerMatrix
    moves: PerMatrix
    price: PerMatrix


def carry(number: Format, pair: Pair, reach: float) -> Carried:
    """Shares out the change of each matrix among the weights that carry it.

    Args:
        number: the format of the codes.
        pair: the matrices.
        reach: a weight carries fully while its step is below half of `reach` times the change it would carry
            if all were alike, and not at all above `reach` times that.
    """
    d = pair.change
    code = number.round(divide(pair.base, pair.scale))
    step = step_towards(code, d > 0, number)
    carries = pair.native & (d != 0) & (step > 0)
    exact = pair.held & (pair.base == weights_of(code, pair.scale))
    known = _known_before_storing(pair, exact)
    on = jnp.where(carries, _share_on(pair, step, carries, reach, known.rms), 0)
    size = jnp.where(pair.native, known.share * d * d, 0)
    move = jnp.where(pair.native, on * _balance(on * size, size) * d, d)
    aim = code + divide(move, pair.scale)
    low, high = number.floor(aim), number.ceil(aim)
    up = (aim - low) / jnp.where(high > low, high - low, 1)
    noise = up * (1 - up) * ((high - low) * pair.scale) ** 2
    missed = weights_of(low + up * (high - low), pair.scale) - pair.tuned
    off = weights_of(number.round(divide(pair.tuned, pair.scale)), pair.scale) - pair.tuned
    error = jnp.where(pair.native, noise + missed * missed, off * off)
    moved = jnp.where(pair.native, move, 0)
    gap = step * pair.scale
    anew = (d != 0).astype(jnp.float32)
    moves = jnp.where(pair.native, jnp.abs(moved) / jnp.where(gap > 0, gap, jnp.inf), anew)
    return Carried(
        move,
        plain=_total(off * off),
        excess=_total(error - off * off),
        size=_total(d * d),
        known=_total(jnp.where(pair.native, size, d * d)),
        moves=_total(moves),
        price=_total(jnp.abs(moved) * gap) / jnp.maximum(_total(moved * moved), _TINY),
    )


def coherence(seen: Float[Array, "B k C"], total: Float[Array, "B"], rows: int) -> Float[Array, "B"]:
    """How much more harm the loss of a change does than a random error of its size; 0 for a random change.

    `R C sum(s^6) / sum(s^2)^3` of its singular values `s`, less 1.5 times what a random matrix has, which is
    `R / C + C / R + 3`. Tunes had a thousand and more.

    Args:
        seen: the change along its leading left singular directions, `U' d`: the sixth powers of the others
            add little.
        total: sum of `d^2`.
        rows: R.
    """
    columns = seen.shape[-1]
    seen = seen / jnp.sqrt(jnp.maximum(total, _TINY))[:, None, None]
    gram = rough(seen, seen.mT)
    found = rows * columns * jnp.sum(rough(gram, gram) * gram, (1, 2))
    return jnp.maximum(found - _RANDOM * (rows / columns + columns / rows + 3), 0)


def worth_keeping(carried: Carried, coherence: Float[Array, "B"], native: Bool[Array, "..."]) -> PerMatrix:
    """The share of the change that is worth the noise of keeping it, from 0 to 1.

    It minimizes `(1 - a)^2 c |d|^2 + a (excess error)`; 1 for a matrix off the grid. `c` is the coherence:
    sixth powers of the singular values of `d` over the third power of its size. Rounding of the stored
    weights adds to the size and little to the powers, and the harm goes with the square of what the change
    was before: `c` is multiplied by the square of their ratio.
    """
    noise = jnp.minimum(carried.size / jnp.maximum(carried.known, _TINY), _NOISIEST)
    worth = 2 * coherence[:, None, None, None] * carried.size * noise**2
    share = jnp.clip(1 - carried.excess / jnp.maximum(worth, _TINY), 0, 1)
    return jnp.where(jnp.any(native, (1, 2, 3), keepdims=True), share, 1)


def _total(x: Array) -> PerMatrix:
    return _sum(x, (1, 2, 3))


class _Known(NamedTuple):
    """What is known of a change before the weights were stored.

    Attributes:
        rms: its root mean square over the native tiles.
        share: `[B, t, r, C]`, from 0 to 1: the part of the stored squared change that it is expected to be.
    """

    rms: PerMatrix
    share: Array


def _known_before_storing(pair: Pair, exact: Bool[Array, "B t r C"]) -> _Known:
    """Tells a change from the rounding of the stored weights, which is noise.

    A change of a weight that is stored in units `u` has `u^2 / 12` more in squares, and `u^2 / 6` where both
    weights are stored so. Changes `x` well below `u` are then a whole unit with probability `|x| / u`, which
    comes to `|x| u`. Beside an exact base they are stored only from half a unit on, as a whole one, so that
    about half of what is stored is change. The root mean square of `x` is that under which the changes have
    the squares expected.

    Args:
        pair: the matrices.
        exact: whether the base is on its grid, and a number of the dtype of the stored tuned weights.
    """

    def expected(rms: Array, unit: Array, exact: Array) -> Array:
        once = rms * rms + unit * unit / 12
        if not pair.both:
            return once
        twice = jnp.where(rms < _WITHIN * unit, _MEAN_SIZE * rms * unit, rms * rms + unit * unit / 6)
        return jnp.where(exact, once, twice)

    change, unit, known = (_every_nth(x) for x in (pair.change, pair.unit, exact))
    square = change * change
    native = _every_nth(jnp.broadcast_to(pair.native, pair.base.shape))

    def mean(x: Array, where: Array) -> PerMatrix:
        return _total(jnp.where(where, x, 0)) / jnp.maximum(_total(where.astype(jnp.float32)), 1)

    first = jnp.sqrt(mean(square, native & (square > 0)))
    counted = native & ((square > 0) | (unit > _WITHIN * first))  # zeros of changes too small to be stored

    def nearer(_: Array | int, rms: Array) -> Array:
        telling = counted & ~(known & (rms < _TOLD * unit))
        ratio = mean(square / jnp.maximum(expected(rms, unit, known), _TINY), telling)
        return rms * jnp.where(ratio > 0, jnp.sqrt(ratio), 1)

    rms = lax.fori_loop(0, _NEARER, nearer, jnp.sqrt(mean(square, counted)))
    squared, units = rms * rms, pair.unit * pair.unit
    beside_exact = 1 - units / jnp.maximum(2 * units + 8 * squared, _TINY)  # of a normal change, within 0.03
    share = jnp.where(exact, beside_exact, squared / jnp.maximum(expected(rms, pair.unit, exact), _TINY))
    return _Known(rms, share)


def _share_on(pair: Pair, step: Array, carries: Array, reach: float, rms: PerMatrix) -> Array:
    """From 0 to 1: how far each weight carries, by its step in code units, compared within its tile.

    Few carry much, or many little: with `G` the gain of those that carry fully, `G * mean(share) = 1`.
    """
    tiles = jnp.maximum(_total(pair.native.astype(jnp.float32)), 1)
    scale = jnp.sqrt(_total(jnp.where(pair.native, pair.scale * pair.scale, 0)) / tiles)
    unit = scale / jnp.maximum(reach * rms, _TINY)

    def share(step: Array, gain: Array) -> Array:
        return jnp.clip(2 - 2 * step * unit / gain, 0, 1)

    some, counted = _every_nth(step), _every_nth(carries)
    count = jnp.maximum(_total(counted.astype(jnp.float32)), 1)

    def halve(_: Array | int, gains: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = gains
        gain = jnp.sqrt(low * high)
        few = gain * _total(jnp.where(counted, share(some, gain), 0)) < count
        return jnp.where(few, gain, low), jnp.where(few, high, gain)

    start = jnp.ones_like(unit), jnp.full_like(unit, 1 / _FEWEST)
    return share(step, lax.fori_loop(0, _HALVINGS, halve, start)[1])


def _every_nth(x: Array) -> Array:
    """Every n-th column."""
    _, t, r, columns = x.shape
    return x[..., :: max(1, t * r * columns // _SAMPLE)]


def every_nth(pair: Pair) -> Pair:
    """Every n-th column of large matrices, from which a share or an error may be estimated."""
    _, t, r, columns = pair.base.shape
    step = max(1, t * r * columns // _SAMPLE)
    some = (x[..., ::step] if x.shape[-1] == columns else x for x in pair[:-1])
    return Pair(*some, both=pair.both)


def _balance(part: Array, whole: Array) -> Array:
    """Factors of rows and columns such that, in each of them, `part` times the factors sums to `whole`."""
    rows, columns = jnp.ones_like(part[..., :1]), jnp.ones_like(part[:, :1, :1])
    by_row, by_column = (_sum(whole, axes) for axes in ((3,), (1, 2)))

    def turn(_: Array | int, factors: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, columns = factors
        rows = rows * _towards(by_row, rows * _sum(multiply(part, columns), (3,)))
        return rows, columns * _towards(by_column, columns * _sum(part * rows, (1, 2)))

    rows, columns = lax.fori_loop(0, _TURNS, turn, (rows, columns))
    return rows * columns


def _sum(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(x, axes, keepdims=True)


def _towards(whole: Array, part: Array) -> Array:
    """The factor from a part to the whole, within what one turn may change; 1 where there is nothing."""
    factor = jnp.clip(whole / jnp.maximum(part, _TINY), 1 / _MOST_PER_TURN, _MOST_PER_TURN)
    return jnp.where(whole > 0, factor, 1)
