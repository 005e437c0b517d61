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
from jaxtyping import Array

from daq_jax.formats import Format
from daq_jax.groups import Groups, Line, across, better_line

BLOCK = 128  # inputs whose errors are kept up to date one by one; beyond, by a product once a block


def round_by_output(groups: Groups, row_gram: Array | None, line: Line, *, sweeps: int) -> tuple[Array, Line]:
    """Code values and lines after some sweeps over all weights, from the nearest codes.

    Args:
        groups: the layer; its groups have at most 128 inputs, or a multiple of 128.
        row_gram: `[N n, N n]`, Gram matrix of all inputs, for the loss of the whole row; None for each group
            by itself.
        line: of each group.
        sweeps: visits to each weight.
    """
    descend = functools.partial(_descend, fmt=groups.format, shift=groups.shift, sweeps=sweeps)
    values = groups.nearest(line)
    count, n = groups.weight.shape[:2]
    if row_gram is not None:
        rows = row_gram.reshape(count, n, count, n)
        return descend(rows, groups.weight, groups.real, values, line)
    islands = groups.gram[:, :, None], groups.weight, groups.real, values, line
    alone = jax.vmap(descend)(*jax.tree.map(lambda x: x[:, None], islands))
    return jax.tree.map(lambda x: x[:, 0], alone)


class _Group(NamedTuple):
    """What belongs to one group of an island, or with a leading axis to all of them."""

    rows: Array  # [n, k, n], the group's rows of the island's Gram matrix
    weight: Array  # [n, C]
    real: Array  # [n, 1]
    values: Array  # [n, C]
    line: Line  # of [C]


def _descend(
    rows: Array,
    weight: Array,
    real: Array,
    values: Array,
    line: Line,
    *,
    fmt: Format,
    shift: bool,
    sweeps: int,
) -> tuple[Array, Line]:
    """Sweeps over the groups of one island. `pull` is its Gram matrix times its error, `[k, n, C]`."""
    size = weight.shape[0] * weight.shape[1]

    def visit(pull: Array, this: tuple[Array, _Group]) -> tuple[Array, tuple[Array, Line]]:
        g, group = this
        own = lax.dynamic_index_in_dim(group.rows, g, 1, keepdims=False)
        before = _weights(group.values, group.line)
        values, pulled = _choose(own, group, pull[g], fmt)
        alone = jax.tree.map(lambda x: x[None], (values, group.line, pulled, group.real, own))
        line = jax.tree.map(lambda x: x[0], better_line(*alone, shift)[0])
        moved = jnp.where(group.real, _weights(values, line) - before, 0)
        everywhere = across(group.rows.reshape(-1, size).T, moved)
        return pull - everywhere.reshape(pull.shape), (values, line)

    def sweep(_: Array, state: tuple[Array, Array, Line]) -> tuple[Array, Array, Line]:
        pull, values, line = state
        groups = _Group(rows, weight, real, values, line)
        pull, (values, line) = lax.scan(visit, pull, (jnp.arange(len(weight)), groups))
        return pull, values, line

    error = jnp.where(real, weight - line.weights(values), 0)
    pull = across(rows.reshape(size, size), error.reshape(size, -1)).reshape(error.shape)
    return lax.fori_loop(0, sweeps, sweep, (pull, values, line))[1:]


def _weights(values: Array, line: Line) -> Array:
    return (values - line.zero) * line.scale


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
        wanted = _weights(value, line) + pull[i] / own
        new = fmt.round(wanted / line.scale + line.zero)
        step = (new - value) * line.scale
        lowers = exists & (row[i] > 0) & (step * (step * own - 2 * pull[i]) < 0)
        step = jnp.where(lowers, step, 0)
        return pull - row[:, None] * step, jnp.where(lowers, new, value)

    pull, values = lax.scan(choose, pull, (jnp.arange(len(gram)), gram, values, real))
    return values, pull
