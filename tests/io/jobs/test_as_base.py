"""Back into the format of the base: byte for byte where nothing changed, and the change kept where it did."""

import dataclasses
import io
import json
import pathlib
import re

import numpy as np
import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax.io.jobs.options import Output, Run
from daq_jax.io.jobs.quantize_folders import open_job
from tests import stores
from tests.cases import rng_for
from tests.hf_folders import BF16, CONFIG, E4M3, Tensors, in_shards, normal, stored, write_folder
from tests.native_folders import (
    BY_LAYOUT,
    Native,
    deepseek_v4,
    gpt_oss,
    kept_of,
    low_rank,
    mxfp4_pack,
    natives,
    nvfp4_modelopt,
    packed,
)

ABSMAX = daq.recipes.absmax


def config_of(native: Native, **more: object) -> dict:
    kind = {"model_type": "gpt_oss"} if native.turned else {}
    return CONFIG | kind | {"quantization_config": native.config} | more


def as_tuned(native: Native, weight: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A weight `[..., out, in]` as a tuned model stores it."""
    weight = weight.swapaxes(-1, -2) if native.turned else weight
    return np.ascontiguousarray(weight.astype(dtype))


def rest() -> Tensors:
    return {"lm_head.weight": normal(5, 32, 64).astype(BF16), "model.norm.weight": normal(6, 64).astype(BF16)}


def folders(
    path: pathlib.Path, native: Native, base: Tensors, weight: np.ndarray, dtype: np.dtype
) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    before = write_folder(path / "base", [base | rest()], config_of(native))
    kind = {"model_type": "gpt_oss"} if native.turned else {}
    tuned = rest() | {native.name: as_tuned(native, weight, dtype)}
    return before, write_folder(path / "tuned", [tuned], CONFIG | kind), path / "out"


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("layout", BY_LAYOUT)
def test_what_tuning_left_alone_keeps_the_bytes_of_the_base(layout, dtype, tmp_path):
    native = natives(64, 256)[layout]
    base = native.make(rng_for(f"zero {layout}"))
    paths = folders(tmp_path, native, base, native.decode(base), dtype)
    report = daq.quantize_folder(*paths, memory_gb=2)
    assert stored(paths[2]) == stored(paths[0])
    assert report["format"] == "as-base"
    identity = report["identity"]
    assert (identity["tensors"], identity["untouched"], identity["moved_codes"]) == (1, 1, 0)
    config = json.loads((paths[2] / "config.json").read_text())
    assert config["quantization_config"] == native.config


QUICK = ("gpt-oss", "nvfp4-pack", "int4-g32 I32")


@pytest.mark.parametrize(
    "layout", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in BY_LAYOUT]
)
def test_a_low_rank_change_is_kept(layout, tmp_path):
    native = natives(256, 512)[layout]
    base = native.make(rng_for(f"change {layout}"))
    before = native.decode(base)
    change = low_rank(3, before, 0.02)
    paths = folders(tmp_path, native, base, before + change, np.dtype(np.float32))
    report = daq.quantize_folder(*paths, memory_gb=2)
    found = stored(paths[2])
    assert {n: x[:2] for n, x in found.items()} == {n: x[:2] for n, x in stored(paths[0]).items()}
    result = {n: np.frombuffer(found[n][2], x.dtype).reshape(x.shape) for n, x in base.items()}
    projection, error = kept_of(change, native.decode(result) - before)
    assert 0.9 < projection < 1.1
    assert error < 0.15
    assert 0 < report["identity"]["moved_codes"] < 1
    moved = np.mean(result[native.scale].view(np.uint8) != base[native.scale].view(np.uint8))
    if not layout.startswith("int8"):  # where nearest rounding off the grid of the base is better
        assert report["identity"]["moved_scales"] < 0.005  # of tiles where clipping would cost more
    assert (report["identity"]["moved_scales"] == 0) == (moved == 0)
    compared = daq.compare_folders(paths[0], paths[1], paths[2])
    assert float(compared.total.projection) == pytest.approx(projection, rel=1e-3)


def two_experts() -> list[Native]:
    """The experts of one layer of gpt-oss, with a square down_proj."""
    where = "model.layers.0.mlp.experts"
    return [gpt_oss(f"{where}.gate_up_proj", 2, 128, 64), gpt_oss(f"{where}.down_proj", 2, 64, 64)]


def test_experts_of_gpt_oss_are_turned_even_where_they_are_square(tmp_path):
    natives = two_experts()
    base = {k: x for i, native in enumerate(natives) for k, x in native.make(rng_for(f"square {i}")).items()}
    tuned = {n.name: as_tuned(n, n.decode(base), BF16) for n in natives}
    config = config_of(natives[0])
    before = write_folder(tmp_path / "base", [base], config)
    after = write_folder(tmp_path / "tuned", [tuned], CONFIG | {"model_type": "gpt_oss"})
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert report["identity"]["untouched"] == 2
    assert stored(tmp_path / "out") == stored(before)


def test_one_expert_that_changed_leaves_the_bytes_of_the_other(tmp_path):
    native = gpt_oss("model.layers.0.mlp.experts.down_proj", 2, 64, 64)
    base = native.make(rng_for("one expert"))
    weight = native.decode(base)
    weight[1] += 0.2 * weight[1].std() * normal(0, 64, 64)
    paths = folders(tmp_path, native, base, weight, BF16)
    report = daq.quantize_folder(*paths, ABSMAX, memory_gb=2)
    found = np.frombuffer(stored(paths[2])[native.codes][2], np.uint8).reshape(base[native.codes].shape)
    np.testing.assert_array_equal(found[0], base[native.codes][0])
    assert (found[1] != base[native.codes][1]).any()
    assert report["identity"]["untouched"] == 0


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
def test_experts_in_4_bits_beside_fp8_keep_their_bytes_and_a_change_moves_its_own_tensor(dtype, tmp_path):
    """DeepSeek V4: `.scale` of blocks and of groups under one config."""
    made = deepseek_v4()
    base = {k: x for i, n in enumerate(made) for k, x in n.make(rng_for(f"v4 {i}")).items()}
    how = {"quantization_config": made[0].config, "expert_dtype": "fp4", "model_type": "deepseek_v4"}
    before = write_folder(tmp_path / "base", in_shards(base | rest(), 2), CONFIG | how)
    weights = {n.name: n.decode(base) for n in made}
    after = {name: x.astype(dtype) for name, x in weights.items()} | rest()
    kind = CONFIG | {"model_type": "deepseek_v4"}
    same = write_folder(tmp_path / "same", [after], kind)
    report = daq.quantize_folder(before, same, tmp_path / "out", ABSMAX, memory_gb=2)
    assert (report["identity"]["tensors"], report["identity"]["untouched"]) == (len(made), len(made))
    assert stored(tmp_path / "out") == stored(before)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["expert_dtype"], written["quantization_config"]) == ("fp4", made[0].config)
    for moved in (made[0], made[-1]):
        more = {moved.name: (1.3 * weights[moved.name]).astype(dtype)}
        changed = write_folder(tmp_path / moved.name, [after | more], kind)
        report = daq.quantize_folder(before, changed, tmp_path / f"{moved.name} out", ABSMAX, memory_gb=2)
        assert report["identity"]["untouched"] == len(made) - 1
        found, wanted = stored(tmp_path / f"{moved.name} out"), stored(before)
        assert {n for n in wanted if found[n] != wanted[n]} <= {moved.codes, moved.scale}


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def test_a_stopped_run_and_two_processes_write_what_one_run_writes(tmp_path):
    """Files, report and audit: units that an earlier process wrote count as well."""
    made = deepseek_v4()
    base = {k: x for i, n in enumerate(made) for k, x in n.make(rng_for(f"stopped {i}")).items()}
    how = {"quantization_config": made[0].config, "model_type": "deepseek_v4"}
    before = write_folder(tmp_path / "base", in_shards(base | rest(), 3), CONFIG | how)
    after = {n.name: n.decode(base) * (1 if i % 2 else np.float32(1.2)) for i, n in enumerate(made)}
    tuned = write_folder(tmp_path / "tuned", [after | rest()], CONFIG | {"model_type": "deepseek_v4"})
    whole = daq.quantize_folder(before, tuned, tmp_path / "whole", ABSMAX, memory_gb=2)
    job = before, tuned, tmp_path / "stopped", ABSMAX, Output(), Run(memory_gb=2), Console(quiet=True)
    with pytest.raises(Stopped), open_job(*job) as opened:
        dataclasses.replace(opened, store=stores.Stopped(opened.store, at=2, error=Stopped)).run()
    found = [daq.quantize_folder(before, tuned, tmp_path / "stopped", ABSMAX, memory_gb=2)]
    for i in (1, 2):
        shared = daq.quantize_folder(before, tuned, tmp_path / "two", ABSMAX, memory_gb=2, shard=(i, 2))
    found.append(shared)
    for name, report in zip(("stopped", "two"), found, strict=True):
        assert stored(tmp_path / name) == stored(tmp_path / "whole")
        assert report["identity"] == whole["identity"]
        assert report["identity"]["untouched"] == len(made) // 2


def test_one_folder_holds_several_codings_and_the_audit_is_printed(tmp_path):
    natives = [
        mxfp4_pack("model.layers.0.mlp.experts.0.up_proj.weight", 64, 64),
        packed("model.layers.1.mlp.experts.0.up_proj.weight", 64, 64, 4, 32, np.int32),
        nvfp4_modelopt("model.layers.2.mlp.up_proj.weight", 64, 64),
    ]
    made = [native.make(rng_for(f"several {i}")) for i, native in enumerate(natives)]
    weights = {n.name: n.decode(t) for n, t in zip(natives, made, strict=True)}
    weights[natives[1].name] = weights[natives[1].name] + 0.002 * normal(0, 64, 64)
    how = {"quantization": {"quant_algo": "MIXED_PRECISION", "exclude_modules": ["lm_head"]}}
    config = CONFIG | {"text_config": {"quantization_config": natives[1].config}, "expert_dtype": "fp4"}
    before = write_folder(tmp_path / "base", [made[0] | rest(), made[1] | made[2]], config)
    (before / "hf_quant_config.json").write_text(json.dumps(how))
    tuned = {n: x.astype(np.float32) for n, x in weights.items()}
    after = write_folder(tmp_path / "tuned", [tuned | rest()], CONFIG | {"text_config": {"x": 1}, "own": 2})
    console = Console(file=io.StringIO(), width=300)
    daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2, console=console)
    found, wanted = stored(tmp_path / "out"), stored(before)
    differ = {n for n in wanted if found[n] != wanted[n]}
    assert differ - {natives[1].scale} == {natives[1].codes}  # a scale moves where clipping would cost more
    files = {path.name for path in before.iterdir()} | {"daq_report.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name != ".daq"} == files
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {"x": 1, "quantization_config": natives[1].config}
    assert (written["expert_dtype"], written["own"]) == ("fp4", 2)
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == how
    assert "of 3 quantized tensors 2 are untouched and keep the bytes of the base" in console.file.getvalue()


@pytest.mark.parametrize(
    ("base", "tuned", "words"),
    [
        ({}, {"model.norm.weight": None}, r"'model\.norm\.weight' is not in the tuned model"),
        ({}, {"extra.weight": np.zeros((4, 4), BF16)}, r"'extra\.weight' is not in the base"),
        (
            {},
            {"model.norm.weight": np.zeros(3, BF16)},
            r"'model\.norm\.weight' is \(64,\) but tuned is \(3,\)",
        ),
    ],
)
def test_folders_that_lack_a_weight_are_refused(base, tuned, words, tmp_path):
    native = mxfp4_pack("model.layers.0.mlp.up_proj.weight", 64, 64)
    before = native.make(rng_for("lacking"))
    after = rest() | {native.name: native.decode(before).astype(BF16)} | tuned
    write_folder(tmp_path / "b", [before | rest() | base], config_of(native))
    write_folder(tmp_path / "t", [{n: x for n, x in after.items() if x is not None}])
    with pytest.raises(ValueError, match=f"not two states of one model.*{words}"):
        daq.quantize_folder(tmp_path / "b", tmp_path / "t", tmp_path / "out", memory_gb=2)
    assert not (tmp_path / "out").exists()


def test_as_base_needs_a_base_that_is_quantized(tmp_path):
    plain = write_folder(tmp_path / "b", [{"a_proj.weight": np.zeros((64, 64), BF16)}])
    with pytest.raises(ValueError, match="holds no quantized weight"):
        daq.quantize_folder(plain, plain, tmp_path / "out", format="as-base", memory_gb=2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, E4M3], ids=str)
def test_codes_of_the_tuned_model_that_are_not_read_are_refused_by_name(dtype, tmp_path):
    base = {"a_proj.weight": np.zeros((128, 128), BF16), "b_proj.weight": np.zeros((128, 128), BF16)}
    tuned = base | {"b_proj.weight": np.zeros((128, 128), dtype)}
    paths = write_folder(tmp_path / "b", [base]), write_folder(tmp_path / "t", [tuned])
    words = r"t: holds codes that are not read: 'b_proj\.weight' is .* without a scale"
    with pytest.raises(ValueError, match=words):
        daq.quantize_folder(*paths, tmp_path / "out", ABSMAX, memory_gb=2)


@pytest.mark.parametrize("name", ["b_proj.weight", "b_proj.qweight", "experts.w13", "x.weight._data"])
@pytest.mark.parametrize("dtype", [np.int8, E4M3], ids=str)
def test_raw_codes_in_either_folder_are_refused_by_every_command(dtype, name, tmp_path):
    """Codes whose scales are called otherwise are no weights, in BASE as in TUNED and in OUT."""
    plain = {"a_proj.weight": np.zeros((128, 128), BF16)}
    one = write_folder(tmp_path / "plain", [plain])
    raw = write_folder(tmp_path / "raw", [plain | {name: np.ones((128, 128), dtype)}])
    coded = {"a_proj.weight": np.ones((128, 128), np.int8), "a_proj.weight_scale": np.ones(1, np.float32)}
    out = write_folder(tmp_path / "out", [coded])
    words = rf"raw: holds codes that are not read: '{re.escape(name)}' is "
    for pair in ((one, raw), (raw, one)):
        with pytest.raises(ValueError, match=words):
            daq.quantize_folder(*pair, tmp_path / "new", ABSMAX, memory_gb=2)
        with pytest.raises(ValueError, match=words):
            daq.inspect_folder(*pair)
        with pytest.raises(ValueError, match=words):
            daq.compare_folders(*pair, out)
    assert not (tmp_path / "new").exists()


def test_masks_and_indices_are_no_codes(tmp_path):
    tensors = {
        "a_proj.weight": np.zeros((128, 128), BF16),
        "attn.bias": np.ones((1, 1, 8, 8), np.uint8),
        "position_ids": np.ones((1, 8), np.int64),
        "gate.tid2eid": np.ones((64, 2), np.int32),
    }
    paths = write_folder(tmp_path / "b", [tensors]), write_folder(tmp_path / "t", [tensors])
    report = daq.quantize_folder(*paths, tmp_path / "out", ABSMAX, memory_gb=2, plan_only=True)
    assert len(report["kept"]) == 3


@pytest.mark.parametrize("scheme", [None, {"num_bits": 8}])
def test_scales_of_the_cache_stay_only_where_the_config_of_the_base_reads_them(scheme, tmp_path):
    native = mxfp4_pack("model.layers.0.mlp.up_proj.weight", 64, 64)
    base = native.make(rng_for("cache"))
    scale = {"model.layers.0.self_attn.k_scale": np.array(0.5, np.float32)}
    how = native.config | {"kv_cache_scheme": scheme}
    before = write_folder(tmp_path / "b", [base | scale], CONFIG | {"quantization_config": how})
    after = write_folder(tmp_path / "t", [{native.name: native.decode(base)} | scale])
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert (next(iter(scale)) in stored(tmp_path / "out")) == bool(scheme)
    where = report["kept" if scheme else "left_out"]
    assert where[next(iter(scale))] == "a scale of the cache of attention"
    plain = daq.quantize_folder(
        before, after, tmp_path / "new", ABSMAX, format="fp8-channel", memory_gb=2, plan_only=True
    )
    assert list(plain["left_out"]) == list(scale)


@pytest.mark.parametrize("static", [True, False])
def test_scales_of_activations_stay_only_where_the_config_of_the_base_reads_them(static, tmp_path):
    native = nvfp4_modelopt("model.layers.0.mlp.up_proj.weight", 64, 64)
    base = native.make(rng_for("static"))
    scale = {"model.layers.0.mlp.up_proj.input_scale": np.array(0.5, np.float32)}
    how = native.config if static else {"quant_method": "compressed-tensors"}
    before = write_folder(tmp_path / "b", [base | scale], CONFIG | {"quantization_config": how})
    after = write_folder(tmp_path / "t", [{native.name: native.decode(base)}])
    report = daq.quantize_folder(before, after, tmp_path / "out", memory_gb=2)
    assert (next(iter(scale)) in stored(tmp_path / "out")) == static
    assert bool(report["left_out"]) != static


def test_inspect_tries_the_format_of_the_base(tmp_path):
    native = packed("model.layers.0.mlp.up_proj.weight", 128, 256, 4, 32, np.int32)
    base = native.make(rng_for("inspect"))
    weight = native.decode(base) + 1e-4 * normal(0, 128, 256)
    paths = folders(tmp_path, native, base, weight, np.dtype(np.float32))
    found = daq.inspect_folder(*paths[:2], ABSMAX)
    assert list(found.leaves) == [native.name]
    assert found.total.on_stored_grid.value > 0.99


def test_a_shape_in_32_bits_is_read_as_one_in_64(tmp_path):
    """Kimi K2 stores `weight_shape` in I32, compressed-tensors in I64."""
    found = []
    for kind in (np.int32, np.int64):
        native = packed("model.layers.0.mlp.up_proj.weight", 64, 256, 4, 32, kind)
        base = native.make(rng_for("shape"))
        tuned = (native.decode(base) + 1e-3 * normal(3, 64, 256)).astype(BF16)
        before, after, out = folders(tmp_path / kind.__name__, native, base, tuned, BF16)
        daq.quantize_folder(before, after, out, memory_gb=2)
        found.append(stored(out))
        assert found[-1].pop(f"{native.name}_shape") == stored(before)[f"{native.name}_shape"]
    assert found[0] == found[1]


def test_a_shape_of_another_dtype_is_named(tmp_path):
    native = packed("model.layers.0.mlp.up_proj.weight", 64, 256, 4, 32, np.int16)
    base = native.make(rng_for("shape"))
    paths = folders(tmp_path, native, base, native.decode(base), BF16)
    with pytest.raises(daq.DaqError, match=r"weight_shape' is I16, needed I32 or I64 of 2 numbers"):
        daq.quantize_folder(*paths, memory_gb=2)


@pytest.mark.parametrize("format", [None, "fp8-channel"])
def test_every_tensor_of_the_tuned_model_is_accounted_for(format, tmp_path):
    native = mxfp4_pack("model.layers.0.mlp.up_proj.weight", 64, 64)
    base = native.make(rng_for("accounted"))
    strays = {
        "model.layers.0.mlp.up_proj.input_scale": np.array(0.5, np.float32),
        "model.layers.0.self_attn.k_scale": np.array(0.5, np.float32),
    }
    before = write_folder(tmp_path / "b", [base | rest() | strays], config_of(native))
    tuned = rest() | strays | {native.name: native.decode(base).astype(BF16)}
    after = write_folder(tmp_path / "t", [tuned])
    report = daq.quantize_folder(
        before, after, tmp_path / "out", ABSMAX, format=format, memory_gb=2, plan_only=True
    )
    parts = [report["quantized"], report["kept"], report["left_out"]]
    assert sorted(name for part in parts for name in part) == sorted(tuned)
    assert all(why for part in parts[1:] for why in part.values())
