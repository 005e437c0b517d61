"""Rounding by the output: each code is chosen in view of the errors that the other codes already make.

The nearest codes have the least error of the weights. They need not have the least error of the output, where
errors of correlated inputs add up or cancel. This module descends on the loss of the output, one weight at a
time. Each weight takes the code of least loss, given the codes of all other weights. After the weights of a
group, its scale and zero take the values of least loss for its codes. Weights are visited in the order of the
inputs, several times over. No move raises the loss, so the result has at most the loss of the start.

The loss is a sum over loss blocks. Errors within one block may make up for one another: a block is one group,
or all groups of an output. Arrays are `[k, n, C]`: `k` groups of a block, `n` inputs of a group, `C` outputs.
`gradient` is a block's Gram matrix times its error: half the gradient of the loss with respect to the error.

Source: arXiv:2309.01885 for coordinate descent; the steps of scale and zero between are our own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.density.groups import AffineMap, Groups, across, better_map
from daq_jax.formats import Format, weights_of
from daq_jax.numerics.linalg import inverse_factor

# Rows of a row block. Within one, the gradient is brought up to date after each weight; outside, by one
# product after the whole row block.
ROW_BLOCK = 128


class LossBlocks(NamedTuple):
    """The blocks that the loss is a sum over.

    Attributes:
        gram: `[L, k n, k n]` float32, Gram matrix of the inputs of each of `L` blocks.
        factor: `[L, k n, k n]` float32, upper triangular `U` with `U' U` the inverse of `gram`. Its rows say
            how the inputs after one best make up for an error of that one. NaN where `gram` has no inverse.
    """

    gram: Array
    factor: Array

    @classmethod
    def of(cls, gram: Float[Array, "L S S"]) -> "LossBlocks":
        """The blocks with these Gram matrices, which are symmetric and have a positive diagonal."""
        # Backwards, lower is upper: of `G = V V'` with an upper `V`, this is `V^-1`.
        return cls(gram, inverse_factor(gram[:, ::-1, ::-1])[:, ::-1, ::-1])


def round_by_output(
    groups: Groups, blocks: LossBlocks, affine: AffineMap, *, sweeps: int
) -> tuple[Array, AffineMap]:
    """Code values `[N, n, C]` and affine maps `[N, C]` after some sweeps over all weights.

    Args:
        groups: the layer; a group has at most 128 inputs, or a multiple of 128.
        blocks: `L` blocks of `k` groups each, in the order of the groups, `L k = N`.
        affine: the affine map of each group to start from.
        sweeps: how often each weight is visited after its first code was chosen.
    """
    count = len(blocks.gram)

    def split(x: Array) -> Array:
        return x.reshape(count, -1, *x.shape[1:])

    run = functools.partial(_round_loss_block, fmt=groups.format, shift=groups.shift, sweeps=sweeps)
    parts = jax.tree.map(split, (groups.weight, groups.real, groups.nearest(affine), affine))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(run)(blocks, *parts))


def _round_loss_block(
    block: LossBlocks,
    weight: Array,
    real: Array,
    values: Array,
    affine: AffineMap,
    *,
    fmt: Format,
    shift: bool,
    sweeps: int,
) -> tuple[Array, AffineMap]:
    """Sweeps over one loss block, from the better of the nearest codes and those with error feedback."""
    size = weight.shape[0] * weight.shape[1]

    def gradient_of(values: Array) -> tuple[Array, Array]:
        """Half the gradient, `[k, n, C]`, and the loss, `[C]`, of the block with these code values."""
        error = jnp.where(real, weight - affine.weights(values), 0)
        gradient = across(block.gram, error.reshape(size, -1)).reshape(error.shape)
        return gradient, jnp.sum(error * gradient, axis=(0, 1))

    fed = _feed_back(block.factor, weight, affine, fmt)
    (gradient, loss), (fed_gradient, fed_loss) = gradient_of(values), gradient_of(fed)
    take = fed_loss < loss
    values, gradient = jnp.where(take, fed, values), jnp.where(take, fed_gradient, gradient)
    return _descend(block.gram, weight, real, values, affine, gradient, fmt=fmt, shift=shift, sweeps=sweeps)


def _feed_back(factor: Array, weight: Array, affine: AffineMap, fmt: Format) -> Array:
    """`[k, n, C]`: code values chosen one input after another, each error passed on to the inputs to come.

    As in arXiv:2210.17323, but the affine map of a group is chosen before any error is passed on to it.
    """
    count, n, columns = weight.shape
    size, m = count * n, min(n, ROW_BLOCK)

    def row_block(weight: Array, this: tuple[Array, Array, AffineMap]) -> tuple[Array, Array]:
        start, rows, affine = this

        def one(weight: Array, this: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            i, row = this
            # Both quotients are plain. One unit in the last place decides between codes only where two are as
            # near, and the error is taken from the code that was chosen, whichever it is.
            value = fmt.round(weight[i] / affine.scale + affine.zero)
            error = (weight[i] - weights_of(value, affine.scale, affine.zero)) / row[i]
            return weight - jnp.where(jnp.arange(m) > i, row, 0)[:, None] * error, (value, error)

        own = lax.dynamic_slice_in_dim(rows, start, m, 1)
        here = lax.dynamic_slice_in_dim(weight, start, m)
        _, (values, errors) = lax.scan(one, here, (jnp.arange(m), own))
        later = jnp.where(jnp.arange(size) >= start + m, rows, 0)
        return weight - across(later.T, errors), values

    affines = jax.tree.map(lambda x: jnp.repeat(x, n // m, axis=0), affine)
    starts = jnp.arange(0, size, m)
    _, values = lax.scan(
        row_block, weight.reshape(size, columns), (starts, factor.reshape(-1, m, size), affines)
    )
    return values.reshape(weight.shape)


class _Group(NamedTuple):
    """The arrays of one group of a loss block; with a leading axis, those of all its groups."""

    rows: Array  # [n, k, n], the group's rows of the block's Gram matrix
    weight: Array  # [n, C]
    real: Array  # [n, 1]
    values: Array  # [n, C]
    affine: AffineMap  # of [C]


def _descend(
    gram: Array,
    weight: Array,
    real: Array,
    values: Array,
    affine: AffineMap,
    gradient: Array,
    *,
    fmt: Format,
    shift: bool,
    sweeps: int,
) -> tuple[Array, AffineMap]:
    """Code values and affine maps after some sweeps over the groups of one loss block.

    `gradient` is that of the block at the start, `[k, n, C]`; each move brings it up to date.
    """
    count, n, _ = weight.shape
    size = count * n
    rows = gram.reshape(count, n, count, n)

    def visit(gradient: Array, this: tuple[Array, _Group]) -> tuple[Array, tuple[Array, AffineMap]]:
        g, group = this
        own = lax.dynamic_index_in_dim(group.rows, g, 1, keepdims=False)
        before = weights_of(group.values, group.affine.scale, group.affine.zero)
        values, gradient_left = _choose(own, group, gradient[g], fmt)
        alone = jax.tree.map(lambda x: x[None], (values, group.affine, gradient_left, group.real, own))
        affine = jax.tree.map(lambda x: x[0], better_map(*alone, shift=shift)[0])
        moved = jnp.where(group.real, weights_of(values, affine.scale, affine.zero) - before, 0)
        everywhere = across(group.rows.reshape(-1, size).T, moved)
        return gradient - everywhere.reshape(gradient.shape), (values, affine)

    def sweep(_: Array | int, state: tuple[Array, Array, AffineMap]) -> tuple[Array, Array, AffineMap]:
        gradient, values, affine = state
        groups = _Group(rows, weight, real, values, affine)
        gradient, (values, affine) = lax.scan(visit, gradient, (jnp.arange(len(weight)), groups))
        return gradient, values, affine

    return lax.fori_loop(0, sweeps, sweep, (gradient, values, affine))[1:]


def _choose(gram: Array, group: _Group, gradient: Array, fmt: Format) -> tuple[Array, Array]:
    """New code values of a group, `[n, C]`, and the gradient with them, `[n, C]`.

    `gram` is the Gram matrix of the group, `gradient` its part of the block's. A long group goes row block by
    row block.
    """
    n = len(gram)
    if n <= ROW_BLOCK:
        return _choose_block(gram, group.values, group.real, gradient, group.affine, fmt)

    def row_block(gradient: Array, start: Array) -> tuple[Array, Array]:
        def cut(x: Array, axis: int = 0) -> Array:
            return lax.dynamic_slice_in_dim(x, start, ROW_BLOCK, axis)

        rows, old = cut(gram), cut(group.values)
        new, _ = _choose_block(cut(rows, 1), old, cut(group.real), cut(gradient), group.affine, fmt)
        return gradient - across(rows.T, (new - old) * group.affine.scale), new

    gradient, values = lax.scan(row_block, gradient, jnp.arange(0, n, ROW_BLOCK))
    return values.reshape(group.values.shape), gradient


def _choose_block(
    gram: Array, values: Array, real: Array, gradient: Array, affine: AffineMap, fmt: Format
) -> tuple[Array, Array]:
    """New code values of a row block, and the gradient with them.

    The loss as a function of one weight alone is a parabola. The weight takes the code nearest to its lowest
    point, if that code lowers the loss.
    """

    def choose(gradient: Array, this: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        i, row, value, exists = this
        own = jnp.where(row[i] > 0, row[i], 1)
        # Both quotients are plain: they only propose a code, and `lowers` is asked of that very code.
        wanted = weights_of(value, affine.scale, affine.zero) + gradient[i] / own
        new = fmt.round(wanted / affine.scale + affine.zero)
        step = (new - value) * affine.scale
        lowers = exists & (row[i] > 0) & (step * (step * own - 2 * gradient[i]) < 0)
        step = jnp.where(lowers, step, 0)
        return gradient - row[:, None] * step, jnp.where(lowers, new, value)

    gradient, values = lax.scan(choose, gradient, (jnp.arange(len(gram)), gram, values, real))
    return values, gradient
