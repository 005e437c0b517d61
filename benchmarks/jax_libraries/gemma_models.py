"""DeepMind's `gemma`: the orders of `gating_einsum` of Gemma 1 and of later ones, and Gemma 4."""

import dataclasses

import jax
import jax.numpy as jnp

import daq_jax as daq
from benchmarks.jax_libraries.check import Case
from benchmarks.jax_libraries.stubs import stub

stub(
    "ml_collections",
    "tqdm",
    "requests",
    "clu",
    "immutabledict",
    "dialog",
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "kagglehub",
    "sentencepiece",
    "tokenizers",
    "PIL",
)

from gemma.gm.nn import _config, _modules
from gemma.gm.nn._transformer import Transformer
from gemma.gm.nn.gemma4 import _config as config4
from gemma.gm.nn.gemma4 import _modules as modules4
from gemma.gm.nn.gemma4 import _transformer as transformer4
from kauldron import ktyping

PACKAGE = "gemma"
TOKENS = jnp.array([[3, 7]])
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
}


def case(cls, config):
    model = cls(config=config, dtype=jnp.float32, tokens="x")
    with ktyping.config.Config(typechecking_enabled=False):
        weights = model.init(jax.random.key(0), TOKENS)

    def run(weights):
        with ktyping.config.Config(typechecking_enabled=False):  # whose version of typeguard is another
            out = model.apply(weights, TOKENS)
        return getattr(out, "logits", out)

    return Case(weights, run, daq.linen_variables, daq.GEMMA_RULES)


def until_3(**settings):
    kinds = [_modules.AttentionType.GLOBAL] * 2
    return case(Transformer, _config.TransformerConfig(**{**SMALL, "attention_types": kinds, **settings}))


def gemma_4(**settings):
    kind = modules4.AttentionType
    known = {f.name for f in dataclasses.fields(config4.TransformerConfig)}
    given = {
        **SMALL,
        "global_key_size": 8,
        "attention_types": [kind.LOCAL_SLIDING, kind.GLOBAL],
        "sliding_window_size": 8,
        "global_rope_proportion": 1.0,
        "local_rope_proportion": 1.0,
        **settings,
    }
    config = config4.TransformerConfig(**{name: x for name, x in given.items() if name in known})
    return case(transformer4.Transformer, config)


MODELS = {
    "Gemma 1": lambda: until_3(num_kv_heads=6, use_post_attn_norm=False, use_post_ffw_norm=False),
    "Gemma 2 and 3, transposed gate": lambda: until_3(transpose_gating_einsum=True, use_qk_norm=True),
    "Gemma 4, per-layer inputs": lambda: gemma_4(per_layer_input_dim=10),
}
