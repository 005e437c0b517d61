"""Keras 3 on JAX: attention, dense and recurrent layers, through `stateless_call`."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from keras import layers

import daq_jax as daq
from benchmarks.jax_libraries.check import TOKENS, Case

PACKAGE = "keras"
WIDTH, HIDDEN = 24, 28


def case(*made):
    inputs = keras.Input((TOKENS, WIDTH))
    x = inputs
    for layer in made:
        x = layer(x, x) if isinstance(layer, layers.MultiHeadAttention) else layer(x)
    model = keras.Model(inputs, x)
    names = [v.path for v in model.trainable_variables]
    data = jax.random.normal(jax.random.key(5), (1, TOKENS, WIDTH))
    rest = [v.value for v in model.non_trainable_variables]

    def run(weights):
        return model.stateless_call([weights[n] for n in names], rest, data)[0]

    weights = {v.path: jnp.asarray(v.value) for v in model.trainable_variables}
    return Case(weights, run, rules=daq.KERAS_RULES)


def transformer():
    return case(
        layers.MultiHeadAttention(3, 8, name="mha"),
        layers.LayerNormalization(),
        layers.Dense(HIDDEN, activation="gelu", name="up"),
        layers.Dense(WIDTH, name="down"),
    )


def recurrent():
    return case(
        layers.LSTM(HIDDEN, return_sequences=True, name="lstm"), layers.GRU(20, return_sequences=True)
    )


MODELS = {"attention and dense": transformer, "LSTM and GRU": recurrent}
