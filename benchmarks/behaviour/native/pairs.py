"""Pairs of weights for the study of native bases: a base on a grid, and what became of it.

A change is a tune at a learning rate, a LoRA tune, random noise, or nothing.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import daq_jax as daq
from benchmarks.behaviour import training
from benchmarks.behaviour.corpora import Text
from benchmarks.behaviour.native.layouts import BF16, LAYOUTS
from benchmarks.behaviour.training import Size, learn
from daq_jax.demo.model import (
    ADAM,
    ModelSize,
    Params,
    learning_rates,
    losses,
    make_params,
    next_byte_log_probs,
    to_dtype,
)

LORA_RANK = 16
What = Literal["tune", "lora", "noise", "zero"]


class Change(NamedTuple):
    """What becomes of a base.

    Attributes:
        what: how it is changed.
        rate: learning rate; of noise, its size over that of the weights.
        stored: dtype that both weights are stored in.
    """

    what: What
    rate: float
    stored: Literal["f32", "bf16"] = "f32"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The changes of a study of one size. The most telling rates come first: a run may stop early."""

    rates: tuple[float, ...]
    stored_rates: tuple[float, ...]  # of those, the ones that are also stored in bfloat16
    lora_rate: float
    noises: tuple[float, ...] = (1e-2, 1e-3)

    def changes(self) -> list[Change]:
        """All of them, those of one tune side by side."""
        found = [Change("zero", 0.0)]
        for rate in self.rates:
            found.append(Change("tune", rate))
            if rate in self.stored_rates:
                found.append(Change("tune", rate, "bf16"))
        return [*found, *(Change("noise", x) for x in self.noises), Change("lora", self.lora_rate)]


_GPU = training.SIZES["gpu"]
SIZES = training.SIZES | {
    "large": dataclasses.replace(
        _GPU,
        model=ModelSize(layers=12, width=1536, heads=12, context=256),  # 341M parameters
        batch=16,
        base_steps=1600,
        base_rate=6e-4,
        tune_steps=200,
        judged=256,
    ),
    "experts": dataclasses.replace(
        _GPU,
        model=ModelSize(layers=6, width=512, heads=8, context=256, experts=8),  # 107M parameters
        base_steps=2000,
        judged=256,
    ),
}

_FEWER = Plan((8e-6, 1.5e-4, 5e-7, 2e-6, 3e-5), (8e-6, 2e-6), 2e-5)  # of which a model is measured in one run
# Rates whose changes run from 0.004 % to 6 %.
PLANS = {
    "gpu": Plan((8e-6, 1.5e-4, 5e-7, 2e-6, 3e-5, 2e-8, 1e-7), (8e-6, 5e-7, 2e-6), 2e-5),
    "large": _FEWER,
    "experts": _FEWER,
    "cpu": Plan((4e-5, 6e-4, 2.5e-6, 1e-5, 1.5e-4, 1e-7, 6e-7), (4e-5, 2.5e-6, 1e-5), 1e-4),
    "tiny": Plan((1e-3, 1e-4), (1e-3,), 1e-3),
}


class Base(NamedTuple):
    """A base in the two forms that are needed of it.

    Attributes:
        shipped: what the library is given: QTensors, or float32 arrays of a base on no grid.
        params: float32 arrays, to train and to run.
    """

    shipped: Params
    params: Params


def make_base(trained: Params, kind: str) -> Base:
    """The trained weights as a model that ships on a grid has them."""
    if kind == BF16:
        params = to_dtype(to_dtype(trained, jnp.bfloat16), jnp.float32)
        return Base(params, params)
    shipped = daq.quantize(trained, trained, LAYOUTS[kind].of(daq.recipes.absmax))
    return Base(shipped, daq.dequantize(shipped, jnp.float32))


def quantized_paths(params: Params) -> list[str]:
    """Paths of the leaves that the rules quantize."""
    shapes = jax.eval_shape(partial(daq.quantize, recipe=daq.recipes.absmax), params, params)
    return [path for path, leaf in flatten_dict(shapes, sep="/").items() if isinstance(leaf, daq.QTensor)]


class Tuner:
    """A trained model, and the text and the key that it is tuned with."""

    def __init__(self, size: Size, texts: tuple[Text, Text], seed: int) -> None:
        length = max(len(text.train) for text in texts)  # one length: one compiled program
        first, self.second = (dataclasses.replace(t, train=np.resize(t.train, length)) for t in texts)
        params_key, base_key, self.key = jax.random.split(jax.random.key(seed), 3)
        self.size, params = size, make_params(size.model, params_key)
        self.trained = learn(params, first, size.base_steps, size.base_rate, base_key, size)
        self.paths = quantized_paths(self.trained)

    def change(self, params: Params, change: Change) -> Params:
        """The weights after a change, float32."""
        if change.what == "tune":
            return learn(params, self.second, self.size.tune_steps, change.rate, self.key, self.size)
        if change.what == "zero":
            return params
        leaves = flatten_dict(params, sep="/")
        if change.what == "noise":
            new = {path: _with_noise(leaves[path], change.rate, i) for i, path in enumerate(self.paths)}
        else:
            new = self._lora(params, change.rate)
        return unflatten_dict(leaves | new, sep="/")

    def _lora(self, params: Params, rate: float) -> dict[str, Array]:
        leaves: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore
        keys = jax.random.split(jax.random.fold_in(self.key, 1), len(self.paths))
        lora = {path: _factors(leaves[path].shape, k) for path, k in zip(self.paths, keys, strict=True)}
        steps, text = self.size.tune_steps, jnp.asarray(self.second.train)
        rates = learning_rates(steps, rate, warmup=steps // 10)
        lora = _train_lora(params, lora, text, rates, self.key, size=self.size)
        return {path: leaves[path] + a @ b for path, (a, b) in lora.items()}


def _factors(shape: tuple[int, ...], key: Array) -> tuple[Array, Array]:
    """Factors of a LoRA update that is zero."""
    *batch, rows, columns = shape
    a = jax.random.normal(key, (*batch, rows, LORA_RANK)) / rows**0.5
    return a, jnp.zeros((*batch, LORA_RANK, columns))


def _with_noise(weight: Array, size: float, seed: int) -> Array:
    rms = np.sqrt(np.mean(np.square(np.float64(weight))))
    noise = np.random.default_rng(seed + 1).standard_normal(weight.shape) * size * rms
    return weight + jnp.asarray(noise, jnp.float32)


@partial(jax.jit, static_argnames="size")
def _train_lora(params: Params, lora: Any, text: Array, rates: Array, key: Array, *, size: Size) -> Any:
    """Adam on the factors `a` `[R, 16]` and `b` `[16, C]` of each matrix alone."""
    leaves = flatten_dict(params, sep="/")

    def loss_of(lora: Any, sequences: Array) -> Array:
        merged = leaves | {path: leaves[path] + a @ b for path, (a, b) in lora.items()}
        log_p = next_byte_log_probs(size.model, unflatten_dict(merged, sep="/"), sequences)
        return jnp.mean(losses(log_p, sequences))

    def step(state: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
        (lora, adam), (rate, step_key) = state, inputs
        starts = jax.random.randint(step_key, (size.batch, 1), 0, len(text) - size.model.context)
        gradient = jax.grad(loss_of)(lora, text[starts + jnp.arange(size.model.context + 1)])
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, adam = ADAM.update(gradient, adam)
        return (jax.tree.map(lambda x, update: x - rate * update, lora, updates), adam), None

    start = lora, ADAM.init(lora)
    return jax.lax.scan(step, start, (rates, jax.random.split(key, len(rates))))[0][0]


__all__ = ["PLANS", "SIZES", "Base", "Change", "Plan", "Tuner", "make_base", "quantized_paths"]
