"""DeepMind's `gemma`: Gemma 1 to 4 and 3n, with both orders of axes that `gating_einsum` has."""

import dataclasses

import jax
import jax.numpy as jnp

import daq_jax as daq
from benchmarks.jax_libraries.check import Case
from benchmarks.jax_libraries.stubs import stub

stub("tensorflow", "grain", "mediapy")  # data loaders and pictures

from gemma.gm.nn import _config, _modules, _transformer
from gemma.gm.nn.gemma3n import _config as config_3n
from gemma.gm.nn.gemma3n import _transformer as transformer_3n
from gemma.gm.nn.gemma4 import _config as config_4
from gemma.gm.nn.gemma4 import _transformer as transformer_4

PACKAGE = "gemma"
TOKENS = jnp.array([[3, 7]])
LOCAL, GLOBAL = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
SMALL = {
    "num_embed": 61,
    "embed_dim": 24,
    "hidden_dim": 28,
    "num_heads": 6,
    "head_dim": 8,
    "num_kv_heads": 3,
    "final_logit_softcap": None,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (LOCAL, GLOBAL),
    "sliding_window_size": 8,
}


def case(cls, config, **settings):
    known = {field.name for field in dataclasses.fields(config)}
    kinds = {"attention_types": tuple(_kind(config, kind) for kind in SMALL["attention_types"])}
    given = {name: value for name, value in (SMALL | kinds | settings).items() if name in known}
    model = cls(config=config(**given), dtype=jnp.float32)
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), model.init(jax.random.key(0), TOKENS)["params"])

    def run(weights):
        return model.apply({"params": weights}, TOKENS).logits

    return Case(weights, run, daq.linen_variables, daq.GEMMA_RULES)


def _kind(config, kind):
    """A kind of attention, in the enumeration of the module that a configuration is of."""
    module = {config_3n.TransformerConfig: config_3n, config_4.TransformerConfig: config_4}.get(
        config, _config
    )
    return module._modules.AttentionType[kind.name]


def gemma(**settings):
    return case(_transformer.Transformer, _config.TransformerConfig, **settings)


def gemma_3n():
    return case(
        transformer_3n.Gemma3nTransformer,
        config_3n.TransformerConfig,
        transpose_gating_einsum=True,
        use_qk_norm=True,
        use_value_norm=True,
        use_altup=True,
        altup_coef_clip=120.0,
        per_layer_input_dim=10,
        use_laurel=True,
        laurel_rank=7,
        scale_plus_one=False,
        guard_against_excess_precision=True,
    )


def gemma_4(**settings):
    return case(
        transformer_4.Transformer,
        config_4.TransformerConfig,
        global_key_size=8,
        global_rope_proportion=1.0,
        local_rope_proportion=1.0,
        **settings,
    )


MODELS = {
    "Gemma 1": lambda: gemma(num_kv_heads=6, use_post_attn_norm=False, use_post_ffw_norm=False),
    "Gemma 2 2B": gemma,
    "Gemma 2 27B, transposed": lambda: gemma(transpose_gating_einsum=True),
    "Gemma 3": lambda: gemma(transpose_gating_einsum=True, use_qk_norm=True),
    "Gemma 3n": gemma_3n,
    "Gemma 4": lambda: gemma_4(per_layer_input_dim=10),
    "Gemma 4, experts": lambda: gemma_4(
        enable_moe=True, num_experts=5, expert_dim=20, top_k_experts=2, moe_dense_hidden_dim=26
    ),
}
