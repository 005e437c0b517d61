"""Stage 1 of density-aware quantization: an affine map that puts fine codes where the weights are dense.

The codes of a small float are finest near zero. The weights of a group are densest near some centre, which
need not be zero. This stage makes the centre the zero of the group's affine map, and chooses the scale so
that the largest code reaches the weight that is farthest from the centre. Source: arXiv:2410.12187.

Arrays are `[N, n, C]`: `N` groups of `n` inputs, for each of `C` outputs. A scale and a zero are `[N, C]`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from daq_jax.formats import Format
from daq_jax.numerics.arithmetic import divide
from daq_jax.scales import absmax_scale, usable

Centre = Literal["quantile", "kde", "none"]
CENTRES = ("quantile", "kde", "none")

_TAIL = 0.025  # share of a group beyond each end of its dense region
_PLACES = 64  # at which the density of a group is looked up
_BANDWIDTH = 0.9  # Silverman's rule of thumb: times the deviation, over the fifth root of the count


def align(
    weight: Float[Array, "N n C"],
    real: Bool[Array, "N n 1"],
    fmt: Format,
    centre: Centre | None,
    coverage: float,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
    """Scale and zero of the affine map of each group, from the group's weights alone.

    Args:
        weight: `[N, n, C]` float32, the weights; zero in rows of padding.
        real: `[N, n, 1]`, False in rows of padding.
        fmt: the number format of the codes.
        centre: "quantile" for the middle between the 2.5 % and 97.5 % quantiles; "kde" for the mode of a
            kernel density estimate; "none" for the range around the middle of the quantiles with a zero of 0,
            as in the released program; None for the AbsMax scale and a zero of 0.
        coverage: share of the range to keep, in (0, 1]; below 1 the farthest weights are clipped.

    Returns:
        The scale, in weight units per code unit, always positive and normal, and the zero, in code units. A
        group of equal weights gets a map under which one code is exact.
    """
    if centre is None:
        scale = absmax_scale(weight, (1,), largest=fmt.largest)[:, 0]
        return usable(scale * coverage), jnp.zeros_like(scale)
    middle = mode(weight, real) if centre == "kde" else quantile_centre(weight, real)
    reach = jnp.max(jnp.where(real, jnp.abs(weight - middle[:, None]), 0), axis=1)
    scale = usable(divide(reach * coverage, lax.optimization_barrier(jnp.float32(fmt.largest))))
    zero = jnp.zeros_like(scale) if centre == "none" else -divide(middle, scale)
    # A group of equal weights has no reach. Its scale becomes the weight itself, or 1, and one code is exact.
    flat = reach == 0
    size = usable(jnp.abs(middle))
    return jnp.where(flat, size, scale), jnp.where(flat, -jnp.sign(middle), zero)


def quantile_centre(weight: Float[Array, "N n C"], real: Bool[Array, "N n 1"]) -> Float[Array, "N C"]:
    """The middle between the 2.5 % and the 97.5 % quantile of each group; quantiles interpolate linearly."""
    ordered = jnp.sort(jnp.where(real, weight, jnp.inf), axis=1)
    last = jnp.sum(real, axis=1, keepdims=True).astype(jnp.float32) - 1

    def at(share: float) -> Array:
        place = share * last
        low = jnp.floor(place)
        below, above = (
            jnp.take_along_axis(ordered, i.astype(jnp.int32), axis=1)[:, 0]
            for i in (low, jnp.minimum(low + 1, last))
        )
        return below + (place - low)[:, 0] * (above - below)

    return (at(_TAIL) + at(1 - _TAIL)) / 2


def mode(weight: Float[Array, "N n C"], real: Bool[Array, "N n 1"]) -> Float[Array, "N C"]:
    """The mode of each group: of 64 places over its range, the one with the largest kernel density estimate.

    The kernel is Gaussian, with the bandwidth of Silverman's rule.
    """
    count = jnp.sum(real, axis=1).astype(jnp.float32)
    mean = jnp.sum(weight, axis=1) / count
    variance = jnp.sum(jnp.where(real, weight - mean[:, None], 0) ** 2, axis=1) / count
    width = usable(_BANDWIDTH * jnp.sqrt(variance) / count**0.2)
    low = jnp.min(jnp.where(real, weight, jnp.inf), axis=1)
    high = jnp.max(jnp.where(real, weight, -jnp.inf), axis=1)

    def density(place: Array) -> Array:
        distance = (weight - place[:, None]) / width[:, None]
        return jnp.sum(jnp.where(real, jnp.exp(-0.5 * distance**2), 0), axis=1)

    def denser(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        place = low + share * (high - low)
        trial = density(place), place
        return jax.tree.map(lambda a, b: jnp.where(trial[0] > best[0], a, b), trial, best), None

    start = jnp.full_like(low, -1), low
    (_, place), _ = lax.scan(denser, start, jnp.linspace(0, 1, _PLACES, dtype=jnp.float32))
    return place
