"""Quantize inside a jitted pipeline: merge an adapter, quantize and compare in one compiled call."""

import jax
import jax.numpy as jnp

import daq_jax as daq


@jax.jit
def merge_and_quantize(base: dict, down: jax.Array, up: jax.Array) -> tuple[dict, daq.Comparison]:
    """A low-rank adapter `down @ up` into the kernel, then FP8 codes; nothing leaves the device between."""
    tuned = {"kernel": base["kernel"] + (down @ up).astype(base["kernel"].dtype)}
    q = daq.quantize(base, tuned)
    return q, daq.compare(base, tuned, q)


@jax.jit
def apply(q: dict, x: jax.Array) -> jax.Array:
    """A QTensor is a pytree and stands for its weight in jnp functions: decoded here, inside the program."""
    return jnp.dot(x, q["kernel"])


keys = jax.random.split(jax.random.key(0), 4)
base = {"kernel": jax.random.normal(keys[0], (512, 1024), jnp.bfloat16)}
down, up = 0.02 * jax.random.normal(keys[1], (512, 8)), jax.random.normal(keys[2], (8, 1024))

q, table = merge_and_quantize(base, down, up)
print(f"codes {q['kernel'].codes.dtype}{q['kernel'].shape}, scales {q['kernel'].scale.shape}")
print(f"cosine {table.total.cosine:.3f}, projection {table.total.projection:.3f}")

x = jax.random.normal(keys[3], (4, 512), jnp.bfloat16)
exact = jnp.dot(x, base["kernel"] + (down @ up).astype(jnp.bfloat16))
error = jnp.linalg.norm(apply(q, x) - exact) / jnp.linalg.norm(exact)
print(f"relative error of the layer's output: {error:.3f}")
