"""The weights of a layer in groups, and what an error of theirs does to the layer's output.

A layer computes `y = W' x`. An error `e` of the weights of one output and one group of inputs changes its
partial output by `e' x`, whose mean square over the calibration data is `e' G e`, with `G = mean(x x')` the
Gram matrix of the group's inputs. So no activation has to be kept.

Arrays are `[N, n, C]`: `N` groups of `n` inputs, for each of `C` outputs. A weight stands for
`(value - zero) * scale`, with one scale and one zero, `[N, C]`, for each group and output.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from daq_jax.formats import Format, weights_of
from daq_jax.numerics.arithmetic import divide
from daq_jax.scales import usable


class Line(NamedTuple):
    """Where the code line of each group lies. Both `[N, C]` float32."""

    scale: Array
    zero: Array

    def weights(self, values: Float[Array, "N n C"]) -> Float[Array, "N n C"]:
        """The weights that code values stand for."""
        return weights_of(values, self.scale[:, None], self.zero[:, None])

    def replaced(self, where: Bool[Array, "N C"], other: "Line") -> "Line":
        """Another line for some of the groups."""
        return Line(*(jnp.where(where, b, a) for a, b in zip(self, other, strict=True)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "real", "gram"],
    meta_fields=["format", "shift"],
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """A layer in groups.

    Attributes:
        weight: `[N, n, C]` float32; padding is zero.
        real: `[N, n, 1]`, False where a row is padding.
        gram: `[N, n, n]` float32, Gram matrix of each group's inputs; zero where there is padding.
        format: the number format of the codes.
        shift: whether a group may have a zero other than 0.
    """

    weight: Array
    real: Array
    gram: Array
    format: Format
    shift: bool

    def nearest(self, line: Line) -> Float[Array, "N n C"]:
        """The value of the code nearest to each weight."""
        return self.format.round(divide(self.weight, line.scale[:, None]) + line.zero[:, None])

    def error(self, values: Float[Array, "N n C"], line: Line) -> Float[Array, "N n C"]:
        """What is left of the weights; zero in the padding."""
        return jnp.where(self.real, self.weight - line.weights(values), 0)

    def loss(self, values: Float[Array, "N n C"], line: Line) -> Float[Array, "N C"]:
        """Mean squared difference of each group's partial output."""
        error = self.error(values, line)
        return jnp.sum(error * across(self.gram, error), axis=1)


Loss = Callable[[Array, Line], Array]  # (values [N, n, C], line) -> [N, C], lower is better


def across(gram: Float[Array, "*N m n"], x: Float[Array, "*N n C"]) -> Float[Array, "*N m C"]:
    """`gram @ x`, in full float32: on a GPU the default would keep 10 bits of an error's effect."""
    return jnp.matmul(gram, x, precision=lax.Precision.HIGHEST)


def better_line(
    values: Float[Array, "N n C"],
    line: Line,
    pull: Float[Array, "N n C"],
    real: Bool[Array, "N n 1"],
    gram: Float[Array, "N n n"],
    *,
    shift: bool,
) -> tuple[Line, Float[Array, "N C"]]:
    """The line of least loss for fixed codes, and by how much it lowers the loss.

    The weights are linear in `scale` and in `-zero * scale`, so the best pair solves two equations.

    Args:
        values: of the codes.
        line: the present line.
        pull: `[N, n, C]`: the Gram matrix times the present error, of whatever the loss takes in.
        real: False where a row is padding.
        gram: Gram matrix of each group.
        shift: whether the zero may move.
    """
    ones = jnp.where(real, 1.0, 0.0)
    values = values * ones
    of_values, of_ones = across(gram, values), across(gram, ones)
    vv, wanted = jnp.sum(values * of_values, axis=1), jnp.sum(values * pull, axis=1)
    if shift:
        vo, oo = jnp.sum(values * of_ones, axis=1), jnp.sum(of_ones, axis=1)
        wanted_one = jnp.sum(jnp.where(real, pull, 0), axis=1)
        determinant = vv * oo - vo * vo
        sound = determinant > 1e-5 * vv * oo  # else the values are all but constant
        safe = jnp.where(sound, determinant, 1)
        step = jnp.where(sound, (wanted * oo - wanted_one * vo) / safe, 0)
        offset_step = jnp.where(sound, (wanted_one * vv - wanted * vo) / safe, 0)
        gain = step * wanted + offset_step * wanted_one
    else:
        step = jnp.where(vv > 0, wanted / jnp.where(vv > 0, vv, 1), 0)
        offset_step, gain = jnp.zeros_like(step), step * wanted
    scale = line.scale + step
    take = (gain > 0) & (scale > 0) & (usable(scale) == scale)
    offset = -line.zero * line.scale + offset_step
    zero = jnp.where(take, -offset / jnp.where(take, scale, 1), line.zero)
    new = Line(jnp.where(take, scale, line.scale), zero)
    return new, jnp.where(take, gain, 0)
