"""Folders that other people's loaders read: transformers for blocks, compressed-tensors for channels."""

import json
import pathlib

import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.hf.folders import open_folder

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

TINY = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def pair(request, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A Llama-shaped model and a tuned one, as transformers saves them, in shards of different size."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=request.param, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned", max_shard_size="1MB")
    return folder / "base", folder / "tuned"


def dequantized(path: pathlib.Path, dtype: str) -> dict:
    """Every tensor of a folder as a float32 torch tensor, by our own reader; weights rounded to `dtype`."""
    import torch

    folder = open_folder(path)
    found = {name: folder.read(name) for name in folder.tensors}
    arrays = {n: x.dequantize(dtype) if isinstance(x, daq.QTensor) else x for n, x in found.items()}
    folder.close()
    return {n: torch.from_numpy(np.asarray(x).astype(np.float32)) for n, x in arrays.items()}


def logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(64).reshape(2, 32)).logits.float().numpy()


def by_our_weights(path: pathlib.Path, tuned: pathlib.Path, dtype: str):
    """The tuned model in `dtype`, with the weights of `path` as our reader dequantizes them."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=getattr(torch, dtype))
    missing, unexpected = model.load_state_dict(dequantized(path, dtype), strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    return model


def assert_same_weights(found, wanted) -> None:
    for name, weight in wanted.state_dict().items():
        assert found.state_dict()[name].dtype == weight.dtype
        np.testing.assert_array_equal(found.state_dict()[name].float(), weight.float(), err_msg=name)


def test_transformers_loads_blocks_and_computes_what_our_weights_say(pair, tmp_path):
    import transformers

    daq.quantize_folder(*pair, tmp_path / "out", daq.recipes.absmax, memory_gb=2)
    how = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=how)
    ours = by_our_weights(tmp_path / "out", pair[1], "bfloat16")
    assert_same_weights(loaded, ours)
    np.testing.assert_array_equal(logits(loaded), logits(ours))
    tuned = transformers.AutoModelForCausalLM.from_pretrained(pair[1])
    error = np.linalg.norm(logits(ours) - logits(tuned)) / np.linalg.norm(logits(tuned))
    assert 1e-3 < error < 0.1  # FP8 codes: neither the tuned weights nor noise


@pytest.mark.parametrize("layout", ["fp8-channel", "int8-channel"])
def test_compressed_tensors_decompresses_to_codes_times_scale(layout, pair, tmp_path):
    import torch
    import transformers

    daq.quantize_folder(*pair, tmp_path / "out", daq.recipes.absmax, format=layout, memory_gb=2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    stored = {name: w.dtype for name, w in loaded.state_dict().items() if name.endswith("_proj.weight")}
    expected = torch.int8 if layout == "int8-channel" else torch.float8_e4m3fn
    assert list(stored.values()) == [expected] * 14
    found = logits(loaded)  # the first forward pass decompresses
    assert_same_weights(loaded, by_our_weights(tmp_path / "out", pair[1], "float32"))
    assert np.isfinite(found).all()


def test_compressed_tensors_unpacks_int4_to_codes_times_scale(pair, tmp_path):
    import compressed_tensors.quantization
    import safetensors.torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    out = tmp_path / "out"
    report = daq.quantize_folder(*pair, out, daq.recipes.mse, format="int4-group", memory_gb=2)
    how = json.loads((out / "config.json").read_text())["quantization_config"]
    config = compressed_tensors.quantization.QuantizationConfig.model_validate(how)
    stored = {n: x for p in out.glob("*.safetensors") for n, x in safetensors.torch.load_file(p).items()}
    ours = dequantized(out, "float32")
    assert len(report["quantized"]) == 14
    for name in report["quantized"]:
        state = {f"weight{part}": stored[f"{name}{part}"] for part in ("_packed", "_scale", "_shape")}
        found = PackedQuantizationCompressor.decompress(state, config.config_groups["group_0"])["weight"]
        np.testing.assert_array_equal(found, ours[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_packed_int4_and_computes_what_our_weights_say(dtype, pair, tmp_path):
    import torch
    import transformers

    daq.quantize_folder(*pair, tmp_path / "out", daq.recipes.mse, format="int4-group", memory_gb=2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    assert sum(name.endswith("weight_packed") for name in loaded.state_dict()) == 14
    found = logits(loaded)  # the first forward pass decompresses
    ours = by_our_weights(tmp_path / "out", pair[1], dtype)
    assert_same_weights(loaded, ours)
    np.testing.assert_array_equal(found, logits(ours))


def test_transformers_loads_experts_and_fuses_them(tmp_path):
    import safetensors.torch
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        **{**TINY, "hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4},
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "tuned")
    report = daq.quantize_folder(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", daq.recipes.absmax, memory_gb=2
    )
    assert sum("experts" in name for name in report["quantized"]) == 2 * 4 * 3
    assert "model.layers.0.mlp.gate.weight" in report["kept"]
    how = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=how)
    weights = {n: w.to(torch.bfloat16) for n, w in dequantized(tmp_path / "out", "bfloat16").items()}
    safetensors.torch.save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    assert_same_weights(loaded, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
