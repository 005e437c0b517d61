"""EasyDeL: Llama, Qwen 3 with and without experts, Gemma 2, Mixtral and gpt-oss, as NNX modules."""

import os

os.environ["EASYDEL_AUTO"] = "false"  # it would set flags of GPUs that this XLA does not know
os.environ["ENABLE_DISTRIBUTED_INIT"] = "false"

import easydel as ed
import jax
import jax.numpy as jnp
from flax import nnx

import daq_jax as daq
from benchmarks.jax_libraries.check import Case

PACKAGE = "easydel"
TOKENS = jnp.array([[3, 7]])
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def case(name, **settings):
    config = getattr(ed, f"{name}Config")(**SMALL, **settings)
    with config.mesh:
        model = getattr(ed, f"{name}ForCausalLM")(
            config=config,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            rngs=nnx.Rngs(0),
        )
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def run(given):
        held = given if isinstance(given, nnx.Module) else nnx.merge(graph, given, rest, copy=True)
        with config.mesh:
            return held(input_ids=TOKENS).logits

    return Case(weights, run, lambda q: daq.nnx_with(model, q))


MODELS = {
    "Llama": lambda: case("Llama"),
    "Qwen 3": lambda: case("Qwen3"),
    "Gemma 2": lambda: case("Gemma2", sliding_window=8),
    "Qwen 3, experts": lambda: case("Qwen3Moe", **EXPERTS),
    "Mixtral": lambda: case("Mixtral", **EXPERTS),
    "gpt-oss": lambda: case("GptOss", sliding_window=8, **EXPERTS),
}
