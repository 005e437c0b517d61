"""Rules read off one trace of a model: the axes that the model itself contracts, whatever names say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import daq_jax as daq
from tests.test_layers import Odd

D, H, K, F, E, L, V, T = 24, 6, 8, 28, 5, 3, 61, 2
SHAPES = {
    "a": (D, H, K),
    "b": (H, D, K),
    "c": (F, D),
    "table": (V, D),
    "gain": (D, D),
    "stack": (L, D, D),
    "experts": (E, D, F),
    "merged": (D, H * K),
    "conv": (3, D, F),
    "single": (3, 1, D),
    "chosen": (E, D, F),
    "tied": (V, D),
    "idle": (D, F),
    "list": [(D, F), (F, D)],
}


def shape(sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def run(w, tokens):
    """A use of each weight that a library might make of it."""
    x = w["table"][tokens] + w["tied"][tokens]
    heads = jnp.einsum("td,dhk->thk", x, w["a"].astype(jnp.bfloat16).astype(x.dtype))
    x = x + jnp.einsum("thk,hdk->td", heads, jax.nn.standardize(w["b"]) * 0 + w["b"] * 2.0)
    x = x + (x @ w["c"].T) @ w["c"]
    x = x * w["gain"][0]
    x, _ = lax.scan(lambda x, layer: (jax.nn.relu(x @ layer), None), x, w["stack"])
    each = jnp.einsum("td,edf->etf", x, w["experts"]).sum(0)
    q, _ = jnp.split(w["merged"].reshape(D, H, K), 2, axis=1)
    x = x + jnp.einsum("td,dhk->thk", x, q).sum((1, 2))[:, None]
    y = lax.conv_general_dilated(x[None], w["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    x = lax.conv_general_dilated(
        x[None], w["single"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=D
    )[0]
    z = jax.checkpoint(lambda x: jnp.einsum("td,tdf->tf", x, w["chosen"][tokens % E]))(x)
    z = lax.cond(z.sum() > 0, lambda z: z @ w["list"][1], lambda z: z @ w["list"][1] * 2, z)
    return y, each, z @ w["tied"].T @ w["tied"] @ w["list"][0]


WANTED = {
    "a": ((-3,), (-2, -1)),
    "b": ((-3, -1), (-2,)),
    "c": None,  # used in both directions
    "table": None,
    "gain": None,
    "stack": ((-2,), (-1,)),
    "experts": ((-2,), (-1,)),
    "merged": ((-2,), (-1,)),
    "conv": ((-3, -2), (-1,)),
    "single": None,
    "chosen": ((-2,), (-1,)),
    "tied": None,
    "idle": ((-2,), (-1,)),  # left to the default rules
    "list/0": ((-2,), (-1,)),
    "list/1": ((-2,), (-1,)),
}


def views(plan):
    return {path: leaf.decision.matrix if leaf.quantized else None for path, leaf in plan.leaves.items()}


@pytest.mark.filterwarnings("ignore::daq_jax.rules.rule.AmbiguousMatrixWarning")
def test_a_function_tells_the_axes_of_its_weights():
    weights = jax.tree.map(shape, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rules = daq.rules_for(run, weights, shape((T,), jnp.int32))
    plan = daq.plan(weights, rules=rules)
    assert views(plan) == WANTED
    assert plan.leaves["table"].why == "looked up"
    assert "used in several ways" in plan.leaves["c"].why
    assert sum("list" in rule.pattern for rule in rules) == 1


def test_a_linen_module_tells_its_axes_scanned_on_any_axis():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.DenseGeneral((H, K), name="into", use_bias=False)(nn.LayerNorm()(x))
            return x + nn.DenseGeneral(D, axis=(-2, -1), name="from")(y), None

    class Model(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(V, D)(tokens)
            scan = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=L)
            return nn.Dense(V, name="logits")(scan(name="layers")(x, None)[0])

    tokens = shape((T,), jnp.int32)
    for axis, wanted in (
        (0, [((-3,), (-2, -1)), ((-3, -2), (-1,))]),
        (1, [((-4,), (-2, -1)), ((-4, -2), (-1,))]),
    ):
        model = Model(axis)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        found = views(daq.plan(params, rules=daq.rules_for(model, tokens)))
        assert [found[f"layers/{name}/kernel"] for name in ("into", "from")] == wanted
        assert all(view is None for path, view in found.items() if "into" not in path and "from" not in path)


def test_an_nnx_module_tells_its_axes():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.odd = Odd(rngs)
            self.own = nnx.Param(jnp.zeros((H, D, K)))

        def __call__(self, x):
            a = self.odd.b(self.odd.a(x)) + self.odd.c(x).sum(-2) @ jnp.ones((6, D))
            return self.odd.query(a), jnp.einsum("td,hdk->thk", x, self.own[...])

    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    state = nnx.state(model)
    found = views(daq.plan(state, rules=daq.rules_for(model, shape((T, D)))))
    assert found["own"] == ((-2,), (-3, -1))
    assert found["odd/a/kernel"] == ((-3,), (-2, -1))
    assert found["odd/b/kernel"] == ((-3, -2), (-1,))
    assert found["odd/c/kernel"] == ((-2,), (-3, -1))
    assert found["odd/query/kernel"] == ((-2,), (-1,))


def test_rules_for_nothing_are_refused():
    with pytest.raises(daq.DaqError, match="needed a model and the inputs"):
        daq.rules_for(lambda: None)
    with pytest.raises(daq.DaqError, match="no floating-point array"):
        daq.rules_for(lambda w: w, {"step": shape((), jnp.int32)})
    with pytest.raises(daq.DaqError, match="inputs of one call by position"):
        daq.rules_for(lambda w: jnp.ones((T, D)) @ w, shape((D, F)))


# --- Arrays that the function holds itself ------------------------------------------------------------------

HELD = {"up": jnp.ones((D, F)), "down": jnp.ones((F, D)), "stack": jnp.ones((L, D, D))}
ROWS = jnp.ones((T, D))
X = shape((T, D))


def feed_forward(w, x):
    return jax.nn.relu(x @ w["up"]) @ w["down"]


KNOW_NOTHING = {
    "weights, without an argument for them": (lambda x: feed_forward(HELD, x), X),
    "weights, beside an argument for them": (lambda weights, x: feed_forward(HELD, x), HELD, X),
    "weights, within a jitted function": (lambda w, x: jax.jit(lambda x: x @ HELD["up"])(x), HELD, X),
    "weights, cast and transposed": (
        lambda w, x: x @ HELD["down"].astype(jnp.bfloat16).T.astype(x.dtype),
        HELD,
        X,
    ),
    "layers of a scan": (lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, HELD["stack"])[0], HELD, X),
    "data": (lambda w, scale: feed_forward(w, ROWS) * scale, HELD, shape(())),
}


@pytest.mark.parametrize("name", KNOW_NOTHING)
def test_a_function_that_holds_its_weights_or_its_data_is_refused(name):
    with pytest.raises(daq.DaqError, match=r"holds itself: float.*Pass weights and data as arguments"):
        daq.rules_for(*KNOW_NOTHING[name])


def test_a_function_that_holds_some_of_its_weights_is_warned_of():
    given = {"up": HELD["up"]}
    with pytest.warns(daq.AmbiguousMatrixWarning, match=r"holds itself: float32 \(28, 24\)"):
        rules = daq.rules_for(lambda w, x: feed_forward({**HELD, **w}, x), given, X)
    assert views(daq.plan(given, rules=rules)) == {"up": ((-2,), (-1,))}


@pytest.mark.filterwarnings("error")
def test_constants_that_meet_no_weight_in_a_product_are_not_spoken_of():
    table, mask, angles = jnp.ones((V, D)), jnp.ones((D, F)), jnp.ones((T, D))

    def run(w, x, tokens):
        x = (x + table[tokens]) * angles
        return (x * 2.0) @ (w["up"] * mask)

    rules = daq.rules_for(run, {"up": HELD["up"]}, X, shape((T,), jnp.int32))
    assert rules[0].matrix == ((-2,), (-1,))
