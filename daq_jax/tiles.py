"""A pair of weights, cut into tiles: what searches and roundings work on.

Arrays keep two axes for the elements of a tile, its rows and its columns, wherever they lie; every other axis
runs over tiles. A scale has length 1 on those two axes, so that it broadcasts.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.formats import Format, weights_of
from daq_jax.numerics.arithmetic import divide, divide_short
from daq_jax.numerics.machine import Machine
from daq_jax.numerics.reductions import ANY, LEAST, MOST, SUM, Reduction, reduced, total


@dataclasses.dataclass(frozen=True)
class Within:
    """Reductions over each tile of a cut weight, whose results have the shape of a scale.

    Attributes:
        axes: positions of the axes of a tile's rows and of a tile's columns.
        lines: how many tiles of the cut, side by side along the axis before the last, stand for one; see
            `daq_jax.tilings.TileView.lines`. All of them get the result.
    """

    axes: tuple[int, int]
    lines: int = 1

    def total(self, x: Array) -> Array:
        """The sum, in short runs: see `daq_jax.numerics.reductions.total`."""
        return self.across(total(x, self.axes), SUM)

    def most(self, x: Array) -> Array:
        """The maximum."""
        return self.across(reduced(x, self.axes, MOST), MOST)

    def least(self, x: Array) -> Array:
        """The minimum."""
        return self.across(reduced(x, self.axes, LEAST), LEAST)

    def any(self, x: Array) -> Array:
        """Whether any of some bools is true."""
        return self.across(reduced(x, self.axes, ANY), ANY)

    def across(self, x: Array, reduction: Reduction) -> Array:
        """What was reduced over each line, reduced over the lines of a tile."""
        if self.lines == 1:
            return x
        axis, n = x.ndim - 2, x.shape[-2]
        missing = -n % self.lines
        x = jnp.pad(
            x, [(0, missing if a == axis else 0) for a in range(x.ndim)], constant_values=reduction.nothing
        )
        x = reduction.of_axes(x.reshape(*x.shape[:axis], -1, self.lines, 1), axis + 1)
        x = lax.slice_in_dim(jnp.repeat(x, self.lines, axis), 0, n, axis=axis)
        return lax.optimization_barrier(x)  # else a TPU's compiler writes it out at the weight's size


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stored_base", "stored_tuned", "noise"],
    meta_fields=["axes", "grid", "format", "machine", "lines"],
)
@dataclasses.dataclass(frozen=True)
class Tiles:
    """A pair of weights, cut into tiles.

    Attributes:
        stored_base: weights before tuning, in the dtype they came in.
        stored_tuned: weights after tuning, of the same shape, in the dtype they came in.
        noise: for a rounding that draws, a uniform number in [0, 1) for each element; None for others.
        axes: positions of the axes of a tile's rows and of a tile's columns.
        grid: positions of the axes that run over rows of tiles and over columns of tiles.
        format: the number format of the codes.
        machine: what a program may do with the weights where they lie.
        lines: how many tiles of the cut stand for one; see `Within`. More than 1 only where search, metric
            and rounding all say that they know of it (`in_lines`).
    """

    stored_base: Any  # an array; its shape and dtype where no more is asked for
    stored_tuned: Any
    noise: Array | None
    axes: tuple[int, int]
    grid: tuple[int, int]
    format: Format
    machine: Machine = Machine()
    lines: int = 1

    @property
    def within(self) -> Within:
        """Reductions over each tile."""
        return Within(self.axes, self.lines)

    @property
    def base(self) -> Array:
        """Weights before tuning, float32."""
        return self.stored_base.astype(jnp.float32)

    @property
    def tuned(self) -> Array:
        """Weights after tuning, float32."""
        return self.stored_tuned.astype(jnp.float32)

    def over(self, scale: Array) -> Array:
        """The tuned weights in code units."""
        short = self.machine.scores_at_once and self.stored_tuned.dtype == jnp.bfloat16
        return (divide_short if short else divide)(self.tuned, scale)

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
        return weights_of(values, scale) - self.base

    def total(self, x: Array) -> Array:
        """The sum over each tile, in the shape of a scale."""
        if self.machine.scores_at_once:
            # An accelerator sums in short runs by itself; XLA's GPU code was half as fast for unsorted axes.
            return self.within.across(jnp.sum(x, tuple(sorted(self.axes)), keepdims=True), SUM)
        return self.within.total(x)

    def flat(self, x: Array) -> Array:
        """An array of the tiles' shape as `[T, K]`."""
        moved = jnp.moveaxis(x, self.axes, (-2, -1))
        return moved.reshape(-1, math.prod(moved.shape[-2:]))

    def per_tile(self, x: Array) -> Array:
        """`[T]` in the shape of a scale."""
        return x.reshape([1 if i in self.axes else n for i, n in enumerate(self.shape)])

    def per_matrix(self, x: Array) -> Array:
        """An array of `B` numbers, one for each matrix, in a shape that broadcasts over the tiles."""
        return x.reshape([1 if i in self.axes + self.grid else n for i, n in enumerate(self.shape)])

    def as_matrix(self, x: Array) -> Array:
        """An array of the tiles' shape as `[B, R, C]`, padding included; for tiles that were not moved."""
        return x.transpose(self._matrix_order).reshape(-1, *self._padded)

    def from_matrix(self, x: Array) -> Array:
        """The inverse of `as_matrix`."""
        order = self._matrix_order
        x = x.reshape([self.shape[i] for i in order])
        return x.transpose([order.index(i) for i in range(len(order))])

    @property
    def _matrix_order(self) -> list[int]:
        """Axes in the order batch, rows, columns."""
        batch = [i for i in range(len(self.shape)) if i not in self.axes + self.grid]
        return [*batch, self.grid[0], self.axes[0], self.grid[1], self.axes[1]]

    @property
    def _padded(self) -> tuple[int, int]:
        rows, columns = (self.shape[g] * self.shape[t] for g, t in zip(self.grid, self.axes, strict=True))
        return rows, columns
