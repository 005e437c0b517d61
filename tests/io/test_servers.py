"""Folders that other people's loaders read: transformers for blocks, compressed-tensors for channels."""

import json
import pathlib

import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.folders import open_folder

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


def dequantized(path: pathlib.Path) -> dict:
    """Every tensor of a folder as a float32 torch tensor, by our own reader."""
    import torch

    folder = open_folder(path)
    found = {name: folder.read(name) for name in folder.tensors}
    arrays = {n: x.dequantize() if isinstance(x, daq.QTensor) else x for n, x in found.items()}
    folder.close()
    return {n: torch.from_numpy(np.asarray(x).astype(np.float32)) for n, x in arrays.items()}


def test_transformers_loads_blocks_and_computes_what_our_weights_say(pair, tmp_path):
    import torch
    import transformers

    daq.quantize_folder(*pair, tmp_path / "out", daq.recipes.absmax, memory_gb=2)
    how = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=how)
    ours = transformers.AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.bfloat16)
    weights = dequantized(tmp_path / "out")
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        found, wanted = loaded.eval()(ids).logits.float(), ours.eval()(ids).logits.float()
    # transformers rounds each scale to bfloat16 before it multiplies.
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
    tuned = transformers.AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.bfloat16)
    with torch.no_grad():
        assert (tuned(ids).logits.float() - wanted).norm() > 0  # it was quantized at all


@pytest.mark.parametrize("layout", ["fp8-channel", "int8-channel"])
def test_compressed_tensors_decompresses_to_codes_times_scale(layout, pair, tmp_path):
    import torch
    import transformers
    from compressed_tensors.compressors import ModelCompressor

    daq.quantize_folder(*pair, tmp_path / "out", daq.recipes.absmax, format=layout, memory_gb=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ModelCompressor.from_pretrained(str(tmp_path / "out")) is not None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert config["quant_method"] == "compressed-tensors"
    weights = {n: w for n, w in loaded.state_dict().items() if n.endswith("_proj.weight")}
    print(loaded)
    print({n: (w.dtype, w.shape) for n, w in loaded.state_dict().items()})
    assert len(weights) == 14
