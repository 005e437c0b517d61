"""The default rules on the layers of Flax, and the rule sets for MaxText's and Tunix's trees."""

import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import daq_jax as daq
from daq_jax.trees import named_leaves
from tests.cases import is_qtensor

CHANNEL = daq.Recipe(tiling=daq.Channel())
LAST_TWO = ((-2,), (-1,))


def matrices(tree, rules=daq.DEFAULT_RULES):
    """Matrix of each quantized leaf by path; of shapes alone, as nothing is computed."""
    q = jax.eval_shape(lambda t: daq.quantize(t, t, CHANNEL, rules=rules), tree)
    return {path: x.matrix for path, x in named_leaves(q).items() if is_qtensor(x)}


def shapes(tree):
    """A nested dict of shapes, as arrays would have them; "a/b" stands for nesting."""
    out = {}
    for path, shape in tree.items():
        node = out
        *words, last = path.split("/")
        for word in words:
            node = node.setdefault(word, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return out


# --- Linen --------------------------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 24)(tokens)
        x = nn.LayerNorm()(x) + nn.RMSNorm()(x)
        x = nn.GroupNorm(4)(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(24, (3,))(x) + nn.Conv(24, (3, 3))(x[None])[0]
        x = nn.MultiHeadDotProductAttention(4)(x)
        x = nn.DenseGeneral((4, 6), name="query")(x)
        x = nn.DenseGeneral(24, axis=(-2, -1), name="out")(x)
        return nn.Dense(32, name="lm_head")(nn.Dense(24)(x))


LINEN = {
    "params/Conv_0/kernel": ((-3, -2), (-1,)),
    "params/Conv_1/kernel": ((-4, -3, -2), (-1,)),
    "params/Dense_0/kernel": LAST_TWO,
    "params/query/kernel": ((-3,), (-2, -1)),
    "params/out/kernel": ((-3, -2), (-1,)),
    **{
        f"params/MultiHeadDotProductAttention_0/{n}/kernel": ((-3,), (-2, -1))
        for n in ("query", "key", "value")
    },
    "params/MultiHeadDotProductAttention_0/out/kernel": ((-3, -2), (-1,)),
}


def test_default_rules_know_the_layers_of_linen():
    tree = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((2, 5), jnp.int32))
    assert matrices(tree) == LINEN


def test_default_rules_know_layers_of_linen_stacked_on_the_first_axis():
    stack = nn.vmap(Linen, {"params": 0, "batch_stats": 0}, {"params": True}, in_axes=None, axis_size=3)
    tree = jax.eval_shape(stack().init, jax.random.key(0), jnp.zeros((2, 5), jnp.int32))
    assert matrices(tree) == LINEN  # the norms tell a stack of [width, in, out] from [height, width, in, out]


# --- NNX ----------------------------------------------------------------------------------------------------


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(32, 24, rngs=rngs)
        self.norm1, self.ln_2 = nnx.LayerNorm(24, rngs=rngs), nnx.RMSNorm(24, rngs=rngs)
        self.bn = nnx.BatchNorm(24, rngs=rngs)
        self.conv1 = nnx.Conv(24, 24, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 24, decode=False, rngs=rngs)
        self.linear = nnx.Linear(24, 48, rngs=rngs)
        self.adapted = nnx.LoRALinear(24, 48, lora_rank=2, rngs=rngs)
        self.einsum = nnx.Einsum("btd,df->btf", (24, 24), rngs=rngs)
        self.head = nnx.Linear(24, 32, rngs=rngs)


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stacked"])
def test_default_rules_know_the_layers_of_nnx(stacked):
    make = nnx.vmap(NNX) if stacked else NNX
    state = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0).split(3) if stacked else nnx.Rngs(0))))
    assert matrices(nnx.to_pure_dict(nnx.filter_state(state, nnx.Not(nnx.RngState)))) == {
        "conv1/kernel": ((-4, -3, -2), (-1,)),
        **{f"attention/{name}/kernel": ((-3,), (-2, -1)) for name in ("query", "key", "value")},
        "attention/out/kernel": ((-3, -2), (-1,)),
        "linear/kernel": LAST_TWO,
        "adapted/kernel": LAST_TWO,
        "einsum/kernel": LAST_TWO,
    }


# --- MaxText and Tunix --------------------------------------------------------------------------------------

D, L, HEADS, KV, HEAD, F, E, V = 64, 3, 4, 2, 16, 96, 5, 128
HEADS_IN, HEADS_OUT = ((-3,), (-2, -1)), ((-3, -2), (-1,))
# Shape of a leaf, and its matrix, or None where it is kept.
MAXTEXT_SCANNED = {
    "params/token_embedder/embedding": ((V, D), None),
    "params/decoder/decoder_norm/scale": ((D,), None),
    "params/decoder/logits_dense/kernel": ((D, V), None),
    "params/decoder/layers/pre_self_attention_layer_norm/scale": ((D, L), None),
    "params/decoder/layers/self_attention/query/kernel": ((D, L, HEADS, HEAD), ((-4,), (-2, -1))),
    "params/decoder/layers/self_attention/query/bias": ((L, HEADS, HEAD), None),
    "params/decoder/layers/self_attention/key/kernel": ((D, L, KV, HEAD), ((-4,), (-2, -1))),
    "params/decoder/layers/self_attention/value/kernel": ((D, L, KV, HEAD), ((-4,), (-2, -1))),
    "params/decoder/layers/self_attention/out/kernel": ((HEADS, L, HEAD, D), ((-4, -2), (-1,))),
    "params/decoder/layers/self_attention/query_norm/scale": ((HEAD, L), None),
    "params/decoder/layers/mlp/wi_0/kernel": ((D, L, F), ((-3,), (-1,))),
    "params/decoder/layers/mlp/wi_1/kernel": ((D, L, F), ((-3,), (-1,))),
    "params/decoder/layers/mlp/wo/kernel": ((F, L, D), ((-3,), (-1,))),
    "params/decoder/layers/moe_block/gate/kernel": ((D, L, E), None),
    "params/decoder/layers/moe_block/wi_0": ((E, L, D, F), LAST_TWO),
    "params/decoder/layers/moe_block/wo": ((E, L, F, D), LAST_TWO),
}
MAXTEXT = {
    "decoder/layers_0/self_attention/query/kernel": ((D, HEADS, HEAD), HEADS_IN),
    "decoder/layers_0/self_attention/out/kernel": ((HEADS, HEAD, D), HEADS_OUT),
    "decoder/layers_0/mlp/wi_0/kernel": ((D, F), LAST_TWO),
    "decoder/layers_0/mlp/wo/kernel": ((F, D), LAST_TWO),
    "decoder/layers_0/moe_block/wi_0": ((E, D, F), LAST_TWO),
    "decoder/layers_0/moe_block/gate/kernel": ((D, E), None),
}
TUNIX = {
    "embedder/input_embedding": ((V, D), None),
    "layers/0/input_layernorm/w": ((D,), None),
    "layers/0/attn/q_proj/w": ((D, HEADS, HEAD), HEADS_IN),
    "layers/0/attn/q_proj/w_lora_a": ((D, 8), None),
    "layers/0/attn/k_proj/w": ((D, KV, HEAD), HEADS_IN),
    "layers/0/attn/v_proj/w": ((D, KV, HEAD), HEADS_IN),
    "layers/0/attn/o_proj/w": ((HEADS, HEAD, D), HEADS_OUT),
    "layers/0/attn/q_norm/w": ((HEAD,), None),
    "layers/0/mlp/gate_proj/kernel": ((D, F), LAST_TWO),
    "layers/0/mlp/down_proj/kernel": ((F, D), LAST_TWO),
    "layers/0/mlp/router/kernel": ((D, E), None),
    "layers/1/mlp/gate_proj": ((E, D, F), LAST_TWO),
    "layers/1/attn/q_einsum/w": ((HEADS, D, HEAD), ((-2,), (-3, -1))),
    "layers/1/attn/kv_einsum/w": ((2, KV, D, HEAD), ((-2,), (-3, -1))),
    "layers/1/attn/attn_vec_einsum/w": ((HEADS, HEAD, D), HEADS_OUT),
    "lm_head/w": ((D, V), None),
}
TREES = {
    "maxtext scanned": (MAXTEXT_SCANNED, daq.MAXTEXT_RULES),
    "maxtext": (MAXTEXT, daq.MAXTEXT_RULES),
    "tunix": (TUNIX, daq.TUNIX_RULES),
}


@pytest.mark.parametrize("name", TREES)
def test_the_named_rules_know_their_trees(name):
    tree, rules = TREES[name]
    wanted = {path: matrix for path, (_, matrix) in tree.items() if matrix is not None}
    assert matrices(shapes({path: shape for path, (shape, _) in tree.items()}), rules) == wanted


@pytest.mark.slow
def test_a_stack_on_the_second_axis_has_its_codes_and_its_scales_where_each_belongs():
    """Layer by layer the codes and scales are those of the layer alone."""
    rng = np.random.default_rng(0)
    paths = {p: s for p, (s, m) in MAXTEXT_SCANNED.items() if m is not None}
    base = {p: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for p, s in paths.items()}
    q = daq.quantize(base, base, daq.Recipe(tiling=daq.Block(32, 32)), rules=daq.MAXTEXT_RULES)
    alone = {p: x.take(1, axis=1) for p, x in base.items()}
    one = daq.quantize(alone, alone, daq.Recipe(tiling=daq.Block(32, 32)), rules=daq.MAXTEXT_RULES)
    for path in paths:
        layer = np.asarray(q[path].dequantize()).take(1, axis=1)
        np.testing.assert_array_equal(layer, one[path].dequantize(), err_msg=path)
        first = q[path].scale.shape.index(L)  # the stack leads in the scale, but for experts
        np.testing.assert_array_equal(np.asarray(q[path].scale).take(1, first), one[path].scale, err_msg=path)


@pytest.mark.parametrize("name", [name for name in daq.__all__ if name.endswith("_RULES")])
def test_a_set_of_rules_is_shown_by_its_name_and_printed_as_a_table(name):
    rules = getattr(daq, name)
    assert repr(rules) == f"daq_jax.{name}"
    heading, *lines = str(rules).splitlines()
    assert heading.split("  ")[0] == "rule"
    assert [line.endswith(rule.pattern) for line, rule in zip(lines, rules, strict=True)] == [True] * len(
        rules
    )
    again = pickle.loads(pickle.dumps(rules))
    assert again == rules == tuple(rules)
    assert repr(again) == repr(rules)


def test_the_signature_of_quantize_is_short():
    assert len(str(inspect.signature(daq.quantize))) < 500
