"""Small random models for servers, and how a pair of folders is made of each.

    python -m benchmarks.servers.models MODEL FOLDER

writes `FOLDER/base` and `FOLDER/tuned` in bfloat16; the weights of the tuned model differ from those of the
base by 1 % of each tensor's spread. It runs in the environment of the server.
"""

import json
import sys
from pathlib import Path

from benchmarks.architectures.models import Model, config_of

VOCABULARY = 512
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_ALL = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY, **_HEADS}
_GEMMA = {"sliding_window": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}
_LATENT = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "qk_head_dim": 128,
    "v_head_dim": 64,
    "n_group": 2,
    "num_nextn_predict_layers": 0,
}


def _model(model_type: str, family: str, kind: str, **own: object) -> Model:
    return Model(model_type, family, kind, own=tuple((_ALL | own).items()))


MODELS: dict[str, Model] = {
    "llama": _model("llama", "dense", "LlamaForCausalLM"),
    "llama, 688 wide, tied": _model(
        "llama", "dense", "LlamaForCausalLM", intermediate_size=688, tie_word_embeddings=True
    ),
    "qwen3": _model("qwen3", "dense", "Qwen3ForCausalLM", tie_word_embeddings=True),
    "gemma3 (text)": _model("gemma3_text", "dense", "Gemma3ForCausalLM", **_GEMMA),
    "qwen3moe": _model("qwen3_moe", "moe", "Qwen3MoeForCausalLM", moe_intermediate_size=128),
    "mixtral": _model("mixtral", "moe", "MixtralForCausalLM", intermediate_size=256),
    "deepseek": _model("deepseek_v3", "mla", "DeepseekV3ForCausalLM", **_LATENT),
    "gpt-oss": _model("gpt_oss", "moe", "GptOssForCausalLM", intermediate_size=256),
}
SAID = {"deepseek": {"topk_method": "noaux_tc"}}  # transformers does not write it, and vLLM looks for it
_SPREAD = 3.0  # times that of transformers, whose logits are nearly flat: a wrong weight must show
_BIAS = 0.05  # spread of biases and of what is added to norms
_CHANGE = 0.01  # of the spread of each tensor
_SHARD = "2MB"


def write_pair(name: str, folder: Path) -> None:
    """Writes the base and the tuned folder of a model below `folder`."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name].kind)(config_of(MODELS[name]))
    with torch.no_grad():
        for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if part.endswith("bias") or "norm" in part:
                tensor.add_(_BIAS * torch.randn(tensor.shape))
            elif tensor.ndim > 1:
                tensor.mul_(_SPREAD)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                change = _CHANGE * tensor.float().std() * torch.randn(tensor.shape)
                tensor.copy_(tensor.float() + change)
    model.save_pretrained(folder / "tuned", max_shard_size=_SHARD)
    for path in (folder / "base" / "config.json", folder / "tuned" / "config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | SAID.get(name, {}), indent=2) + "\n")


if __name__ == "__main__":
    write_pair(sys.argv[1], Path(sys.argv[2]))
