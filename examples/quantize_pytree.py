"""Quantize a fine-tuned pytree to FP8 in ten lines, see what was kept of the tune, and get arrays back."""

import jax
import jax.numpy as jnp

import daq_jax as daq

base = {"kernel": jax.random.normal(jax.random.key(0), (256, 512)), "scale": jnp.ones(256)}
base = daq.dequantize(daq.quantize(base, base, daq.recipes.absmax))  # as a base that was shipped in FP8
tuned = jax.tree.map(lambda w: w + 0.01 * jax.random.normal(jax.random.key(1), w.shape), base)

q = daq.quantize(base, tuned)  # a tree like `tuned`, with a QTensor where it quantized
kept = daq.compare(base, tuned, q).total
params = daq.dequantize(q, dtype=jnp.bfloat16)  # arrays again

print(f"sign rate {kept.sign_rate:.1%}, cosine {kept.cosine:.3f}, projection {kept.projection:.2f}")
print(f"{tuned['kernel'].nbytes} bytes of kernel became {q['kernel'].nbytes}")
print(jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", params))
