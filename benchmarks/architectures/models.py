"""Models of transformers in tiny random form: the config of each class with small numbers in it."""

import contextlib
import dataclasses
from typing import Any

WIDTH, INNER, WORDS = 128, 256, 384
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "inner_dim", "d_inner"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), INNER),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"), 32),
    "global_head_dim": 32,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 48,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), WIDTH),
    **dict.fromkeys(("vocab_size", "padded_vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "topk_group"), 2),
    **dict.fromkeys(("n_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), 1),
    "eos_token_id": 2,
    **dict.fromkeys(("image_size", "img_size"), 32),
    "patch_size": 16,
    "sliding_window": 32,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A tiny model.

    Attributes:
        model_type: as its config has it.
        family: of the table: "dense", "moe", "mla", "hybrid", "conv1d", "vision-language",
            "encoder-decoder", "encoder", "vision" or "speech".
        kind: name of its class in transformers.
        inputs: what it is called with: "text", "seq2seq", "pixels", "sound" or "spectrum".
        own: numbers of its config, beside those that all models have; of a config inside it after a dot.
    """

    model_type: str
    family: str
    kind: str
    inputs: str = "text"
    own: tuple[tuple[str, Any], ...] = ()


def _model(model_type: str, family: str, kind: str, inputs: str = "text", **own: Any) -> Model:
    return Model(model_type, family, kind, inputs, tuple((k.replace("__", "."), v) for k, v in own.items()))


_CAUSAL = {
    "dense": (
        "llama:Llama mistral:Mistral qwen2:Qwen2 qwen3:Qwen3 gemma:Gemma gemma2:Gemma2 gemma3_text:Gemma3 "
        "phi:Phi phi3:Phi3 olmo2:Olmo2 glm4:Glm4 cohere:Cohere stablelm:StableLm starcoder2:Starcoder2 "
        "gpt_neox:GPTNeoX gptj:GPTJ opt:OPT bloom:Bloom falcon:Falcon mpt:Mpt granite:Granite "
        "smollm3:SmolLM3 exaone4:Exaone4 persimmon:Persimmon gpt_neo:GPTNeo codegen:CodeGen helium:Helium "
        "arcee:Arcee seed_oss:SeedOss ernie4_5:Ernie4_5 xglm:XGLM biogpt:BioGpt diffllama:DiffLlama "
        "olmo3:Olmo3 apertus:Apertus ministral:Ministral ministral3:Ministral3 vaultgemma:VaultGemma cwm:Cwm "
        "doge:Doge bitnet:BitNet jais2:Jais2 nanochat:NanoChat cohere2:Cohere2 nemotron:Nemotron "
        "hunyuan_v1_dense:HunYuanDenseV1 gemma3n_text:Gemma3n"
    ),
    "moe": (
        "mixtral:Mixtral qwen2_moe:Qwen2Moe qwen3_moe:Qwen3Moe olmoe:Olmoe phimoe:Phimoe gpt_oss:GptOss "
        "granitemoe:GraniteMoe glm4_moe:Glm4Moe ernie4_5_moe:Ernie4_5_Moe llama4_text:Llama4 "
        "minimax:MiniMax jetmoe:JetMoe flex_olmo:FlexOlmo minimax_m2:MiniMaxM2 exaone_moe:ExaoneMoe "
        "afmoe:Afmoe solar_open:SolarOpen granitemoeshared:GraniteMoeShared hy_v3:HYV3 laguna:Laguna "
        "zaya:Zaya cohere2_moe:Cohere2Moe dots1:Dots1 hunyuan_v1_moe:HunYuanMoEV1"
    ),
    "mla": (
        "deepseek_v2:DeepseekV2 deepseek_v3:DeepseekV3 minicpm3:MiniCPM3 longcat_flash:LongcatFlash "
        "youtu:Youtu deepseek_v32:DeepseekV32 deepseek_v4:DeepseekV4 glm4_moe_lite:Glm4MoeLite "
        "glm_moe_dsa:GlmMoeDsa hy_v4:HYV4"
    ),
    "hybrid": (
        "mamba:Mamba mamba2:Mamba2 jamba:Jamba bamba:Bamba falcon_h1:FalconH1 qwen3_next:Qwen3Next lfm2:Lfm2 "
        "recurrent_gemma:RecurrentGemma "
        "granitemoehybrid:GraniteMoeHybrid falcon_mamba:FalconMamba rwkv:Rwkv qwen3_5_text:Qwen3_5 "
        "qwen3_5_moe_text:Qwen3_5Moe olmo_hybrid:OlmoHybrid lfm2_moe:Lfm2Moe nemotron_h:NemotronH "
        "kimi_linear:KimiLinear"
    ),
    "conv1d": "gpt2:GPT2:LMHeadModel openai-gpt:OpenAIGPT:LMHeadModel gpt_bigcode:GPTBigCode",
}
_MLA = {"head_dim": 16, "num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "longcat_flash", "youtu", "minicpm3", "glm4_moe_lite", "hy_v4"), _MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _MLA | {"index_head_dim": 32}),
    **{kind: {"head_dim": 32} for kind in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "gemma3n_text": {
        "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "intermediate_size": [INNER] * 2,
        "activation_sparsity_pattern": [0.0] * 2,
    },
    "dots1": {
        **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "kimi_linear": _MLA | {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention", "moe"], "num_hidden_layers": 3},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 16},
    "mamba2": {"num_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": WIDTH},
    "rwkv": {"attention_hidden_size": WIDTH},
}


_MROPE = {
    "text_config__rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
}


def _causal() -> list[Model]:
    found = []
    for family, words in _CAUSAL.items():
        for word in words.split():
            model_type, name, *end = word.split(":")
            kind = name + (end[0] if end else "ForCausalLM")
            found.append(_model(model_type, family, kind, **_OWN.get(model_type, {})))
    return found


MODELS: tuple[Model, ...] = (
    *_causal(),
    _model("llava", "vision-language", "LlavaForConditionalGeneration"),
    _model("qwen2_vl", "vision-language", "Qwen2VLForConditionalGeneration", **_MROPE),
    _model("qwen2_5_vl", "vision-language", "Qwen2_5_VLForConditionalGeneration", **_MROPE),
    _model("qwen3_vl", "vision-language", "Qwen3VLForConditionalGeneration"),
    _model("gemma3", "vision-language", "Gemma3ForConditionalGeneration"),
    _model("mistral3", "vision-language", "Mistral3ForConditionalGeneration"),
    _model("internvl", "vision-language", "InternVLForConditionalGeneration"),
    _model("idefics3", "vision-language", "Idefics3ForConditionalGeneration"),
    _model("paligemma", "vision-language", "PaliGemmaForConditionalGeneration"),
    _model("t5", "encoder-decoder", "T5ForConditionalGeneration", "seq2seq"),
    _model("bart", "encoder-decoder", "BartForConditionalGeneration", "seq2seq"),
    _model("mbart", "encoder-decoder", "MBartForConditionalGeneration", "seq2seq"),
    _model("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", "seq2seq"),
    _model("marian", "encoder-decoder", "MarianMTModel", "seq2seq"),
    _model("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", "seq2seq"),
    _model("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", "seq2seq"),
    _model("bert", "encoder", "BertForMaskedLM"),
    _model("roberta", "encoder", "RobertaForMaskedLM"),
    _model("distilbert", "encoder", "DistilBertForMaskedLM", hidden_dim=INNER),
    _model("electra", "encoder", "ElectraForMaskedLM"),
    _model("deberta-v2", "encoder", "DebertaV2ForMaskedLM"),
    _model("modernbert", "encoder", "ModernBertForMaskedLM"),
    _model("albert", "encoder", "AlbertForMaskedLM"),
    _model("xlm-roberta", "encoder", "XLMRobertaForSequenceClassification"),
    _model("mpnet", "encoder", "MPNetModel"),
    _model("vit", "vision", "ViTForImageClassification", "pixels"),
    _model("siglip_vision_model", "vision", "SiglipVisionModel", "pixels"),
    _model("whisper", "speech", "WhisperForConditionalGeneration", "spectrum"),
    _model("wav2vec2", "speech", "Wav2Vec2ForCTC", "sound"),
    _model("hubert", "speech", "HubertForCTC", "sound"),
)


def config_of(model: Model) -> Any:
    """The config of a tiny model."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.AutoConfig.for_model(model.model_type)
    _shrink(config)
    for key, value in model.own:
        *inner, last = key.split(".")
        place = config
        for part in inner:
            place = getattr(place, part)
        setattr(place, last, value)
    return config


def _shrink(config: Any) -> None:
    """Puts small numbers into a config and into those inside it, and leaves the kinds of its layers two."""
    for key, value in _SMALL.items():
        before = getattr(config, key, None)
        if before is not None:
            _set(config, key, [value] * len(before) if isinstance(before, (list, tuple)) else value)
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(config, key, None)
        if isinstance(kinds, list) and kinds:
            _set(config, key, [kinds[0], kinds[-1]])
    rope = getattr(config, "rope_parameters", None)
    for part in [rope, *rope.values()] if isinstance(rope, dict) else []:
        if isinstance(part, dict) and "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = 64
    for inner in list(vars(config).values()):
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            _shrink(inner)


def _set(config: Any, key: str, value: Any) -> None:
    with contextlib.suppress(AttributeError, NotImplementedError):  # a property of other numbers
        setattr(config, key, value)


def built(model: Model) -> Any:
    """The model, with random weights in float32."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    return getattr(transformers, model.kind)(config_of(model)).float().eval()


def outputs_of(model: Model, loaded: Any) -> Any:
    """Logits, or the last hidden states of a model without a head, as a float32 array."""
    import torch  # pyright: ignore[reportMissingImports]

    words = torch.arange(3, 51).reshape(2, 24)
    how: dict[str, Any] = {"text": {"input_ids": words}}.get(model.inputs, {})
    if model.inputs == "seq2seq":
        how = {"input_ids": words, "decoder_input_ids": words[:, :8]}
    generator = torch.Generator().manual_seed(1)
    if model.inputs == "pixels":
        how = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if model.inputs == "sound":
        how = {"input_values": torch.randn(2, 4000, generator=generator)}
    if model.inputs == "spectrum":
        features = torch.randn(2, loaded.config.num_mel_bins, 128, generator=generator)
        how = {"input_features": features, "decoder_input_ids": words[:, :8]}
    with torch.no_grad():
        found = loaded.eval()(**how)
    logits = getattr(found, "logits", None)
    return (found.last_hidden_state if logits is None else logits).float().numpy()
