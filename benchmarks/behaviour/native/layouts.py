"""The grids that bases ship on, as parts of a recipe, and the rules by which other tools scale a group.

Every grid is a value of the library's own types; what only this study needs is a value of a local class.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

import daq_jax as daq
from daq_jax.formats import Format
from daq_jax.scales import InDtype, Scales, usable
from daq_jax.tilings import Tiling


@dataclasses.dataclass(frozen=True)
class InE4M3(Scales):
    """Scales of NVFP4: an e4m3 number times one float32 per tensor, here always `unit`.

    A power of two as `unit` changes no result as long as no scale leaves the normal range of e4m3: with the
    default, groups with a largest weight between 1e-4 and 2.6.
    """

    unit: float = 2.0**-10

    def __call__(self, scale: Array) -> Array:
        """The scale to store in place of each: the nearest."""
        return usable(daq.fp8_e4m3fn.round(scale / self.unit) * self.unit)


@dataclasses.dataclass(frozen=True)
class FromLargest(Scales):
    """A power of two by the largest weight of the tile: the exponent of the largest weight, less that of
    the largest code.

    A tile whose largest weight lies between two powers of two then clips, in place of a coarser scale.

    Attributes:
        largest: of the format, in code units.
        up_from: a largest weight whose mantissa is this or more counts as the next power of two; 2 for none.
    """

    largest: float
    up_from: float = 2.0

    def __call__(self, scale: Array) -> Array:
        """The scale to store, given `absmax / largest`."""
        bits = lax.bitcast_convert_type(scale * self.largest, jnp.int32)
        mantissa = (bits & 0x7FFFFF).astype(jnp.float32) * 2.0**-23 + 1
        power = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
        power = jnp.where(mantissa >= self.up_from, 2 * power, power)
        top = lax.bitcast_convert_type(jnp.float32(self.largest), jnp.int32) & 0x7F800000
        made = usable(power / lax.bitcast_convert_type(top, jnp.float32))
        return jnp.where(jnp.isfinite(scale), made, jnp.nan)


@dataclasses.dataclass(frozen=True)
class HalfStepMore(Scales):
    """Scales of compressed-tensors' symmetric INT4: `absmax / 7.5` in bfloat16, for codes -8 to 7.

    The scale that comes in is `absmax / 8`, since 8 is the largest magnitude of such codes.
    """

    def __call__(self, scale: Array) -> Array:
        """The scale to store in place of each."""
        return InDtype("bfloat16")(scale * (8 / 7.5))


class Layout(NamedTuple):
    """Format, tiling and scales of a grid."""

    format: Format
    tiling: Tiling
    scales: Scales

    def of(self, recipe: daq.Recipe) -> daq.Recipe:
        """A recipe on this grid."""
        return recipe.replace(format=self.format, tiling=self.tiling, scales=self.scales)


LAYOUTS: dict[str, Layout] = {
    "fp8-block": Layout(daq.fp8_e4m3fn, daq.Block(128, 128), daq.AnyScale()),
    "fp8-ue8m0": Layout(daq.fp8_e4m3fn, daq.Block(128, 128), daq.PowerOfTwo()),
    "fp8-channel": Layout(daq.fp8_e4m3fn, daq.Channel(), daq.AnyScale()),
    "int8-channel": Layout(daq.int8, daq.Channel(), daq.AnyScale()),
    "mxfp4": Layout(daq.fp4_e2m1, daq.Group(32), daq.PowerOfTwo()),
    "nvfp4": Layout(daq.fp4_e2m1, daq.Group(16), InE4M3()),
    "int4": Layout(daq.int4, daq.Group(32), InDtype("bfloat16")),
}
BF16 = "bf16"  # the base that is on none of these grids
KINDS = (*LAYOUTS, BF16)
INT4_OF_8 = daq.Codebook("int4 from -8", tuple(float(i) for i in range(-8, 8)))
