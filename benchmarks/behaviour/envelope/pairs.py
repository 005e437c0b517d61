"""Pairs of base and tuned weights of the study's model, made once and kept in a few small files.

Weights are a flat dict `path -> array`. `quantized` names the matrices of the layers. A change is kept in eight
bits, sign and logarithm (2.7 % of noise that is part of the change from then on).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.behaviour.corpora import load_corpora, windows
from benchmarks.behaviour.envelope.grids import GRIDS
from benchmarks.behaviour.training import SIZES, Size
from daq_jax.analysis.predictions import kl_divergences
from daq_jax.demo.model import (
    learning_rates,
    make_params,
    next_byte_log_probs,
    start_training,
    train,
)

STEP = 0.09


def learn(params, data, steps, rate, key, size: Size):
    state = start_training(params)
    rates = learning_rates(steps, rate, warmup=steps // 10)
    for done in range(0, steps, size.tune_steps):
        chunk_key = jax.random.fold_in(key, done)
        state, _ = train(
            state, data, rates[done : done + size.tune_steps], chunk_key, size=size.model, batch=size.batch
        )
    return jax.block_until_ready(state.params)


def flat(params) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten_dict(params, sep="/").items()}


def nested(weights):
    return unflatten_dict(weights, sep="/")


def quantized(weights) -> list[str]:
    return [k for k in weights if k.startswith("layer_") and k.endswith("kernel")]


def to_base(trained, kind: str):
    """The trained weights as a model that ships on a grid has them, and the scales."""
    out, scales = dict(trained), {}
    for k in quantized(trained):
        w = jnp.asarray(trained[k])
        if kind == "bf16":
            out[k] = np.asarray(w.astype(jnp.bfloat16).astype(jnp.float32))
        else:
            g = GRIDS[kind]
            scales[k] = g.absmax(w)
            out[k] = np.asarray(g.encode(w, scales[k]) * g.spread(scales[k], w))
    return out, scales


def pack(d: np.ndarray):
    top = float(np.abs(d).max()) or 1.0
    with np.errstate(divide="ignore"):
        k = np.clip(np.round(127 + np.log(np.abs(d) / top) / STEP), 0, 127)
    return (np.sign(d) * k).astype(np.int8), np.float32(top)


def unpack(code: np.ndarray, top) -> np.ndarray:
    k = np.abs(code.astype(np.float32))
    return np.where(k > 0, np.sign(code) * top * np.exp((k - 127) * STEP), 0).astype(np.float32)


def noise_pair(base, size: float, seed: int = 1):
    rng, tuned = np.random.default_rng(seed), dict(base)
    for k in quantized(base):
        rms = np.sqrt(np.mean(base[k] ** 2))
        tuned[k] = base[k] + (size * rms * rng.standard_normal(base[k].shape)).astype(np.float32)
    return tuned


def make_trained(size: Size, texts, seed=0):
    length = max(len(t.train) for t in texts)
    first, second = (jnp.asarray(np.resize(t.train, length)) for t in texts)
    params_key, base_key, tune_key = jax.random.split(jax.random.key(seed), 3)
    trained = learn(
        make_params(size.model, params_key), first, size.base_steps, size.base_rate, base_key, size
    )
    return trained, second, tune_key


class Judge:
    """KL from a tuned model on held-out text of the tuning style."""

    def __init__(self, size: Size, texts, count=None):
        self.size = size.model
        self.text = jnp.asarray(windows(texts[1].held_out, count or size.judged, size.model.context + 1))
        model = size.model

        @jax.jit
        def log_p(params, text):
            with jax.default_matmul_precision("highest"):
                return jax.lax.map(
                    lambda w: next_byte_log_probs(model, params, w[None])[0], text, batch_size=32
                )

        @jax.jit
        def kl(params, text, p):
            return jnp.mean(kl_divergences(p, log_p(params, text)))

        self._log_p, self._kl = log_p, kl

    def reference(self, weights):
        return self._log_p(nested(weights), self.text)

    def kl(self, weights, reference) -> float:
        return float(self._kl(nested(weights), self.text, reference))


def texts_of(folder: str):
    return load_corpora(Path(folder))


__all__ = ["SIZES", "Judge", "make_trained", "texts_of"]
