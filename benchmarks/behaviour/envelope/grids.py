"""The grids that bases ship on, on whole matrices `[R, C]` of `R` inputs and `C` outputs.

A `Grid` is a number format, a tile `(r, c)` that shares a scale, and a rule for the scale. Codes are kept as
their values in code units, float32; `weight = value * scale`. Matrices must divide into whole tiles.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Grid:
    """A number format and who shares a scale.

    Attributes:
        name: for tables.
        mantissa: bits; a whole-number format has 0 and `least` 0 (see `step`).
        least: exponent of the smallest normal number.
        largest: largest value.
        tile: rows and columns, 0 for all.
        rule: "any", "pow2", "nvfp4" or "bf16" scales.
        integer: whole numbers in place of floats.
    """

    name: str
    mantissa: int
    least: int
    largest: float
    tile: tuple[int, int]
    rule: str = "any"
    integer: bool = False

    def power(self, x: Array) -> Array:
        """The step between codes just above magnitude `|x|`."""
        if self.integer:
            return jnp.ones_like(x)
        bits = lax.bitcast_convert_type(jnp.maximum(jnp.abs(x), 2.0**self.least), jnp.int32)
        return lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32) * 2.0**-self.mantissa

    def round(self, x: Array) -> Array:
        """Nearest code, ties to even, clipped."""
        x = jnp.clip(x, -self.largest, self.largest)
        step = self.power(x)
        return jnp.round(x / step) * step

    def up(self, v: Array) -> Array:
        """The next code above the code `v`; itself at the top."""
        # Away from zero the step is that of v; towards zero it is that of a number just below |v|.
        return jnp.minimum(v + self._towards(v, v < 0), self.largest)

    def down(self, v: Array) -> Array:
        """The next code below."""
        return jnp.maximum(v - self._towards(v, v > 0), -self.largest)

    def _towards(self, v: Array, inwards: Array) -> Array:
        return jnp.where(inwards, self.power(v * (1 - 2.0**-10)), self.power(v))

    def floor(self, x: Array) -> Array:
        """The code at or below `x`, clipped."""
        r = self.round(x)
        return jnp.where(r > jnp.clip(x, -self.largest, self.largest), self.down(r), r)

    def dither(self, x: Array, thresholds: Array) -> Array:
        """The code below or above, above in proportion."""
        low = self.floor(x)
        high = self.up(low)
        share = (jnp.clip(x, -self.largest, self.largest) - low) / jnp.where(high > low, high - low, 1)
        return jnp.where(share > thresholds, high, low)

    def tiles(self, w: Array) -> tuple[int, int]:
        """Rows and columns of a tile of this matrix."""
        return self.tile[0] or w.shape[0], self.tile[1] or w.shape[1]

    def cut(self, w: Array) -> Array:
        """`[R/r, r, C/c, c]`."""
        r, c = self.tiles(w)
        return w.reshape(w.shape[0] // r, r, w.shape[1] // c, c)

    def spread(self, scale: Array, w: Array) -> Array:
        """One scale per tile `[R/r, C/c]` as `[R, C]`."""
        r, c = self.tiles(w)
        return jnp.repeat(jnp.repeat(scale, r, 0), c, 1)

    def absmax(self, w: Array, rule: str | None = None) -> Array:
        """Scale per tile by a rule: the grid's, or "ceil", "floor", "1.75" for powers of two."""
        rule = rule or self.rule
        amax = jnp.max(jnp.abs(self.cut(w)), (1, 3))
        amax = jnp.where(amax > 0, amax, 1.0)
        scale = amax / self.largest
        if rule in ("pow2", "ceil"):
            bits = lax.bitcast_convert_type(scale, jnp.int32)
            low = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
            return jnp.where(bits & 0x7FFFFF, 2 * low, low)
        if rule in ("floor", "1.75"):  # 2^(floor log2 amax - exponent of the largest code)
            bits = lax.bitcast_convert_type(amax, jnp.int32)
            if rule == "1.75":
                bits = bits + (1 << 21)  # mantissas from 1.75 carry over
            low = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
            top = lax.bitcast_convert_type(jnp.float32(self.largest), jnp.int32) & 0x7F800000
            return low / lax.bitcast_convert_type(top, jnp.float32)
        if rule == "nvfp4":
            whole = jnp.max(amax) / (self.largest * 448.0)
            eighth = (scale / whole).astype(jnp.float8_e4m3fn).astype(jnp.float32)
            return eighth * whole
        if rule == "bf16":
            return scale.astype(jnp.bfloat16).astype(jnp.float32)
        return scale

    def encode(self, w: Array, scale: Array) -> Array:
        """Values of the nearest codes under a scale per tile."""
        return self.round(w / self.spread(scale, w))


GRIDS = {
    g.name: g
    for g in (
        Grid("fp8-block", 3, -6, 448.0, (128, 128)),
        Grid("fp8-ue8m0", 3, -6, 448.0, (128, 128), "pow2"),
        Grid("fp8-channel", 3, -6, 448.0, (0, 1)),
        Grid("int8-channel", 0, 0, 127.0, (0, 1), integer=True),
        Grid("mxfp4", 1, 0, 6.0, (32, 1), "pow2"),
        Grid("nvfp4", 1, 0, 6.0, (16, 1), "nvfp4"),
        Grid("int4", 0, 0, 7.0, (32, 1), "bf16", integer=True),
    )
}
