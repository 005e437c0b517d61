"""The true second moments of the inputs of each matrix and of the gradients of its outputs, from tuning text."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.behaviour.corpora import windows
from benchmarks.behaviour.envelope import pairs as P
from daq_jax.demo.model import next_byte_log_probs


def moments(weights, size, text, count=64):
    """`{path: (Hx [R, R], Hg [C, C])}`, of the KL's own Fisher information: labels drawn from the model."""
    model = size.model
    text = jnp.asarray(windows(text, count, model.context + 1))
    params = P.nested(weights)
    names = P.quantized(weights)

    def loss(taps, key):
        seen = {}

        def watch(call, args, kwargs, context):
            if isinstance(context.module, nn.Dense):
                path = "/".join((*context.module.path, "kernel"))
                if path in taps:
                    seen[path] = args[0]
                    return call(*args, **kwargs) + taps[path]
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            log_p = next_byte_log_probs(model, params, text)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_p))
        return -jnp.sum(jnp.take_along_axis(log_p, drawn[..., None], -1)), seen

    taps = {k: jnp.zeros((*text[:, 1:].shape, weights[k].shape[1])) for k in names}
    grads, seen = jax.jit(jax.grad(loss, has_aux=True))(taps, jax.random.key(0))
    out = {}
    n = text[:, 1:].size
    for k in names:
        x, g = (np.asarray(v).reshape(n, -1) for v in (seen[k], grads[k]))
        out[k] = (x.T @ x / n, g.T @ g / n)
    return out
