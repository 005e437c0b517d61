"""The scale of a tile: what AbsMax gives, and which scales a file or a server can hold.

A scale is float32, weight units per code unit, and always positive.
"""

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from daq_jax.formats import round_to_dtype
from daq_jax.numerics.arithmetic import SMALLEST_NORMAL, divide


def usable(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scale 1 in place of zero and of scales too small for a normal float32; NaN stays NaN."""
    return jnp.where(scale < SMALLEST_NORMAL, 1.0, scale)


def absmax_scale(tiles: Float[Array, "..."], axes: tuple[int, ...], *, largest: float) -> Float[Array, "..."]:
    """Smallest scale at which no element of a tile saturates: `absmax / largest`, rounded once.

    Args:
        tiles: any shape, float32. Weights, cut into tiles.
        axes: the axes that a tile's elements lie on; they stay with length 1.
        largest: largest value of the format, in code units; 448 for e4m3.

    Returns:
        Float32, weight units per code unit. An all-zero tile gets 1; a tile with NaN or infinity NaN.

    >>> absmax_scale(jnp.array([[2.0, -896.0]]), (1,), largest=448.0)
    Array([[2.]], dtype=float32)
    """
    # A maximum may drop a NaN (XLA's does on CPUs), so NaN travels through it as infinity.
    size = jnp.where(jnp.isfinite(tiles), jnp.abs(tiles), jnp.inf)
    absmax = jnp.max(size, axis=axes, keepdims=True)
    # Behind the barrier `largest` is no constant, whose reciprocal XLA would multiply with.
    scale = divide(absmax, lax.optimization_barrier(jnp.float32(largest)))
    return jnp.where(jnp.isfinite(absmax), usable(scale), jnp.nan)


class Scales(Protocol):
    """Which scales may be stored: a frozen, hashable value, called with scales and giving those to store.

    A plain function of this signature serves as well.
    """

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of each, float32; positive for a positive one, NaN for NaN."""
        ...


@dataclasses.dataclass(frozen=True)
class AnyScale(Scales):
    """Every positive float32 is a scale."""

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        return scale


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Scales):
    """Powers of two only, for servers that would re-quantize other scales: the next one not below.

    A search has nothing to find here: two candidates within an octave give the same scale.
    """

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        bits = lax.bitcast_convert_type(scale, jnp.int32)
        power = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
        power = jnp.where(bits & 0x007FFFFF, power * 2, power)
        return jnp.where(jnp.isfinite(scale), power, jnp.nan)


@dataclasses.dataclass(frozen=True)
class InDtype(Scales):
    """Numbers of a narrower float dtype only, for servers that hold scales in it: the nearest one.

    The nearest, not the next: a base whose scales were rounded so is found on its own grid again.
    """

    dtype: str = "bfloat16"

    def __call__(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale to store in place of `scale`."""
        return usable(round_to_dtype(scale, np.dtype(self.dtype)).astype(jnp.float32))
