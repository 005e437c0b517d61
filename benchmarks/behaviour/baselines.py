"""SmoothQuant and AWQ with 8-bit weights: scale the inputs of a matrix, quantize it, undo the scaling.

Both choose one factor per input channel from activations on calibration text. A matrix `W` is stored as
`Q(diag(factor) W)` and its input is divided by `factor`; here that is one effective matrix, in float32.
A server must fold the division into the layer before, which is not always possible; here it always is, in the
methods' favour. Only weights are quantized, so SmoothQuant, whose aim is activations that quantize well, is a
plain rescaling. AWQ's search for a clipping range is left out: FP8 codes need none.

Letters: `n` calibration bytes, `R` inputs and `C` outputs of a matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import daq_jax as daq
from daq_jax.demo.model import ModelSize, next_byte_log_probs

AWQ_STEPS = 20  # powers of the mean activation that are tried: 0, 1/20, .. 19/20, as in the released code


class Inputs(NamedTuple):
    """What a matrix's inputs looked like on the calibration text."""

    gram: Array  # [R, R] float32, sum of x x' over the text
    mean: Array  # [R] mean of |x|
    largest: Array  # [R] largest |x|


Baseline = Callable[[Array, Inputs, daq.Recipe], Array]  # (weight [R, C], its inputs, AbsMax) -> weight


@partial(jax.jit, static_argnames="size")
def watch_inputs(params: Any, windows: Array, *, size: ModelSize) -> dict[str, Inputs]:
    """Runs a model and returns what it fed to each `nn.Dense`, by the path of its kernel."""
    seen: dict[str, Inputs] = {}

    def watch(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.Dense):
            x = args[0].reshape(-1, args[0].shape[-1])
            size_of_x = jnp.abs(x)
            gram = jnp.matmul(x.T, x, precision="highest")
            path = "/".join((*context.module.path, "kernel"))
            seen[path] = Inputs(gram, size_of_x.mean(axis=0), size_of_x.max(axis=0))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        next_byte_log_probs(size, params, windows)
    return seen


def rescaled(weight: Array, factor: Array, recipe: daq.Recipe) -> Array:
    """What a weight becomes when its rows are multiplied by `factor` `[R]` while it is quantized."""
    scaled = weight * factor[:, None]
    return daq.quantize(scaled, scaled, recipe).dequantize() / factor[:, None]


@partial(jax.jit, static_argnames="recipe")
def smoothquant(weight: Array, inputs: Inputs, recipe: daq.Recipe) -> Array:
    """Difficulty shared half and half between inputs and weights. Source: arXiv:2211.10438, alpha 0.5."""
    tiny = 1e-5  # a channel that is never used, or has no weight, keeps a finite factor
    factor = jnp.maximum(inputs.largest, tiny) / jnp.maximum(jnp.abs(weight).max(axis=1), tiny)
    return rescaled(weight, jnp.sqrt(factor), recipe)


@partial(jax.jit, static_argnames="recipe")
def awq(weight: Array, inputs: Inputs, recipe: daq.Recipe) -> Array:
    """The power of the mean activation that gives the least error of the output. Source: arXiv:2306.00978."""

    def attempt(alpha: Array) -> tuple[Array, Array]:
        factor = jnp.maximum(inputs.mean**alpha, 1e-4)
        result = rescaled(weight, factor / jnp.sqrt(factor.max() * factor.min()), recipe)
        error = result - weight
        return jnp.sum(error * jnp.matmul(inputs.gram, error, precision="highest")), result

    def better(best: tuple[Array, Array], alpha: Array) -> tuple[tuple[Array, Array], None]:
        trial = attempt(alpha)
        return jax.tree.map(lambda a, b: jnp.where(trial[0] < best[0], a, b), trial, best), None

    start = jnp.float32(jnp.inf), weight
    return jax.lax.scan(better, start, jnp.arange(AWQ_STEPS, dtype=jnp.float32) / AWQ_STEPS)[0][1]
