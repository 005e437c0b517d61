"""A number format of one's own: FP6 (E3M2), a ready kind with other numbers, and one written from nothing."""

import dataclasses

import jax
import jax.numpy as jnp

import daq_jax as daq

# XLA has no 6-bit float, so the codes are stored as uint8: the bit pattern in the lowest six bits.
fp6 = daq.SmallFloat("fp6_e3m2", "float6_e3m2fn", largest=28.0, mantissa_bits=2, min_exponent=-2)


@dataclasses.dataclass(frozen=True)
class Thirds(daq.Format):
    """Multiples of a third from -5 to 5, as int8 codes. `floor` and `ceil` come from `daq.Format`."""

    name: str = "thirds"
    dtype: str = "int8"
    largest: float = 5.0

    def round(self, x: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(x, -self.largest, self.largest) * 3) / 3

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.round(x * 3).astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32) / 3


base = jax.random.normal(jax.random.key(0), (256, 256))
tuned = base + 0.05 * jax.random.normal(jax.random.key(1), base.shape)
for number in (daq.fp8_e4m3fn, fp6, Thirds(), daq.int4):
    q = daq.quantize(base, tuned, daq.Recipe(format=number, tiling=daq.Group(64)))
    kept = daq.compare(base, tuned, q).total
    print(f"{number.name}: codes {q.codes.dtype}, cosine {kept.cosine:.3f}, projection {kept.projection:.3f}")
