"""The weights of a layer in groups, their affine maps, and the loss of the layer's output.

A layer computes `y = W' x`. An error `e` of the weights of one output and one group of inputs changes the
group's part of that output by `e' x`. The loss is the mean square of `e' x` over the calibration data. It is
`e' G e`, where `G = mean(x x')` is the Gram matrix of the group's inputs, so no activation has to be kept.

Arrays are `[N, n, C]`: `N` groups of `n` inputs, for each of `C` outputs. A code value stands for the weight
`(value - zero) * scale`: an affine map with one scale and one zero, `[N, C]`, for each group and output.
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


class AffineMap(NamedTuple):
    """How the code values of each group become weights: `(value - zero) * scale`.

    Attributes:
        scale: `[N, C]` float32, weight units per code unit.
        zero: `[N, C]` float32, the code value that stands for weight 0, in code units.
    """

    scale: Array
    zero: Array

    def weights(self, values: Float[Array, "N n C"]) -> Float[Array, "N n C"]:
        """`[N, n, C]` float32: the weights that code values stand for; see `formats.weights_of`."""
        return weights_of(values, self.scale[:, None], self.zero[:, None])

    def replaced(self, where: Bool[Array, "N C"], other: "AffineMap") -> "AffineMap":
        """The maps of `other` where `where` is true, and these maps elsewhere."""
        return AffineMap(*(jnp.where(where, b, a) for a, b in zip(self, other, strict=True)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "real", "gram"],
    meta_fields=["format", "shift"],
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """The weights of a layer, cut into groups of inputs.

    Attributes:
        weight: `[N, n, C]` float32, the weights; zero in rows of padding.
        real: `[N, n, 1]` bool, False in rows of padding.
        gram: `[N, n, n]` float32, Gram matrix of each group's inputs; zero in rows and columns of padding.
        format: the number format of the codes.
        shift: whether a group may have a zero other than 0.
    """

    weight: Array
    real: Array
    gram: Array
    format: Format
    shift: bool

    def nearest(self, affine: AffineMap) -> Float[Array, "N n C"]:
        """`[N, n, C]` float32: the value of the code nearest to each weight."""
        return self.format.round(divide(self.weight, affine.scale[:, None]) + affine.zero[:, None])

    def error(self, values: Float[Array, "N n C"], affine: AffineMap) -> Float[Array, "N n C"]:
        """`[N, n, C]` float32: each weight minus the weight that its code stands for; zero in padding."""
        return jnp.where(self.real, self.weight - affine.weights(values), 0)

    def loss(self, values: Float[Array, "N n C"], affine: AffineMap) -> Float[Array, "N C"]:
        """`[N, C]` float32: mean square of what the errors of a group change in its part of an output."""
        error = self.error(values, affine)
        return jnp.sum(error * across(self.gram, error), axis=1)


Loss = Callable[[Array, AffineMap], Array]  # (values [N, n, C], affine) -> [N, C], lower is better


def across(gram: Float[Array, "*N m n"], x: Float[Array, "*N n C"]) -> Float[Array, "*N m C"]:
    """`gram @ x` in full float32; on a GPU the default precision keeps 10 bits of each factor."""
    return jnp.matmul(gram, x, precision=lax.Precision.HIGHEST)


def better_map(
    values: Float[Array, "N n C"],
    affine: AffineMap,
    gradient: Float[Array, "N n C"],
    real: Bool[Array, "N n 1"],
    gram: Float[Array, "N n n"],
    *,
    shift: bool,
) -> tuple[AffineMap, Float[Array, "N C"]]:
    """The affine maps of least loss for fixed codes, and by how much each lowers the loss.

    The weights are linear in `scale` and in `-zero * scale`, so the best pair solves two linear equations.

    Args:
        values: `[N, n, C]` float32, code values.
        affine: the affine maps to improve on.
        gradient: `[N, n, C]` float32, the Gram matrix of the loss times the error of these values and maps:
            half the gradient of the loss with respect to the error. The loss may take in other groups too.
        real: `[N, n, 1]`, False in rows of padding.
        gram: `[N, n, n]` float32, Gram matrix of each group.
        shift: whether the zero may move.

    Returns:
        The better maps, and `[N, C]` float32, the loss of `affine` minus theirs. A group keeps its map, and
        has 0, where no scale above 0 lowers the loss.
    """
    ones = jnp.where(real, 1.0, 0.0)
    values = values * ones
    of_values, of_ones = across(gram, values), across(gram, ones)
    vv, wanted = jnp.sum(values * of_values, axis=1), jnp.sum(values * gradient, axis=1)
    if shift:
        vo, oo = jnp.sum(values * of_ones, axis=1), jnp.sum(of_ones, axis=1)
        wanted_one = jnp.sum(jnp.where(real, gradient, 0), axis=1)
        determinant = vv * oo - vo * vo
        sound = determinant > 1e-5 * vv * oo  # else the values are all but constant
        safe = jnp.where(sound, determinant, 1)
        step = jnp.where(sound, (wanted * oo - wanted_one * vo) / safe, 0)
        offset_step = jnp.where(sound, (wanted_one * vv - wanted * vo) / safe, 0)
        gain = step * wanted + offset_step * wanted_one
    else:
        step = jnp.where(vv > 0, wanted / jnp.where(vv > 0, vv, 1), 0)
        offset_step, gain = jnp.zeros_like(step), step * wanted
    scale = affine.scale + step
    take = (gain > 0) & (scale > 0) & (usable(scale) == scale)
    offset = -affine.zero * affine.scale + offset_step
    zero = jnp.where(take, -offset / jnp.where(take, scale, 1), affine.zero)
    new = AffineMap(jnp.where(take, scale, affine.scale), zero)
    return new, jnp.where(take, gain, 0)
