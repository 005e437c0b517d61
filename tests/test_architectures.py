"""A sample of the architectures of transformers: loaded right, or refused. See the benchmark of that name."""

import importlib
import json

import pytest

from benchmarks.architectures.models import MODELS

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
SAMPLE = ("llama", "mixtral", "deepseek_v3", "mamba", "llava", "t5")


def outcomes(model_type: str, path, formats) -> list:
    pytest.importorskip("transformers")
    study = importlib.import_module("benchmarks.architectures.study")
    model = next(m for m in MODELS if m.model_type == model_type)
    base, tuned = study.pair_of(model, path)
    return [study.outcome_of(model, format, base, tuned, path) for format in formats]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_result_is_loaded_without_a_missing_key_and_computes_what_it_stores(model_type, tmp_path):
    for found in outcomes(model_type, tmp_path, ["fp8-block", "int4-group"]):
        assert found.verdict == "ok", f"{found.format}: {found.words}"
        assert found.quantized > 0
        assert 0 < found.error < 0.5


@pytest.mark.parametrize(
    ("model_type", "why"), [("gpt2", "stored [in, out]"), ("llama4_text", "stays fused")]
)
def test_what_cannot_be_loaded_is_refused(model_type, why, tmp_path):
    (found,) = outcomes(model_type, tmp_path, ["fp8-channel"])
    assert found.verdict == "refused"
    assert why in found.words


def test_the_classes_of_transformers_agree_with_what_the_command_decides(tmp_path):
    pytest.importorskip("transformers")
    layers = importlib.import_module("benchmarks.architectures.layers")
    assert layers.study(quick=True, out=tmp_path) == 0
    found = json.loads((tmp_path / "layers.json").read_text())
    assert set(found["types"]) == set(layers.SAMPLE)
    assert found["by_name_alone"]["dac"] == {"quantizer.quantizers.*.codebook.weight": "embedding"}
    assert set(found["by_name_alone"]["funnel"].values()) == {"linear"}
