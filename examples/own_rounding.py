"""A rounding of one's own: a weight leaves the code of its base only for a change that is worth it."""

import dataclasses

import jax
import jax.numpy as jnp

import daq_jax as daq


@dataclasses.dataclass(frozen=True)
class DeadZone(daq.Rounding):
    """The code nearest to the tuned weight where `|change| >= least` of the scale, else that of the base."""

    least: float = 8.0  # code units; a step between codes is at most 32

    scope = "tile"  # a code depends on its own tile alone: parts and shards may be rounded apart
    bytes_per_element = 24  # for the plan of folders larger than memory

    def __call__(self, tiles: daq.Tiles, scale: jax.Array) -> jax.Array:
        moves = jnp.abs(tiles.change) >= self.least * scale
        return tiles.format.round(jnp.where(moves, tiles.tuned, tiles.base) / scale)


def towards_zero(tiles: daq.Tiles, scale: jax.Array) -> jax.Array:
    """A plain function is a rounding too; it sees the whole weight at once."""
    x = tiles.tuned / scale
    return jnp.where(x < 0, tiles.format.ceil(x), tiles.format.floor(x))


# A base that was shipped in FP8 with power-of-two scales, and a tune that stays on the same scales.
recipe = daq.Recipe(scales=daq.PowerOfTwo())
base = jax.random.normal(jax.random.key(0), (256, 256))
base = daq.quantize(base, base, recipe).dequantize()
tuned = base * (1 + 0.04 * jax.random.normal(jax.random.key(1), base.shape))
for rounding in (daq.Nearest(), DeadZone(), towards_zero, daq.UnbiasedGain()):
    kept = daq.compare(base, tuned, daq.quantize(base, tuned, recipe.replace(rounding=rounding))).total
    name = getattr(rounding, "__name__", rounding)
    print(f"{name}: unchanged {kept.unchanged:.0%}, projection {kept.projection:.2f}")
