"""The views that types tell: layers of Flax NNX, and stand-ins of those of Equinox and Haliax by name.

The tests of the real libraries run where they are installed.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import daq_jax as daq

LAST_TWO, OUT_IN = ((-2,), (-1,)), ((-1,), (-2,))


def layer(name, package, arrays, **static):
    """An instance of a class of another library: a pytree that has such arrays and such static attributes."""
    fields = [(k, Any) for k in arrays] + [
        (k, Any, dataclasses.field(metadata={"static": True})) for k in static
    ]
    cls = dataclasses.make_dataclass(name, fields, frozen=True)
    cls.__module__ = package
    jax.tree_util.register_dataclass(cls, list(arrays), list(static))
    return cls(**arrays, **static)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def axis(name, size):
    return type("Axis", (), {"name": name, "size": size, "__hash__": object.__hash__})()


def named(*axes):
    """Haliax's array with named axes: an array in a box."""
    array = layer("NamedArray", "haliax.core", {"array": shape(*(a.size for a in axes))}, axes=axes)
    return array


def views(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error", daq.AmbiguousMatrixWarning)
        plan = daq.plan(tree)
    return {path: leaf.decision.matrix if leaf.quantized else None for path, leaf in plan.leaves.items()}


EQUINOX = {
    "linear": (layer("Linear", "equinox.nn._linear", {"weight": shape(4, 3)}), OUT_IN),
    "stack": (layer("Linear", "equinox.nn._linear", {"weight": shape(5, 4, 3)}), OUT_IN),
    "cell": (layer("GRUCell", "equinox.nn._rnn", {"weight_hh": shape(12, 4)}), OUT_IN),
    "conv": (
        layer(
            "Conv",
            "equinox.nn._conv",
            {"weight": shape(16, 3, 5, 5)},
            num_spatial_dims=2,
            groups=1,
            in_channels=3,
        ),
        ((-3, -2, -1), (-4,)),
    ),
    "each": (
        layer(
            "Conv",
            "equinox.nn._conv",
            {"weight": shape(8, 1, 4)},
            num_spatial_dims=1,
            groups=8,
            in_channels=8,
        ),
        None,
    ),
    "table": (layer("Embedding", "equinox.nn._embedding", {"weight": shape(9, 4)}), None),
    "ln": (layer("LayerNorm", "equinox.nn._normalisation", {"weight": shape(4, 4)}), None),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_layers_of_equinox_are_known_by_type(name):
    module, wanted = EQUINOX[name]
    assert list(views({"in": {"some": [module]}}).values()) == [wanted]


def test_an_own_rule_stands_above_the_type_and_a_ready_one_below():
    tree = {"kernel": EQUINOX["linear"][0], "lm_head": EQUINOX["linear"][0]}
    assert views(tree) == {"kernel/weight": OUT_IN, "lm_head/weight": None}
    rules = [daq.use("kernel", matrix=LAST_TWO), daq.use("lm_head")]
    plan = daq.plan(tree, rules=rules)
    assert [leaf.decision.matrix for leaf in plan.leaves.values()] == [LAST_TWO, OUT_IN]


def test_layers_of_haliax_are_known_by_their_named_axes():
    d, h, k, e = (axis(name, i) for i, name in enumerate(("embed", "heads", "head_size", "layers"), 3))
    linear = {
        "q": layer("Linear", "haliax.nn.linear", {"weight": named(e, h, k, d)}, In=d, Out=(h, k)),
        "o": layer("Linear", "haliax.nn.linear", {"weight": named(e, d, h, k)}, In=(h, k), Out=(d,)),
        "t": layer("Embedding", "haliax.nn.embedding", {"weight": named(h, d)}),
    }
    assert views(linear) == {
        "q/weight": ((-1,), (-3, -2)),
        "o/weight": ((-2, -1), (-3,)),
        "t/weight": None,
    }


class Odd(nnx.Module):
    """Layers of NNX under names that say nothing, or the wrong thing."""

    def __init__(self, rngs):
        self.query = nnx.Linear(24, 48, rngs=rngs)
        self.a = nnx.LinearGeneral(24, (4, 6), rngs=rngs)
        self.b = nnx.LinearGeneral((4, 6), 24, axis=(-2, -1), rngs=rngs)
        self.c = nnx.Einsum("...td,ndh->...tnh", (4, 24, 6), rngs=rngs)
        self.d = nnx.Conv(24, 24, (3,), feature_group_count=24, rngs=rngs)
        self.e = nnx.Conv(24, 16, (3, 3), rngs=rngs)
        self.f = nnx.Embed(32, 24, rngs=rngs)
        self.g = nnx.LoRALinear(24, 48, lora_rank=2, rngs=rngs)


@pytest.mark.parametrize("stacked", [False, True])
def test_layers_of_nnx_are_known_by_type_whatever_their_names(stacked):
    make = nnx.vmap(Odd) if stacked else Odd
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0).split(3) if stacked else nnx.Rngs(0)))
    found = {path.removesuffix("/kernel"): view for path, view in views(model).items() if view}
    assert found == {
        "query": LAST_TWO,
        "a": ((-3,), (-2, -1)),
        "b": ((-3, -2), (-1,)),
        "c": ((-2,), (-3, -1)),
        "e": ((-4, -3, -2), (-1,)),
        "g": LAST_TWO,
    }


# --- The real libraries -------------------------------------------------------------------------------------


@pytest.mark.peers
def test_an_equinox_model_of_qtensors_runs():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "linear": eqx.nn.Linear(24, 40, key=keys[0]),
        "attention": eqx.nn.MultiheadAttention(4, 24, key=keys[1]),
        "cell": eqx.nn.GRUCell(24, 8, key=keys[2]),
        "stack": eqx.filter_vmap(lambda key: eqx.nn.Linear(24, 24, key=key))(keys),
    }
    q = daq.quantize(model, model, daq.Recipe(tiling=daq.Block(8, 16)))
    assert all(
        x.matrix == OUT_IN
        for x in jax.tree.leaves(q, is_leaf=lambda x: isinstance(x, daq.QTensor))
        if isinstance(x, daq.QTensor)
    )
    x = jax.random.normal(keys[0], (5, 24))

    def run(model, x):
        arrays, static = eqx.partition(model["stack"], eqx.is_array)
        scanned = jax.lax.scan(lambda y, layer: (eqx.combine(layer, static)(y), None), x[0], arrays)[0]
        return (
            jax.vmap(model["linear"])(x),
            model["attention"](x, x, x),
            model["cell"](x[0], jnp.ones(8)),
            scanned,
        )

    for how in (run, eqx.filter_jit(run)):
        jax.tree.map(np.testing.assert_array_equal, how(q, x), how(daq.dequantize(q), x))


@pytest.mark.peers
def test_a_haliax_layer_of_qtensors_runs():
    hax = pytest.importorskip("haliax")
    d, h, k = hax.Axis("embed", 24), hax.Axis("heads", 4), hax.Axis("head_size", 8)
    model = hax.nn.Linear.init(d, (h, k), key=jax.random.key(0))
    q = daq.quantize(model, model, daq.Recipe(tiling=daq.Block(8, 16)))
    assert q.weight.array.view.rows == 24
    x = hax.ones((hax.Axis("position", 3), d))
    for how in (lambda m, x: m(x), hax.named_jit(lambda m, x: m(x))):
        np.testing.assert_array_equal(how(q, x).array, how(daq.dequantize(q), x).array)
