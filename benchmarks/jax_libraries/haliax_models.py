"""Haliax: linear layers with several input or output axes, and layers in a `BlockSeq` and a `Stacked`.

Haliax's scan indexes the array within each `NamedArray`, so a `Stacked` is dequantized inside `jit`.
"""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp

import daq_jax as daq
from benchmarks.jax_libraries.check import TOKENS, Case
from benchmarks.jax_libraries.equinox_models import daq_leaf

PACKAGE = "marin-haliax"
TOKEN = hax.Axis("token", TOKENS)
EMBED, HEADS, HEAD, HIDDEN, LAYERS = (
    hax.Axis(name, size)
    for name, size in (("embed", 24), ("heads", 6), ("head", 8), ("hidden", 28), ("layers", 5))
)


class Layer(eqx.Module):
    """Into heads and out of heads, and a gated network."""

    into: hax.nn.Linear
    out: hax.nn.Linear
    up: hax.nn.Linear
    down: hax.nn.Linear

    @staticmethod
    def init(key):
        keys = jax.random.split(key, 4)

        def make(i, inputs, outputs):
            return hax.nn.Linear.init(inputs, outputs, key=keys[i])

        heads = (HEADS, HEAD)
        return Layer(
            make(0, EMBED, heads), make(1, heads, EMBED), make(2, EMBED, HIDDEN), make(3, HIDDEN, EMBED)
        )

    def __call__(self, x):
        x = x + self.out(hax.nn.gelu(self.into(x)))
        return x + self.down(hax.nn.gelu(self.up(x)))


def case(model, hold=lambda q: q):
    arrays, static = eqx.partition(model, eqx.is_array)
    x = hax.named(jax.random.normal(jax.random.key(5), (TOKENS, EMBED.size)), (TOKEN, EMBED))

    def run(arrays):
        model = eqx.combine(hold(arrays), static, is_leaf=daq_leaf)
        out = model.fold(x) if hasattr(model, "fold") else model(x)
        return jnp.asarray(out.rearrange((TOKEN, EMBED)).array)

    return Case(arrays, run)


def layers(kind, **options):
    return case(kind.init(LAYERS, Layer)(key=jax.random.split(jax.random.key(0), LAYERS.size)), **options)


MODELS = {
    "one layer": lambda: case(Layer.init(jax.random.key(0))),
    "5 layers, BlockSeq": lambda: layers(hax.nn.BlockSeq),
    "5 layers, Stacked, dequantized in jit": lambda: layers(hax.nn.Stacked, hold=daq.dequantize),
}
