"""Equinox: attention and a network of linear layers, a recurrent cell, and a stack of layers in a scan."""

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.jax_libraries.check import TOKENS, Case

PACKAGE = "equinox"
WIDTH, HIDDEN = 24, 28


class Layer(eqx.Module):
    """Attention, and a network of two linear layers."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(3, WIDTH, qk_size=10, vo_size=7, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, activation=jax.nn.gelu, key=second)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(x)


def inputs():
    return jax.random.normal(jax.random.key(5), (TOKENS, WIDTH))


def layer():
    arrays, static = eqx.partition(Layer(jax.random.key(0)), eqx.is_array)
    return Case(arrays, lambda arrays: eqx.combine(arrays, static, is_leaf=daq_leaf)(inputs()))


def daq_leaf(x):
    """QTensors are leaves where modules are put together."""
    return x is None or type(x).__name__ == "QTensor"


def stack():
    layers = eqx.filter_vmap(Layer)(jax.random.split(jax.random.key(0), 5))
    arrays, static = eqx.partition(layers, eqx.is_array)

    def run(arrays):
        def body(x, one):
            return eqx.combine(one, static, is_leaf=daq_leaf)(x), None

        return jax.lax.scan(body, inputs(), arrays)[0]

    return Case(arrays, run)


def cell():
    arrays, static = eqx.partition(eqx.nn.GRUCell(WIDTH, HIDDEN, key=jax.random.key(0)), eqx.is_array)
    state = jax.random.normal(jax.random.key(6), (TOKENS, HIDDEN))
    return Case(
        arrays,
        lambda arrays: jax.vmap(eqx.combine(arrays, static, is_leaf=daq_leaf))(inputs(), jnp.asarray(state)),
    )


MODELS = {"attention and MLP": layer, "5 layers in a scan": stack, "GRU cell, vmap": cell}
