"""Jobs whose tuned model is an adapter: the codes and scales of the merged float32 folder."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.jobs.options import Output, Run
from daq_jax.io.jobs.quantize_folders import open_job
from tests import stores
from tests.adapters import (
    EXPERT_TARGETS,
    EXPERTS,
    PREFIX,
    expert_adapter,
    lora,
    merged,
    product,
    write_adapter,
)
from tests.cases import rng_for
from tests.hf_folders import BF16, CONFIG, in_shards, llama, normal, spread, stored, to_fp8, write_folder
from tests.native_folders import gpt_oss, natives

ABSMAX = daq.recipes.absmax
MODULES = {f"model.layers.{i}.self_attn.{w}_proj": (128, 128) for i in (0, 1) for w in "qkvo"} | {
    f"model.layers.0.mlp.{w}_proj": (128, 128) for w in ("gate", "up", "down")
}


def fp8(tensors: dict) -> dict:
    """The projections in FP8 with scales, all else as it is."""
    coded = {}
    for name, x in tensors.items():
        if name.endswith("_proj.weight"):
            coded[name], coded[f"{name}_scale_inv"] = to_fp8(x.astype(np.float32))
        else:
            coded[name] = x
    return coded


def wide(tensors: dict) -> dict:
    """Float32 weights of what `fp8` gives."""
    return {
        name: x.astype(np.float32)
        * (spread(tensors[f"{name}_scale_inv"], x.shape) if f"{name}_scale_inv" in tensors else 1)
        for name, x in tensors.items()
        if not name.endswith("_scale_inv")
    }


def folders(tmp_path, stored: str = "bf16", shards: int = 3):
    """A base, an adapter, and the float32 folder of the two merged."""
    base = fp8(llama()) if stored == "fp8" else llama()
    config = CONFIG | ({"quantization_config": {"quant_method": "fp8"}} if stored == "fp8" else {})
    adapter = lora(MODULES)
    tuned = wide(base)
    for name in MODULES:
        tuned[f"{name}.weight"] = merged(tuned[f"{name}.weight"], product(adapter, name), 1.5)
    return (
        write_folder(tmp_path / "base", in_shards(base, shards), config),
        write_adapter(tmp_path / "adapter", adapter),
        write_folder(tmp_path / "merged", [tuned]),
    )


def coded(path) -> dict[str, tuple[bytes, bytes]]:
    """Codes and scales of all quantized weights."""
    with contextlib.closing(open_folder(path)) as folder:
        read = {name: folder.read(name) for name, tensor in folder.tensors.items() if tensor.coding}
    return {n: (np.asarray(q.codes).tobytes(), np.asarray(q.scale).tobytes()) for n, q in read.items()}


@pytest.mark.parametrize("stored", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        ("fp8-block", ABSMAX),
        ("fp8-block", daq.Recipe(search=daq.Grid(0.9, 1.3, 4))),
        pytest.param("fp8-block", daq.recipes.default, marks=pytest.mark.slow),
        pytest.param("int4-group", daq.recipes.default, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_gives_the_codes_of_the_merged_folder(stored, layout, recipe, tmp_path):
    base, adapter, whole = folders(tmp_path, stored)
    reports = [
        daq.quantize_folder(base, tuned, tmp_path / out, recipe, format=layout, memory_gb=2)
        for tuned, out in ((adapter, "a"), (whole, "b"))
    ]
    found, expected = coded(tmp_path / "a"), coded(tmp_path / "b")
    assert found == expected
    assert len(found) == 14
    assert reports[0]["total"] == reports[1]["total"]
    total = daq.compare_folders(base, adapter, tmp_path / "a").total.to_dict()
    assert total.pop("counts") == reports[0]["total"].pop("counts")
    assert total == pytest.approx(reports[0]["total"], rel=1e-6)


FOUR_BITS = ("mxfp4-pack", "nvfp4-pack", "nvfp4-modelopt", "int4-g32 I32", "v4 experts")


def native_folders_of(path, layout: str):
    """A base in a layout, an adapter, and the float32 folder of the two merged."""
    if layout == "gpt-oss":
        adapter, changes = expert_adapter(hidden=64, inner=64, experts=2)
        made = [gpt_oss(f"{EXPERTS}.{name}", *change.shape) for name, change in changes.items()]
        config, targets = CONFIG | {"model_type": "gpt_oss"}, EXPERT_TARGETS
    else:
        made, targets = [natives(128, 128)[layout]], {}
        module = made[0].name.removesuffix(".weight")
        adapter, config = lora({module: (128, 128)}), CONFIG
        changes = {module: product(adapter, module)}
    base = {n: x for i, native in enumerate(made) for n, x in native.make(rng_for(f"{layout} {i}")).items()}
    tuned = {}
    for native, change in zip(made, changes.values(), strict=True):
        weight = merged(native.decode(base), change, 1.5)
        tuned[native.name] = np.ascontiguousarray(weight.swapaxes(-1, -2)) if native.turned else weight
    return (
        write_folder(path / "base", [base], config | {"quantization_config": made[0].config}),
        write_adapter(path / "adapter", adapter, **targets),
        write_folder(path / "merged", [tuned], config),
    )


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        *((layout, ABSMAX) for layout in (*FOUR_BITS, "gpt-oss")),
        pytest.param("int4-g32 I32", daq.recipes.default, marks=pytest.mark.slow),
        pytest.param("gpt-oss", daq.recipes.default, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_on_a_base_of_4_bits_gives_the_bytes_of_the_merged_folder(layout, recipe, tmp_path):
    base, adapter, whole = native_folders_of(tmp_path, layout)
    for tuned, out in ((adapter, "a"), (whole, "b")):
        report = daq.quantize_folder(base, tuned, tmp_path / out, recipe, memory_gb=2)
        assert report["format"] == "as-base"
        assert report["identity"]["untouched"] == 0
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    assert stored(tmp_path / "a").keys() == stored(base).keys()


def test_what_is_kept_is_stored_in_the_dtype_of_the_base(tmp_path):
    base = fp8(llama())
    head = {f"{PREFIX}lm_head.weight": normal(1, 300, 128)}
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    base["model.embed_tokens.weight"], scale = to_fp8(normal(2, 384, 128))
    base["model.embed_tokens.weight_scale_inv"] = scale
    before = write_folder(tmp_path / "base", [base], config)
    after = write_adapter(tmp_path / "adapter", lora(MODULES) | head, modules_to_save=["lm_head"])
    daq.quantize_folder(before, after, tmp_path / "out", ABSMAX, format="fp8-block", memory_gb=2)
    with contextlib.closing(open_folder(tmp_path / "out")) as out:
        kept = {n: out.read(n) for n, tensor in out.tensors.items() if not tensor.coding}
    assert {x.dtype for x in kept.values()} == {BF16}
    np.testing.assert_array_equal(kept["lm_head.weight"], head[f"{PREFIX}lm_head.weight"].astype(BF16))
    np.testing.assert_array_equal(
        kept["model.embed_tokens.weight"], wide(base)["model.embed_tokens.weight"].astype(BF16)
    )
    assert kept["model.norm.weight"].tobytes() == base["model.norm.weight"].tobytes()


def test_files_beside_the_weights_are_the_bases_but_for_the_tokenizer(tmp_path):
    base, adapter, _ = folders(tmp_path)
    for folder, word in ((base, "base"), (adapter, "adapter")):
        (folder / "tokenizer.json").write_text(word)
        (folder / "generation_config.json").write_text(word)
        (folder / "chat_template.jinja").write_text(word)
        (folder / "README.md").write_text(word)
    (base / "special_tokens_map.json").write_text("base")
    daq.quantize_folder(base, adapter, tmp_path / "out", ABSMAX, memory_gb=2)
    found = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".jinja")}
    assert "adapter_config.json" not in found
    assert found["tokenizer.json"] == found["chat_template.jinja"] == "adapter"
    assert found["generation_config.json"] == found["special_tokens_map.json"] == "base"


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def test_a_stopped_run_goes_on_and_a_changed_adapter_is_noticed(tmp_path):
    base, adapter, _ = folders(tmp_path)
    with (
        pytest.raises(Stopped),
        open_job(
            base, adapter, tmp_path / "out", ABSMAX, Output(), Run(memory_gb=2), Console(quiet=True)
        ) as job,
    ):
        dataclasses.replace(job, store=stores.Stopped(job.store, at=3, error=Stopped)).run()
    daq.quantize_folder(base, adapter, tmp_path / "whole", ABSMAX, memory_gb=2)
    daq.quantize_folder(base, adapter, tmp_path / "out", ABSMAX, memory_gb=2)
    assert coded(tmp_path / "out") == coded(tmp_path / "whole")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    with pytest.raises(daq.DaqError, match="other inputs"):
        daq.quantize_folder(base, adapter, tmp_path / "out", ABSMAX, memory_gb=2)


def test_the_command_plans_inspects_and_compares_an_adapter(tmp_path, capsys):
    base, adapter, whole = folders(tmp_path)
    words = [str(base), str(adapter), str(tmp_path / "out"), "--recipe", "absmax", "--memory", "2"]
    assert cli.main(["quantize", *words, "--plan"]) == 0
    assert not (tmp_path / "out").exists()
    assert cli.main(["quantize", *words]) == 0
    capsys.readouterr()
    shown = []
    for tuned in (adapter, whole):
        assert cli.main(["inspect", str(base), str(tuned), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0]["verdict"] == shown[1]["verdict"]
    assert cli.main(["compare", str(base), str(adapter), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["projection"] > 0


def test_a_plan_reads_no_weight_of_an_adapter(tmp_path):
    base, adapter, _ = folders(tmp_path)
    file = adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    file.write_bytes(data)
    said = Console(file=io.StringIO(), width=200)
    found = daq.quantize_folder(base, adapter, tmp_path / "out", ABSMAX, plan_only=True, console=said)
    assert len(found["quantized"]) == 14
    with pytest.raises(daq.DaqError, match="NaN or infinity"):
        daq.quantize_folder(base, adapter, tmp_path / "out", ABSMAX, memory_gb=2)
