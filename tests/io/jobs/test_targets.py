"""Weights in bfloat16 to layouts of 4 and 8 bits, read by decoders that share nothing with the library."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import daq_jax as daq
from daq_jax.cli import FORMATS
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from tests import native_folders
from tests.hf_folders import BF16, CONFIG, Tensors, normal, read_tensors, write_folder
from tests.hf_folders import stored as raw
from tests.native_folders import Native, deepseek_v4, gpt_oss, kept_of, low_rank, packed

WEIGHT = "model.layers.1.mlp.experts.0.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
SHAPE = (128, 256)
OF_KIND = native_folders.natives(*SHAPE)
NATIVES: dict[str, Native] = {
    "mxfp4": OF_KIND["mxfp4-pack"],
    "mxfp8": OF_KIND["mxfp8"],
    "nvfp4": OF_KIND["nvfp4-pack"],
    "nvfp4-modelopt": OF_KIND["nvfp4-modelopt"],
    "int4-group32": packed(WEIGHT, *SHAPE, 4, 32, np.int64),
    "int4-group64": packed(WEIGHT, *SHAPE, 4, 64, np.int64),
    "int8-group32": packed(WEIGHT, *SHAPE, 8, 32, np.int64),
    "fp8-block-ue8m0": OF_KIND["fp8 ue8m0"],
}
COMPRESSED = [layout for layout in NATIVES if layout not in ("nvfp4-modelopt", "fp8-block-ue8m0")]
# Root of the mean squared error of rounding a normal weight to nearest, over its own: of 4-bit floats, of 8
# bits, of 4-bit integers, at most.
NOISE = {"mxfp4": 0.14, "mxfp8": 0.04, "nvfp4": 0.11, "nvfp4-modelopt": 0.11, "fp8-block-ue8m0": 0.04}


def pair(path: pathlib.Path, names: list[str], size: float = 0.05, shape=SHAPE, config=CONFIG):
    """Two folders in bfloat16: weights, and the same after a change of rank 2."""
    base: Tensors = {name: (0.02 * normal(i, *shape)).astype(BF16) for i, name in enumerate(names)}
    tuned: Tensors = {}
    for i, (name, x) in enumerate(base.items()):
        *batch, rows, columns = shape
        change = normal(50 + i, *batch, rows, 2) @ normal(90 + i, *batch, 2, columns) / np.sqrt(2)
        tuned[name] = (x.astype(np.float32) + size * 0.02 * change).astype(BF16)
    return write_folder(path / "base", [base], config), write_folder(path / "tuned", [tuned], config)


def wide(path: pathlib.Path, name: str) -> np.ndarray:
    return read_tensors(path)[name].astype(np.float32)


def test_the_command_knows_every_layout():
    assert set(FORMATS) == {"as-base", *LAYOUTS}


@pytest.mark.parametrize("layout", NATIVES)
def test_nearest_codes_of_a_layout_are_near_the_weights_and_are_read_back(layout, tmp_path):
    native = NATIVES[layout]
    before, after = pair(tmp_path, [native.name])
    daq.quantize_folder(before, after, tmp_path / "out", daq.recipes.absmax, format=layout, memory_gb=2)
    stored, tuned = read_tensors(tmp_path / "out"), wide(after, native.name)
    found = native.decode(stored)
    error = np.sqrt(np.mean((found - tuned) ** 2)) / tuned.std()
    assert 0.002 < error < NOISE.get(layout, 0.13)
    example = native.make(np.random.default_rng(0))
    assert {n: (x.dtype.itemsize, x.shape) for n, x in stored.items() if "shape" not in n and "sc" in n} == {
        n: (4 if "int" in layout else x.dtype.itemsize, x.shape)
        for n, x in example.items()
        if "shape" not in n and "sc" in n
    }
    folder = open_folder(tmp_path / "out")
    q = folder.read(native.name)
    folder.close()
    assert isinstance(q, daq.QTensor)
    np.testing.assert_array_equal(np.asarray(q.dequantize(np.float32)), found)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*NATIVES, "gpt-oss"])
def test_the_default_keeps_a_low_rank_change_in_every_layout(layout, tmp_path):
    native = NATIVES[layout] if layout in NATIVES else gpt_oss(EXPERTS, 2, *SHAPE)
    base = (0.02 * normal(1, *(2,) * native.turned, *SHAPE)).astype(np.float32)
    change = low_rank(3, base, 0.02)
    config = CONFIG | ({"model_type": "gpt_oss"} if native.turned else {})
    before, after = (
        write_folder(
            tmp_path / name, [{native.name: x.swapaxes(-1, -2).copy() if native.turned else x}], config
        )
        for name, x in (("base", base), ("tuned", base + change))
    )
    report = daq.quantize_folder(before, after, tmp_path / "out", format=layout, memory_gb=2)
    projection, error = kept_of(change, native.decode(read_tensors(tmp_path / "out")) - base)
    assert 0.9 < projection < 1.1
    assert error < 0.15
    assert report["total"]["projection"] == pytest.approx(projection, abs=1e-3)


@pytest.mark.parametrize("layout", ["nvfp4", "nvfp4-modelopt"])
def test_weights_that_servers_fuse_share_the_factor_of_their_scales(layout, tmp_path):
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    before, after = pair(tmp_path, names)
    tuned = read_tensors(after)
    tuned[names[1]][3, 5] = 40
    after = write_folder(tmp_path / "outlier", [tuned])
    daq.quantize_folder(before, after, tmp_path / "out", daq.recipes.absmax, format=layout, memory_gb=2)
    stored = read_tensors(tmp_path / "out")
    suffix = LAYOUTS[layout].factor
    q, k, v, o = (float(stored[name + suffix].reshape(())) for name in names)
    assert q == k == v != o
    assert stored[names[0] + suffix].shape == ((1,) if layout == "nvfp4" else ())
    factor = 1 / k if layout == "nvfp4" else k
    largest = float(stored[f"{names[1]}_scale"].astype(np.float32).max())
    assert largest * factor == pytest.approx(40 / 6, rel=1 / 16)
    assert 112 <= largest <= 224


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nvfp4", "nvfp4-modelopt"])
def test_a_base_with_such_a_factor_keeps_it(layout, tmp_path):
    native = NATIVES[layout]
    before, after = pair(tmp_path, [native.name])
    stored = native.make(np.random.default_rng(1))
    before = write_folder(tmp_path / "native", [stored], CONFIG | {"quantization_config": native.config})
    base = native.decode(stored)
    change = 0.1 * base.std() * normal(3, *SHAPE)
    after = write_folder(tmp_path / "after", [{native.name: (base + change).astype(BF16)}])
    daq.quantize_folder(before, after, tmp_path / "out", format=layout, memory_gb=2)
    found = read_tensors(tmp_path / "out")
    name = native.name + LAYOUTS[layout].factor
    np.testing.assert_array_equal(found[name], stored[name])
    same = found[native.scale].view(np.uint8) == stored[native.scale].view(np.uint8)
    assert same.mean() > 0.9


def test_experts_of_gpt_oss_become_blocks_and_the_rest_is_kept(tmp_path):
    name, attention = EXPERTS, "model.layers.0.self_attn.q_proj.weight"
    config = CONFIG | {"model_type": "gpt_oss"}
    before, after = pair(tmp_path, [name], shape=(2, 128, 96), config=config)
    more = {attention: (0.02 * normal(7, 64, 128)).astype(BF16)}
    before, after = (
        write_folder(tmp_path / f"{folder.name} model", [read_tensors(folder) | more], config)
        for folder in (before, after)
    )
    daq.quantize_folder(before, after, tmp_path / "out", daq.recipes.absmax, format="gpt-oss", memory_gb=2)
    stored = read_tensors(tmp_path / "out")
    native = gpt_oss(name, 2, 96, 128)
    assert stored[native.codes].shape == (2, 96, 4, 16)
    found = native.decode(stored)
    tuned = np.swapaxes(wide(after, name), 1, 2)
    assert np.sqrt(np.mean((found - tuned) ** 2)) / tuned.std() < 0.2
    assert stored[attention].dtype == BF16
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    skipped = ["lm_head", attention.removesuffix(".weight")]
    assert written == {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    with pytest.raises(daq.DaqError, match="models of type 'gpt_oss'"):
        daq.quantize_folder(*pair(tmp_path / "other", [WEIGHT]), tmp_path / "no", format="gpt-oss")


def plain_of_v4() -> Tensors:
    """What DeepSeek V4 does not quantize."""
    shapes = {
        "embed.weight": (300, 256),
        "head.weight": (300, 256),
        "norm.weight": (256,),
        "layers.0.ffn.gate.weight": (2, 256),
        "layers.0.attn.compressor.wkv.weight": (128, 256),
        "layers.0.attn.indexer.weights_proj.weight": (128, 256),
        "layers.0.attn.indexer.compressor.wgate.weight": (128, 256),
    }
    return {name: (0.02 * normal(i, *shape)).astype(BF16) for i, (name, shape) in enumerate(shapes.items())}


V4 = CONFIG | {"model_type": "deepseek_v4", "vocab_size": 300, "n_routed_experts": 2}


def test_deepseek_v4_gets_experts_in_4_bits_beside_fp8_by_its_own_names(tmp_path):
    made, plain = deepseek_v4(), plain_of_v4()
    example = {k: x for n in made for k, x in n.make(np.random.default_rng(0)).items()}
    before, after = (
        {n.name: (0.02 * normal(i, *n.decode(example).shape)).astype(BF16) for i, n in enumerate(made)}
        | plain
        for _ in range(2)
    )
    after |= {n.name: (before[n.name].astype(np.float32) * 1.01).astype(BF16) for n in made}
    base, tuned = (write_folder(tmp_path / x, [t], V4) for x, t in (("base", before), ("tuned", after)))
    out = tmp_path / "out"
    report = daq.quantize_folder(base, tuned, out, daq.recipes.absmax, format="deepseek-v4", memory_gb=2)
    stored = read_tensors(out)
    assert {n: (x.dtype, x.shape) for n, x in stored.items()} == {
        n: (x.dtype, x.shape) for n, x in (example | plain).items()
    }
    assert report["kept"].keys() == plain.keys()
    for native in made:
        wanted = after[native.name].astype(np.float32)
        error = np.sqrt(np.mean((native.decode(stored) - wanted) ** 2)) / wanted.std()
        assert 0.01 < error < (0.14 if ".experts." in native.name else 0.04)
    config = json.loads((out / "config.json").read_text())
    assert config["expert_dtype"] == "fp4"
    how = config["quantization_config"]
    assert (how["quant_method"], how["scale_fmt"], how["weight_block_size"]) == ("fp8", "ue8m0", [128, 128])
    assert "layers.0.attn.indexer.weights_proj" in how["modules_to_not_convert"]
    # The result is a base of its own: what is left alone comes back byte for byte.
    again = daq.quantize_folder(out, out, tmp_path / "again", memory_gb=2)
    assert again["identity"]["untouched"] == len(made)
    assert raw(tmp_path / "again") == raw(out)


# Shapes [out, in] of weights of DeepSeek V4, and on how many devices they are kept: the classes are those
# of vLLM 0.32 (ColumnParallel: outputs are divided; RowParallel: inputs; Replicated: nothing). A block is 128
# x 128, and a group of an expert 32 inputs.
DIVIDED = {
    "attn.wq_a": ((128, 256), "Replicated", ()),
    "attn.wkv": ((128, 256), "Replicated", ()),
    "attn.wq_b": ((256, 128), "ColumnParallel", (4,)),
    "attn.wo_a": ((256, 128), "ColumnParallel", (4,)),
    "attn.wo_b": ((128, 256), "RowParallel", (4,)),
    "attn.indexer.wq_b": ((128, 128), "Replicated", ()),
    "ffn.shared_experts.w1": ((256, 128), "ColumnParallel", (4,)),
    "ffn.shared_experts.w3": ((256, 128), "ColumnParallel", (4,)),
    "ffn.shared_experts.w2": ((128, 256), "RowParallel", (4,)),
}


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_weights_of_deepseek_v4_are_divided_as_servers_do(devices, tmp_path):
    mtp = {"mtp.0.e_proj.weight": (128, 128), "mtp.0.h_proj.weight": (128, 128)}
    experts = {f"layers.0.ffn.experts.{i}.w{k}.weight": (64, 128) for i in range(2) for k in (1, 3)}
    experts |= {f"layers.0.ffn.experts.{i}.w2.weight": (128, 64) for i in range(2)}
    shapes = {f"layers.0.{n}.weight": shape for n, (shape, *_) in DIVIDED.items()} | experts | mtp
    tensors = {n: (0.02 * normal(i, *shape)).astype(BF16) for i, (n, shape) in enumerate(shapes.items())}
    folders = [write_folder(tmp_path / x, [tensors], V4) for x in ("base", "tuned")]
    options = {"format": "deepseek-v4", "tp": devices, "memory_gb": 2}
    plan = daq.quantize_folder(*folders, tmp_path / "out", plan_only=True, **options)
    kept = {f"layers.0.{n}.weight" for n, (*_, not_on) in DIVIDED.items() if devices in not_on}
    kept |= set(experts) if devices == 4 else set()  # 16 of the inputs of w2 on each device
    assert plan["kept"].keys() == kept
    assert plan["quantized"].keys() == set(shapes) - kept
    for name in kept & {f"layers.0.{n}.weight" for n in DIVIDED}:
        axis = "inputs" if "RowParallel" in DIVIDED[name[9:-7]] else "outputs"
        assert plan["kept"][name] == f"not a multiple of 128 on each device: 256 {axis} over 4 devices"


def test_servers_fuse_two_weights_of_deepseek_v4(tmp_path):
    """`fused_wqa_wkv` of vLLM 0.32: if one cannot be stored in blocks, both are kept."""
    shapes = {"layers.0.attn.wq_a.weight": (128, 128), "layers.0.attn.wkv.weight": (64, 128)}
    shapes["layers.0.attn.wo_b.weight"] = (128, 128)
    tensors = {n: (0.02 * normal(i, *shape)).astype(BF16) for i, (n, shape) in enumerate(shapes.items())}
    folders = [write_folder(tmp_path / x, [tensors], V4) for x in ("base", "tuned")]
    plan = daq.quantize_folder(*folders, tmp_path / "out", plan_only=True, format="deepseek-v4", memory_gb=2)
    assert list(plan["quantized"]) == ["layers.0.attn.wo_b.weight"]


def test_deepseek_v4_is_a_format_of_its_models_alone(tmp_path):
    from daq_jax.io.jobs.options import Output, Run, refuse_for_orbax

    with pytest.raises(daq.DaqError, match="models of type 'deepseek_v4'"):
        daq.quantize_folder(*pair(tmp_path, [WEIGHT]), tmp_path / "no", format="deepseek-v4")
    with pytest.raises(daq.DaqError, match="an Orbax checkpoint has one format"):
        refuse_for_orbax(Output(format="deepseek-v4"), Run())


def test_modelopt_gets_its_own_file_beside_the_config(tmp_path):
    native = NATIVES["nvfp4-modelopt"]
    before, after = pair(tmp_path, [native.name])
    daq.quantize_folder(
        before, after, tmp_path / "out", daq.recipes.absmax, format="nvfp4-modelopt", memory_gb=2
    )
    how = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= how.keys()
    assert how["quant_algo"] == "W4A16_NVFP4"


def test_a_factor_has_no_place_in_orbax(tmp_path):
    from daq_jax.io.jobs.options import Output, Run, refuse_for_orbax

    with pytest.raises(daq.DaqError, match="Orbax checkpoints have no place for the factor"):
        refuse_for_orbax(Output(format="nvfp4"), Run())


@pytest.mark.peers
@pytest.mark.parametrize(
    "layout", ["mxfp4", "mxfp8", "nvfp4", "int4-group32", "int4-group64", "int8-group32"]
)
def test_compressed_tensors_reads_config_and_weights(layout, tmp_path):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file  # safetensors, in the dtypes of torch

    native = NATIVES[layout]
    before, after = pair(tmp_path, [WEIGHT])
    daq.quantize_folder(before, after, tmp_path / "out", daq.recipes.absmax, format=layout, memory_gb=2)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    module = WEIGHT.removesuffix("weight")
    state = {name.removeprefix(module): x for name, x in stored.items()}
    compressor = BaseCompressor.get_value_from_registry(written["format"])
    found = compressor.decompress(state, config.config_groups["group_0"])["weight"]
    native = (
        dataclasses.replace(native, name=WEIGHT)
        if layout != "mxfp8"
        else native_folders.fp8(WEIGHT, *SHAPE, "mxfp8")
    )
    expected = native.decode(read_tensors(tmp_path / "out"))
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found.to(torch.float32).numpy(), expected, atol=scale / 200)
