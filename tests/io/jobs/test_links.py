"""Links: those of a hub's cache are files like others; others are not followed out of their folder."""

import json
import pathlib
import shutil

import pytest

import daq_jax as daq
from daq_jax import cli
from tests.adapters import lora, write_adapter
from tests.hf_folders import in_shards, llama, tuned_from, write_folder

ABSMAX = daq.recipes.absmax


def in_cache(folder: pathlib.Path) -> pathlib.Path:
    """A folder as a hub's cache has it: every file is a link to a blob."""
    cache = folder.with_name(f"models--org--{folder.name}")
    snapshot, blobs = cache / "snapshots/0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    return snapshot


def run(base, tuned, out, **options) -> dict:
    return daq.quantize_folder(base, tuned, out, ABSMAX, memory_gb=2, **options)


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


@pytest.fixture
def pair(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    base = llama(layers=1)
    tuned = write_folder(tmp_path / "tuned", in_shards(tuned_from(base), 2))
    (tuned / "tokenizer.json").write_text("{}")
    return write_folder(tmp_path / "base", [base]), tuned


def test_a_hub_cache_is_a_folder_like_others(pair, tmp_path):
    run(*pair, tmp_path / "plain")
    cached = [in_cache(folder) for folder in pair]
    run(*cached, tmp_path / "out")
    found, plain = contents(tmp_path / "out"), contents(tmp_path / "plain")
    card, report = found.pop("README.md"), json.loads(found.pop("daq_report.json"))
    assert b'base_model: "org/tuned"' in card  # the cache knows what the hub calls the model
    assert card.replace(b"org/", b"") == plain.pop("README.md")
    assert report["fingerprint"] == json.loads(plain.pop("daq_report.json"))["fingerprint"]
    assert found == plain
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    link = tmp_path / "link"
    link.symlink_to(cached[1])  # a folder may itself be reached through a link
    run(cached[0], link, tmp_path / "linked")
    assert contents(tmp_path / "linked") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_weights_behind_a_link_out_of_the_folder_are_refused(name, pair, tmp_path, capsys):
    elsewhere = shutil.move(pair[1] / name, tmp_path / "elsewhere")
    (pair[1] / name).symlink_to(elsewhere)
    with pytest.raises(
        daq.DaqError, match=rf"{name}: is a link to .*elsewhere, which is not in the folder; copy"
    ):
        run(*pair, tmp_path / "out")
    assert cli.main(["inspect", *map(str, pair)]) == 1
    assert "is a link to" in capsys.readouterr().err


def test_an_adapter_behind_a_link_out_of_its_folder_is_refused(pair, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", lora({"model.layers.0.mlp.up_proj": (128, 128)}))
    run(pair[0], in_cache(adapter), tmp_path / "out")
    other = write_adapter(tmp_path / "other", lora({"model.layers.0.mlp.up_proj": (128, 128)}))
    elsewhere = shutil.move(other / "adapter_model.safetensors", tmp_path / "elsewhere")
    (other / "adapter_model.safetensors").symlink_to(elsewhere)
    with pytest.raises(daq.DaqError, match="is a link to"):
        run(pair[0], other, tmp_path / "not")


def test_side_files_behind_a_link_out_of_the_folder_are_left_out_and_named(pair, tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    (pair[1] / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (pair[1] / "sub").symlink_to(tmp_path)
    report = run(*pair, tmp_path / "out")
    assert "private" not in str(contents(tmp_path / "out"))
    assert report["left_out"]["notes.txt"] == "is a link that leads out of its folder"
    assert report["left_out"]["sub/secret.txt"] == "is a link that leads out of its folder"


def test_nothing_is_written_through_a_link_in_the_result(pair, tmp_path):
    (pair[1] / "sub").mkdir()
    (pair[1] / "sub/special.json").write_text("{}")
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    run(*pair, out)
    shutil.rmtree(out / "sub")
    (out / "sub").symlink_to(home)
    with pytest.raises(daq.DaqError, match=r"leads out of its folder|would mix"):
        run(*pair, out, overwrite=True)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "model.bin.index.json",
    ],
)
def test_files_that_send_a_loader_elsewhere_are_not_copied(name, pair, tmp_path):
    (pair[1] / name).write_text(json.dumps({}))
    run(*pair, tmp_path / "out")
    assert "tokenizer.json" in contents(tmp_path / "out")
    assert name not in contents(tmp_path / "out")
