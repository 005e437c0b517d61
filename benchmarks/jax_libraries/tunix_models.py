"""Tunix: Llama 3, Qwen 2 and 3 with and without experts, Gemma and Gemma 3."""

import jax
import jax.numpy as jnp
from flax import nnx

import daq_jax as daq
from benchmarks.jax_libraries.check import Case
from benchmarks.jax_libraries.stubs import stub

stub(
    "einops",
    "pandas",
    *("tensorflow", "tensorflow_datasets", "grain", "kagglehub", "datasets", "sentencepiece", "transformers"),
    *(
        "huggingface_hub",
        "perfetto",
        "PIL",
        "sympy",
        "tqdm",
        "wandb",
        "tenacity",
        "pylatexenc",
        "metrax",
        "numba",
    ),
    *("dotenv", "hf_transfer", "xprof", "tensorboard", "pathwaysutils", "tiktoken", "jinja2", "omegaconf"),
)

from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

PACKAGE = "google-tunix"
TOKENS, POSITIONS, MASK = jnp.array([[3, 7]]), jnp.array([[0, 1]]), jnp.tril(jnp.ones((1, 2, 2), bool))
SMALL = {"num_layers": 2, "embed_dim": 24, "hidden_dim": 28, "num_heads": 6, "head_dim": 8, "num_kv_heads": 3}
QWEN = {**SMALL, "vocab_size": 61, "rope_theta": 10000, "norm_eps": 1e-5}
GEMMA = {**SMALL, "num_embed": 61}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}


def case(cls, config):
    model = cls(config, rngs=nnx.Rngs(0))
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)

    def run(given):
        held = given if isinstance(given, nnx.Module) else nnx.merge(graph, given, rest, copy=True)
        try:
            return held(TOKENS, POSITIONS, None, MASK)[0]
        except TypeError:
            return held(TOKENS, positions=POSITIONS, cache=None, attention_mask=MASK)[0]

    return Case(weights, run, lambda q: daq.nnx_with(model, q), daq.TUNIX_RULES)


def of_gemma(**settings):
    given = {
        **GEMMA,
        "final_logit_softcap": None,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "attention_types": [gemma.AttentionType.GLOBAL] * 2,
        **settings,
    }
    return case(gemma.Gemma, gemma.ModelConfig(**given))


def of_gemma3():
    return case(gemma3.Gemma3, gemma3.ModelConfig(**GEMMA, sliding_window_size=8, param_dtype=jnp.float32))


MODELS = {
    "Llama 3": lambda: case(llama3.Llama3, llama3.ModelConfig(**QWEN, weight_tying=False)),
    "Qwen 2": lambda: case(qwen2.Qwen2, qwen2.ModelConfig(**QWEN)),
    "Qwen 3": lambda: case(qwen3.Qwen3, qwen3.ModelConfig(**QWEN)),
    "Qwen 3, experts": lambda: case(qwen3.Qwen3, qwen3.ModelConfig(**QWEN, **EXPERTS)),
    "Gemma, as many KV heads": lambda: of_gemma(num_kv_heads=6),
    "Gemma, fewer KV heads": lambda: of_gemma(),
    "Gemma 3": of_gemma3,
}
