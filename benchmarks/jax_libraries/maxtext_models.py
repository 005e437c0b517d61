"""MaxText: decoders with scanned layers, as is its default, in one stack and in stacks of stacks."""

import logging
import os

import jax.numpy as jnp
from flax import nnx

import daq_jax as daq
from benchmarks.jax_libraries.check import Case
from benchmarks.jax_libraries.stubs import stub

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
stub(
    *("tensorflow", "tensorflow_datasets", "grain", "kagglehub", "datasets", "sentencepiece", "transformers"),
    *("huggingface_hub", "perfetto", "PIL", "sympy", "xprof", "tensorboard", "pathwaysutils", "tiktoken"),
    *("drjax", "tokamax", "tokenizers", "fastapi", "jinja2"),
)
logging.disable(logging.WARNING)

import maxtext
from maxtext.configs import pyconfig
from maxtext.utils import model_creation_utils

PACKAGE = "maxtext"
TOKENS, POSITIONS, SEGMENTS = jnp.array([[3, 7]]), jnp.array([[0, 1]]), jnp.ones((1, 2), jnp.int32)
BASE = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
SMALL = {
    "run_name": "tiny",
    "enable_checkpointing": False,
    "base_emb_dim": 24,
    "base_mlp_dim": 28,
    "base_num_query_heads": 6,
    "base_num_kv_heads": 3,
    "head_dim": 8,
    "base_num_decoder_layers": 4,
    "vocab_size": 64,
    "max_target_length": 8,
    "max_prefill_predict_length": 4,
    "per_device_batch_size": 1,
    "dtype": "float32",
    "weight_dtype": "float32",
    "attention": "dot_product",
    "skip_jax_distributed_system": True,
    "override_model_config": True,
    "matmul_precision": "highest",
    "hardware": "cpu",
    "logits_dot_in_fp32": True,
    "remat_policy": "full",
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "base_moe_mlp_dim": 20, "sparse_matmul": False}


def case(**settings):
    config = pyconfig.initialize([None, BASE], **{**SMALL, **settings})
    model = model_creation_utils.from_config(config, rngs=nnx.Rngs(params=0, dropout=1, aqt=2))
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def run(given):
        held = given if isinstance(given, nnx.Module) else nnx.merge(graph, given, rest, copy=True)
        out = held(TOKENS, POSITIONS, SEGMENTS, enable_dropout=False)
        return out[0] if isinstance(out, tuple) else out

    return Case(weights, run, lambda q: daq.nnx_with(model, q), daq.MAXTEXT_RULES)


def qwen3_next():
    return case(
        decoder_block="qwen3_next",
        **{
            **EXPERTS,
            "base_num_decoder_layers": 8,
            "shared_experts": 1,
            "inhomogeneous_layer_cycle_interval": 4,
        },
        gdn_num_key_heads=3,
        gdn_num_value_heads=6,
        gdn_key_head_dim=8,
        gdn_value_head_dim=8,
        gdn_conv_kernel_dim=4,
        gdn_chunk_size=4,
        partial_rotary_factor=0.5,
    )


def gpt_oss():
    return case(
        decoder_block="gpt_oss",
        **{
            **EXPERTS,
            "attention_bias": True,
            "attention_sink": True,
            "mlp_activations": ["sigmoid", "linear"],
            "mlp_activations_limit": 7.0,
        },
        sliding_window_size=8,
        inhomogeneous_layer_cycle_interval=2,
    )


def gemma4():
    return case(
        decoder_block="gemma4",
        base_num_decoder_layers=12,
        sliding_window_size=8,
        global_head_dim=8,
        global_num_kv_heads=3,
    )


def deepseek():
    return case(
        decoder_block="deepseek",
        attention_type="mla",
        q_lora_rank=14,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
        **{**EXPERTS, "base_num_kv_heads": 6, "shared_experts": 1, "first_num_dense_layers": 1},
    )


def gpt_3():
    return case(
        decoder_block="gpt3",
        fused_qkv=True,
        base_num_kv_heads=6,
        trainable_position_size=16,
        mlp_activations=["gelu"],
    )


MODELS = {
    "Llama 2": lambda: case(),
    "Llama 2, not scanned": lambda: case(scan_layers=False),
    "Llama 2, fused": lambda: case(fused_qkv=True, fused_mlp=True, base_num_kv_heads=6),
    "Mixtral": lambda: case(
        decoder_block="mixtral", **{**EXPERTS, "base_moe_mlp_dim": 28, "capacity_factor": -1.0}
    ),
    "Gemma 4": gemma4,
    "Qwen3-Next": qwen3_next,
    "gpt-oss": gpt_oss,
    "DeepSeek": deepseek,
    "GPT-3": gpt_3,
    "Gemma 3": lambda: case(model_name="gemma3-4b", base_num_decoder_layers=8),
    "Qwen 3, experts": lambda: case(decoder_block="qwen3_moe", use_qk_norm=True, **EXPERTS),
}
