"""A metric of one's own: any function of `(d, q)` that returns one score per tile can drive the search."""

import dataclasses

import jax
import jax.numpy as jnp

import daq_jax as daq


def faithful(d: jax.Array, q: jax.Array) -> jax.Array:
    """Minus the distance of the projection from 1: the kept change should be as long as the true one."""
    size = jnp.sum(d * d, axis=-1)  # d and q are [tiles, elements of a tile]
    return -jnp.abs(1 - jnp.sum(d * q, axis=-1) / jnp.where(size > 0, size, 1))


base = jax.random.normal(jax.random.key(0), (512, 512))
base = daq.quantize(base, base, daq.recipes.absmax).dequantize()  # a base that was shipped in FP8
tuned = base + 0.01 * jax.random.normal(jax.random.key(1), base.shape)

searched = daq.Recipe(search=daq.CoarseToFine(low=0.8, high=1.5, coarse=5, fine=10))
for name, metric in {"cosine": daq.cosine, "sign rate": daq.SignRate(), "faithful": faithful}.items():
    q = daq.quantize(base, tuned, dataclasses.replace(searched, metric=metric))
    kept = daq.compare(base, tuned, q).total
    figures = f"sign rate {kept.sign_rate:.1%}, cosine {kept.cosine:.3f}, projection {kept.projection:.2f}"
    print(f"search by {name}: {figures}")
