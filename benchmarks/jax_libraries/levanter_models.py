"""Levanter: Llama, GPT-2 and Mixtral, whose layers are Haliax's, in a `BlockSeq` and in a `Stacked`.

A `Stacked` is dequantized inside `jit`, as Haliax's scan indexes the array within each `NamedArray`.
"""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from levanter.layers.attention import AttentionMask
from levanter.models import gpt2, llama, mixtral, qwen

import daq_jax as daq
from benchmarks.jax_libraries.check import Case
from benchmarks.jax_libraries.equinox_models import daq_leaf

PACKAGE = "marin-levanter"
VOCABULARY = hax.Axis("vocab", 61)
jax.set_mesh(
    jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
)  # for Mixtral's experts
SMALL = {
    "max_seq_len": 16,
    "hidden_dim": 24,
    "intermediate_dim": 28,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "gradient_checkpointing": False,
    "attn_pdrop": 0.0,
    "embed_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "use_gmm": False,
}


def case(config, **settings):
    known = {field.name for field in dataclasses.fields(config)}
    given = config(**{name: value for name, value in (SMALL | settings).items() if name in known})
    model = given.model_type.init(VOCABULARY, given, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tokens = hax.named(jnp.array([3, 7]), hax.Axis("position", 2))
    stacked = settings.get("scan_layers", True)

    def run(arrays):
        model = eqx.combine(daq.dequantize(arrays) if stacked else arrays, static, is_leaf=daq_leaf)
        with hax.axis_mapping({}):
            return model(tokens, attn_mask=AttentionMask.causal(), key=None).array

    return Case(arrays, run)


MODELS = {
    "Llama, Stacked, dequantized in jit": lambda: case(llama.LlamaConfig),
    "Llama, BlockSeq": lambda: case(llama.LlamaConfig, scan_layers=False),
    "Qwen 2, BlockSeq": lambda: case(qwen.QwenConfig, scan_layers=False),
    "GPT-2, Stacked, dequantized in jit": lambda: case(gpt2.Gpt2Config),
    "Mixtral, Stacked, dequantized in jit": lambda: case(mixtral.MixtralConfig),
}
