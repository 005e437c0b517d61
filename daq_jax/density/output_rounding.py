"""Rounding by the output: each code is chosen in view of the errors that the other codes already make.

Nearest codes make the least error of the weights, not of the output, where errors of correlated inputs add up
or cancel. Here the weights are visited one input after another, over and over: each takes the code that is
best for the output given all the others, and after each group its scale and zero take the best values for its
codes. Every move lowers the loss or leaves it, so the end is never above the start. Coordinate descent for
quantization is that of arXiv:2309.01885; here groups share it with their lines.

The loss is of islands, within which errors may make up for one another: each group by itself, or the whole
row of an output. Arrays are `[k, n, C]`: `k` groups of an island, `n` inputs of a group, `C` outputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.density.code_lines import Groups, Line, across, better_line
from daq_jax.formats import Format, weights_of
from daq_jax.numerics.linalg import inverse_factor

BLOCK = 128  # inputs whose errors are kept up to date one by one; beyond, by a product once a block


class Islands(NamedTuple):
    """Within which errors may make up for one another.

    Attributes:
        gram: `[I, k n, k n]`, Gram matrix of the inputs of each.
        factor: of the same shape, the upper triangular `U` with `U' U` the inverse of it: how an error of one
            input is best made up for by those after it. NaN if the Gram matrix has no inverse.
    """

    gram: Array
    factor: Array

    @classmethod
    def of(cls, gram: Float[Array, "I S S"]) -> "Islands":
        """The islands of some Gram matrices, symmetric and with a positive diagonal."""
        # Backwards, lower is upper: of `G = V V'` with an upper `V`, this is `V^-1`.
        return cls(gram, inverse_factor(gram[:, ::-1, ::-1])[:, ::-1, ::-1])


def round_by_output(groups: Groups, islands: Islands, line: Line, *, sweeps: int) -> tuple[Array, Line]:
    """Code values and lines after some sweeps over all weights.

    Args:
        groups: the layer; its groups have at most 128 inputs, or a multiple of 128.
        islands: `I` of `k` groups each, `I k = N`.
        line: of each group.
        sweeps: visits to each weight, after the first.
    """
    count = len(islands.gram)

    def split(x: Array) -> Array:
        return x.reshape(count, -1, *x.shape[1:])

    run = functools.partial(_round_island, fmt=groups.format, shift=groups.shift, sweeps=sweeps)
    parts = jax.tree.map(split, (groups.weight, groups.real, groups.nearest(line), line))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(run)(islands, *parts))


def _round_island(
    island: Islands,
    weight: Array,
    real: Array,
    values: Array,
    line: Line,
    *,
    fmt: Format,
    shift: bool,
    sweeps: int,
) -> tuple[Array, Line]:
    """One island: the better of the nearest codes and those with error feedback, and then the sweeps."""
    size = weight.shape[0] * weight.shape[1]

    def pull_of(values: Array) -> tuple[Array, Array]:
        """The island's Gram matrix times the error, `[k, n, C]`, and the loss, `[C]`."""
        error = jnp.where(real, weight - line.weights(values), 0)
        pull = across(island.gram, error.reshape(size, -1)).reshape(error.shape)
        return pull, jnp.sum(error * pull, axis=(0, 1))

    fed = _feed_back(island.factor, weight, line, fmt)
    (pull, loss), (fed_pull, fed_loss) = pull_of(values), pull_of(fed)
    take = fed_loss < loss
    values, pull = jnp.where(take, fed, values), jnp.where(take, fed_pull, pull)
    return _descend(island.gram, weight, real, values, line, pull, fmt=fmt, shift=shift, sweeps=sweeps)


def _feed_back(factor: Array, weight: Array, line: Line, fmt: Format) -> Array:
    """Codes chosen one input after another, each error made up for by the inputs to come (arXiv:2210.17323).

    Unlike there the line of a group is known before, so it is no worse for being reached late.
    """
    count, n, columns = weight.shape
    size, m = count * n, min(n, BLOCK)

    def block(weight: Array, this: tuple[Array, Array, Line]) -> tuple[Array, Array]:
        start, rows, line = this

        def one(weight: Array, this: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            i, row = this
            # Both quotients are plain. One unit in the last place decides between codes only where two are as
            # near, and the error is taken from the code that was chosen, whichever it is.
            value = fmt.round(weight[i] / line.scale + line.zero)
            error = (weight[i] - weights_of(value, line.scale, line.zero)) / row[i]
            return weight - jnp.where(jnp.arange(m) > i, row, 0)[:, None] * error, (value, error)

        own = lax.dynamic_slice_in_dim(rows, start, m, 1)
        here = lax.dynamic_slice_in_dim(weight, start, m)
        _, (values, errors) = lax.scan(one, here, (jnp.arange(m), own))
        later = jnp.where(jnp.arange(size) >= start + m, rows, 0)
        return weight - across(later.T, errors), values

    lines = jax.tree.map(lambda x: jnp.repeat(x, n // m, axis=0), line)
    starts = jnp.arange(0, size, m)
    _, values = lax.scan(block, weight.reshape(size, columns), (starts, factor.reshape(-1, m, size), lines))
    return values.reshape(weight.shape)


class _Group(NamedTuple):
    """What belongs to one group of an island, or with a leading axis to all of them."""

    rows: Array  # [n, k, n], the group's rows of the island's Gram matrix
    weight: Array  # [n, C]
    real: Array  # [n, 1]
    values: Array  # [n, C]
    line: Line  # of [C]


def _descend(
    gram: Array,
    weight: Array,
    real: Array,
    values: Array,
    line: Line,
    pull: Array,
    *,
    fmt: Format,
    shift: bool,
    sweeps: int,
) -> tuple[Array, Line]:
    """Sweeps over the groups of one island. `pull` is its Gram matrix times its error, `[k, n, C]`."""
    count, n, _ = weight.shape
    size = count * n
    rows = gram.reshape(count, n, count, n)

    def visit(pull: Array, this: tuple[Array, _Group]) -> tuple[Array, tuple[Array, Line]]:
        g, group = this
        own = lax.dynamic_index_in_dim(group.rows, g, 1, keepdims=False)
        before = weights_of(group.values, group.line.scale, group.line.zero)
        values, pulled = _choose(own, group, pull[g], fmt)
        alone = jax.tree.map(lambda x: x[None], (values, group.line, pulled, group.real, own))
        line = jax.tree.map(lambda x: x[0], better_line(*alone, shift=shift)[0])
        moved = jnp.where(group.real, weights_of(values, line.scale, line.zero) - before, 0)
        everywhere = across(group.rows.reshape(-1, size).T, moved)
        return pull - everywhere.reshape(pull.shape), (values, line)

    def sweep(_: Array, state: tuple[Array, Array, Line]) -> tuple[Array, Array, Line]:
        pull, values, line = state
        groups = _Group(rows, weight, real, values, line)
        pull, (values, line) = lax.scan(visit, pull, (jnp.arange(len(weight)), groups))
        return pull, values, line

    return lax.fori_loop(0, sweeps, sweep, (pull, values, line))[1:]


def _choose(gram: Array, group: _Group, pull: Array, fmt: Format) -> tuple[Array, Array]:
    """New code values of a group, and the pull that they leave; block by block where the group is long."""
    n = len(gram)
    if n <= BLOCK:
        return _choose_block(gram, group.values, group.real, pull, group.line, fmt)

    def block(pull: Array, start: Array) -> tuple[Array, Array]:
        def cut(x: Array, axis: int = 0) -> Array:
            return lax.dynamic_slice_in_dim(x, start, BLOCK, axis)

        rows, old = cut(gram), cut(group.values)
        new, _ = _choose_block(cut(rows, 1), old, cut(group.real), cut(pull), group.line, fmt)
        return pull - across(rows.T, (new - old) * group.line.scale), new

    pull, values = lax.scan(block, pull, jnp.arange(0, n, BLOCK))
    return values.reshape(group.values.shape), pull


def _choose_block(
    gram: Array, values: Array, real: Array, pull: Array, line: Line, fmt: Format
) -> tuple[Array, Array]:
    """One weight after another: the code nearest to where the loss, as a function of it alone, is least."""

    def choose(pull: Array, this: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        i, row, value, exists = this
        own = jnp.where(row[i] > 0, row[i], 1)
        # Both quotients are plain: they only propose a code, and `lowers` is asked of that very code.
        wanted = weights_of(value, line.scale, line.zero) + pull[i] / own
        new = fmt.round(wanted / line.scale + line.zero)
        step = (new - value) * line.scale
        lowers = exists & (row[i] > 0) & (step * (step * own - 2 * pull[i]) < 0)
        step = jnp.where(lowers, step, 0)
        return pull - row[:, None] * step, jnp.where(lowers, new, value)

    pull, values = lax.scan(choose, pull, (jnp.arange(len(gram)), gram, values, real))
    return values, pull
