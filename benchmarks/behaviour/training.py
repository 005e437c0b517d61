"""A pair of weights for the behaviour study: a base, and what tuning makes of it.

Everything is trained and kept in float32; a base is rounded to fewer bits before it is tuned.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import daq_jax as daq
from benchmarks.behaviour.corpora import Text
from benchmarks.behaviour.methods import in_layout
from daq_jax.demo.model import (
    ModelSize,
    Params,
    learning_rates,
    make_params,
    start_training,
    to_dtype,
    train,
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a study. `base_steps` is a multiple of `tune_steps`: both share one compiled program."""

    model: ModelSize
    batch: int  # sequences in a step
    base_steps: int
    base_rate: float  # the highest learning rate
    tune_steps: int
    tune_rates: tuple[float, ...]  # chosen so that |d| / |w| runs from about 0.3 % to 6 %
    judged: int  # held-out sequences of each text
    calibrated: int = 16  # sequences of the tuning text that SmoothQuant and AWQ look at


SIZES = {
    "gpu": Size(
        model=ModelSize(layers=8, width=512, heads=8, context=256),  # 25.4M parameters
        batch=32,
        base_steps=4000,
        base_rate=1e-3,
        tune_steps=400,
        tune_rates=(2e-6, 8e-6, 3e-5, 1.5e-4),
        judged=512,
    ),
    "cpu": Size(
        model=ModelSize(layers=3, width=256, heads=4, context=64),  # 2.5M parameters
        batch=16,
        base_steps=800,
        base_rate=2e-3,
        tune_steps=80,
        tune_rates=(1e-5, 4e-5, 1.5e-4, 6e-4),
        judged=128,
    ),
    "tiny": Size(
        model=ModelSize(layers=1, width=32, heads=2, context=16),
        batch=8,
        base_steps=60,
        base_rate=1e-2,
        tune_steps=20,
        tune_rates=(1e-4, 1e-3),
        judged=16,
        calibrated=4,
    ),
}


STORED = {"f32": jnp.float32, "bf16": jnp.bfloat16}  # what the weights of a pair may be stored in


class Pair(NamedTuple):
    """Weights before and after tuning, float32."""

    base: Params
    tuned: Params


def learn(params: Params, text: Text, steps: int, rate: float, key: Array, size: Size) -> Params:
    """Trains a copy of the weights on a text."""
    state, data = start_training(params), jnp.asarray(text.train)
    rates = learning_rates(steps, rate, warmup=steps // 10)
    for done in range(0, steps, size.tune_steps):
        chunk, chunk_key = rates[done : done + size.tune_steps], jax.random.fold_in(key, done)
        state, _ = train(state, data, chunk, chunk_key, size=size.model, batch=size.batch)
    return jax.block_until_ready(state.params)


def make_base(trained: Params, kind: str, layout: str) -> Params:
    """The trained weights as a model that ships in `kind` has them, held in float32."""
    if kind == "bf16":
        return to_dtype(to_dtype(trained, jnp.bfloat16), jnp.float32)
    return daq.dequantize(daq.quantize(trained, trained, in_layout(daq.recipes.absmax, layout)))


def make_pairs(
    size: Size,
    layout: str,
    bases: tuple[str, ...],
    stored: str,
    texts: tuple[Text, Text],
    seed: int,
    say: Callable,
) -> Iterator[tuple[str, float, Pair]]:
    """Trains one model; yields a pair for each kind of base and rate of tuning."""
    length = max(len(text.train) for text in texts)
    # Repeat the shorter text: both have one shape, and share one compiled program.
    first, second = (dataclasses.replace(text, train=np.resize(text.train, length)) for text in texts)
    params_key, base_key, tune_key = jax.random.split(jax.random.key(seed), 3)
    trained = learn(
        make_params(size.model, params_key), first, size.base_steps, size.base_rate, base_key, size
    )
    say("base trained")
    for kind in bases:
        base = make_base(trained, kind, layout)
        for rate in size.tune_rates:
            tuned = learn(base, second, size.tune_steps, rate, tune_key, size)
            pair = Pair(*(to_dtype(to_dtype(x, STORED[stored]), jnp.float32) for x in (base, tuned)))
            yield kind, rate, pair
