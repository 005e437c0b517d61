"""The model card of a result: front matter for the Hub, what was done, and the card of the tuned model."""

import datetime
import json
import pathlib
import shlex

import pytest

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.jobs import model_card
from tests.adapters import lora, write_adapter
from tests.hf_folders import in_shards, llama, tuned_from, write_folder
from tests.io.jobs.test_resume import contents, run, run_until_third_file

yaml = pytest.importorskip("yaml")
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
CARD = """---
license: apache-2.0
language:
- en
- de
base_model: org/base
base_model_relation: finetune
tags: [chat, "law"]
library_name: peft
model-index:
- name: tuned
  results: []
extra: "a: b"
---
# A careful model

It *knows* the law. `--- not front matter ---`
"""


@pytest.fixture
def pair(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    base = llama(layers=1)
    tuned = write_folder(tmp_path / "tuned", in_shards(tuned_from(base), 4), CONFIG)
    return write_folder(tmp_path / "base", [base], CONFIG), tuned


def read(out: pathlib.Path) -> tuple[dict, str]:
    """Front matter as YAML reads it, and the text below."""
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_card_names_models_recipe_command_and_figures(pair, tmp_path):
    report = run(pair, tmp_path / "out", format="int4-group", keep=[r"v_proj"])
    front, text = read(tmp_path / "out")
    assert front == {
        "base_model": "tuned",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["daq-jax", "int4-group", "compressed-tensors"],
    }
    command = "daq-jax quantize base tuned OUT --format int4-group --recipe absmax --keep v_proj"
    assert f"```sh\n{command}\n```" in text
    assert f"| projection | {report['total']['projection']:.4f} |" in text
    assert f"daq_jax {daq.__version__}" in text
    assert "by --keep" in text
    assert str(tmp_path) not in text
    assert {"README.md", "config.json"} <= {*report["files"]} & {*report["written"]}


def test_the_command_of_a_card_gives_the_same_bytes(pair, tmp_path, monkeypatch):
    run(pair, tmp_path / "first", keep=[r"v_proj"], only=["_proj"])
    text = (tmp_path / "first" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    words = shlex.split(text.partition("```sh\n")[2].partition("\n```")[0])
    assert cli.main([*words[1:], "--memory", "2", "--json"]) == 0
    assert contents(tmp_path / "OUT") == contents(tmp_path / "first")


def test_the_card_of_the_tuned_model_is_kept_below(pair, tmp_path):
    (pair[1] / "README.md").write_text(CARD)
    run(pair, tmp_path / "out")
    front, text = read(tmp_path / "out")
    assert front["base_model"] == "tuned"
    assert front["base_model_relation"] == "quantized"
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en", "de"]
    assert front["extra"] == "a: b"
    assert front["tags"] == ["chat", "law", "daq-jax", "fp8-block", "fp8"]
    assert front["library_name"] == "transformers"
    assert "model-index" not in front  # figures of other weights
    assert text.endswith(CARD.partition('extra: "a: b"\n---\n')[2])


@pytest.mark.parametrize("card", ["", "no front matter", "---\n[1, 2]\n---\ntext", "---\nunfinished: true\n"])
def test_any_card_of_a_tuned_model_gives_front_matter_that_is_read(card, pair, tmp_path):
    (pair[1] / "README.md").write_text(card)
    run(pair, tmp_path / "out")
    front, text = read(tmp_path / "out")
    assert front["base_model"] == "tuned"
    assert card.rpartition("---\n")[2].strip() in text


def test_another_card_is_another_input(pair, tmp_path):
    (pair[1] / "README.md").write_text("one")
    run(pair, tmp_path / "out")
    (pair[1] / "README.md").write_text("two")
    with pytest.raises(daq.DaqError, match=r"input tuned/README\.md"):
        run(pair, tmp_path / "out")


def test_a_job_that_goes_on_on_another_day_keeps_its_date(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    run_until_third_file(pair, tmp_path / "out")
    run(pair, tmp_path / "whole")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    run(pair, tmp_path / "out")
    assert "Made on 1970-01-01" in (tmp_path / "out" / "README.md").read_text()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    run(pair, tmp_path / "today")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert today in (tmp_path / "today" / "README.md").read_text()


def test_a_card_of_an_adapter_speaks_of_the_adapter(pair, tmp_path):
    adapter = write_adapter(tmp_path / "my_lora", lora({"model.layers.0.mlp.up_proj": (128, 128)}))
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\nof the adapter")
    (pair[0] / "README.md").write_text("of the base")
    run((pair[0], adapter), tmp_path / "out")
    front, text = read(tmp_path / "out")
    assert front["base_model"] == "my_lora"
    assert front["library_name"] == "transformers"
    assert text.endswith("of the adapter\n")


@pytest.mark.parametrize("name", ["a_b", "a`b", "x\n# y", "odd 'name'"])
def test_names_of_folders_are_no_markup(name, pair, tmp_path):
    tuned = pair[1].rename(tmp_path / name)
    run((pair[0], tuned), tmp_path / "out")
    front, text = read(tmp_path / "out")
    assert front["base_model"] == name.replace("\n", "\\n")
    assert not any(line == "# y" for line in text.splitlines())


def neg_square(d, q):
    return -((d - q) ** 2).sum(-1)


def test_a_recipe_of_ones_own_is_said_without_an_address(pair, tmp_path):
    recipe = daq.Recipe(metric=neg_square, search=daq.Grid(0.9, 1.1, 2))
    daq.quantize_folder(*pair, tmp_path / "out", recipe, memory_gb=2)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Grid(" in text
    assert " at 0x" not in text


def test_all_files_of_the_tuned_model_are_accounted_for(pair, tmp_path, capsys):
    (pair[1] / "onnx").mkdir()
    names = ["LICENSE", "NOTICE.md", "tokenizer.json", "modeling_own.py", "old.bin", "onnx/model.onnx"]
    names += ["README.md", "adapter_config.json", "quantize_config.json", "photo.png", "training_args.bin"]
    for name in names:
        (pair[1] / name).write_text("{}")
    words = ["quantize", *map(str, pair), str(tmp_path / "out"), "--recipe", "absmax", "--memory", "2"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "daq_report.json").read_text())
    told = {*report["copied"], *report["written"], *report["left_out"], *report["files"]}
    there = {str(p.relative_to(pair[1])) for p in pair[1].rglob("*") if p.is_file()}
    assert there <= told
    assert report["copied"] == ["LICENSE", "NOTICE.md", "tokenizer.json"]
    assert "code of the model" in report["left_out"]["modeling_own.py"]
    for name in [*report["copied"], *report["written"], "onnx/model.onnx", "photo.png"]:
        assert name in shown


def test_a_folder_of_a_cache_goes_by_its_name_on_the_hub():
    there = pathlib.Path("/hub/models--org--model--x/snapshots/0123abcd")
    assert model_card.hub_name(there) == "org/model--x"
    assert model_card.hub_name(pathlib.Path("/some/model")) == "model"
