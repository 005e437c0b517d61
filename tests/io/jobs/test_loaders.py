"""Folders in layouts of 4 and 8 bits, loaded by transformers' own dequantizing loaders.

The oracle is the tuned model with weights decoded by `tests.native_folders`: both have the same logits.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

import daq_jax as daq
from tests import native_folders
from tests.cases import rng_for
from tests.hf_folders import Tensors, normal, read_tensors, stored, write_folder
from tests.native_folders import Native, packed

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

WIDTH = 128  # of every matrix, so that programs are compiled once
COMMON = {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64, "dtype": "float32"}
LLAMA = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 4}
OSS = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
OSS |= {"head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 2}
V4 = {"hidden_size": WIDTH, "moe_intermediate_size": WIDTH, "head_dim": WIDTH, "num_attention_heads": 1}
V4 |= {"q_lora_rank": WIDTH, "o_lora_rank": WIDTH, "o_groups": 1, "n_routed_experts": 2}
V4 |= {
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention"],
    "mlp_layer_types": ["moe"],
    "hc_mult": 2,
}

OF_WEIGHT: dict[str, Callable[[str], Native]] = {
    "mxfp4": lambda name: native_folders.mxfp4_pack(name, WIDTH, WIDTH),
    "mxfp8": lambda name: native_folders.fp8(name, WIDTH, WIDTH, "mxfp8"),
    "nvfp4": lambda name: native_folders.nvfp4_pack(name, WIDTH, WIDTH),
    "int4-group32": lambda name: packed(name, WIDTH, WIDTH, 4, 32, np.int64),
    "int4-group64": lambda name: packed(name, WIDTH, WIDTH, 4, 64, np.int64),
    "int8-group32": lambda name: packed(name, WIDTH, WIDTH, 8, 32, np.int64),
    "fp8-block-ue8m0": lambda name: native_folders.fp8(name, WIDTH, WIDTH, "ue8m0"),
}
# compressed-tensors multiplies in the dtype of the scales, that of NVFP4 in bfloat16. Only where a base has
# bfloat16 scales, or a factor that is no power of two, are its weights rounded: to half a unit of bfloat16.
ROUNDED = 2**-8


@dataclasses.dataclass(frozen=True)
class Case:
    """A model: its class and config, and the layout of the weights that are quantized."""

    layout: str
    kind: str
    config: dict
    natives: tuple[Native, ...]
    how: dict  # what the config of the base says of quantization

    def model(self):
        import torch
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(**COMMON, **self.config)
        torch.manual_seed(0)
        return getattr(transformers, f"{self.kind}ForCausalLM")(config)


def case_of(layout: str) -> Case:
    if layout == "gpt-oss":
        where = "model.layers.0.mlp.experts"
        natives = (
            native_folders.gpt_oss(f"{where}.gate_up_proj", 2, 128, 64),
            native_folders.gpt_oss(f"{where}.down_proj", 2, 64, 64),
        )
        return Case(layout, "GptOss", OSS, natives, natives[0].config)
    if layout == "deepseek-v4":
        attention = [f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
        plain = [*attention, *(f"ffn.shared_experts.w{i}" for i in (1, 2, 3))]
        experts = [f"ffn.experts.{e}.w{i}" for e in (0, 1) for i in (1, 2, 3)]
        natives = tuple(native_folders.fp8(f"model.layers.0.{x}.weight", WIDTH, WIDTH, "v4") for x in plain)
        natives += tuple(
            native_folders.v4_experts(f"model.layers.0.{x}.weight", WIDTH, WIDTH) for x in experts
        )
        return Case(layout, "DeepseekV4", V4, natives, natives[0].config | {"expert_dtype": "fp4"})
    modules = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    natives = tuple(OF_WEIGHT[layout](f"model.layers.0.{module}.weight") for module in modules)
    how = {"quantization_status": "compressed"} | natives[0].config
    return Case(layout, "Llama", LLAMA, natives, how | {"modules_to_not_convert": ["lm_head"]})


def laid_out(native: Native, weight: np.ndarray) -> np.ndarray:
    """A weight `[..., out, in]` as the model holds it, or the inverse."""
    return np.ascontiguousarray(np.swapaxes(weight, -1, -2)) if native.turned else weight


def folders(path: pathlib.Path, case: Case, fresh: bool) -> tuple[pathlib.Path, pathlib.Path]:
    """A base, plain or in the layout, and a tuned model in float32 whose change is of rank 2."""
    case.model().save_pretrained(path / "made")
    made, config = read_tensors(path / "made"), json.loads((path / "made" / "config.json").read_text())
    rest = {name: x for name, x in made.items() if name not in {n.name for n in case.natives}}
    coded: Tensors = {}
    before, after = dict(rest), dict(rest)
    for i, native in enumerate(case.natives):
        tensors = native.make(rng_for(f"{case.layout} {i}"))
        weight = native.decode(tensors)
        *batch, outputs, inputs = weight.shape
        change = normal(i, *batch, outputs, 2) @ normal(i + 50, *batch, 2, inputs)
        coded |= tensors
        before[native.name] = laid_out(native, weight)
        after[native.name] = laid_out(native, weight + 2e-3 * change)
    base = before if fresh else rest | coded
    how = {} if fresh else {"quantization_config": case.how}
    return (
        write_folder(path / "base", [base], config | how),
        write_folder(path / "tuned", [after], config),
    )


def logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(48).reshape(2, 24)).logits.float().numpy()


def decoded(out: pathlib.Path, case: Case, config: dict):
    """The model with the weights of a folder as the decoders of the tests read them."""
    import torch
    import transformers

    read = read_tensors(out)
    parts = {part for n in case.natives for part in n.make(rng_for("names"))}
    state = {name: x for name, x in read.items() if name not in parts}
    state |= {n.name: laid_out(n, n.decode(read)).astype(np.float32) for n in case.natives}
    path = write_folder(out.with_name("decoded"), [state], config)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def dequantizing(case: Case):
    import transformers

    if case.layout == "gpt-oss":
        return transformers.Mxfp4Config(dequantize=True)
    fine = case.layout.startswith(("fp8-block", "deepseek"))
    kind = transformers.FineGrainedFP8Config if fine else transformers.CompressedTensorsConfig
    return kind(dequantize=True)


@pytest.mark.parametrize("fresh", [True, False], ids=["target", "as-base"])
@pytest.mark.parametrize("layout", [*OF_WEIGHT, "gpt-oss", "deepseek-v4"])
def test_transformers_dequantizes_to_what_the_definitions_say(layout, fresh, tmp_path):
    import torch
    import transformers

    case = case_of(layout)
    base, tuned = folders(tmp_path, case, fresh)
    out = tmp_path / "out"
    report = daq.quantize_folder(
        base, tuned, out, daq.recipes.absmax, format=layout if fresh else None, memory_gb=2
    )
    assert report["quantized"].keys() == {native.name for native in case.natives}
    if not fresh:
        assert stored(out).keys() == stored(base).keys()
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        out, quantization_config=dequantizing(case), dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    ours = decoded(out, case, json.loads((tuned / "config.json").read_text()))
    precision = ROUNDED if not fresh and layout.startswith(("nvfp4", "int")) else 1e-6
    for name, weight in ours.state_dict().items():
        np.testing.assert_allclose(loaded.state_dict()[name], weight, rtol=precision, err_msg=name)
    found, wanted = logits(loaded), logits(ours)
    np.testing.assert_allclose(found, wanted, atol=10 * precision * np.abs(wanted).max())
    tuned_model = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    error = np.linalg.norm(wanted - logits(tuned_model)) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.5  # codes: neither the tuned weights nor noise
