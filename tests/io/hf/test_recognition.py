"""Native layouts are read as decoders of their own say; what cannot be read is refused by name."""

import json

import numpy as np
import pytest

from daq_jax.io.hf.folders import open_folder
from daq_jax.qtensor import QTensor
from tests.cases import rng_for
from tests.hf_folders import CONFIG, E4M3, normal, write_folder
from tests.native_folders import BY_LAYOUT, natives

F32 = np.dtype(np.float32)


@pytest.mark.parametrize("layout", BY_LAYOUT)
def test_each_native_layout_is_read_as_its_decoder_says(layout, tmp_path):
    native = natives(96 if "g128" not in layout else 64, 256)[layout]
    tensors = native.make(rng_for(layout))
    config = CONFIG | {"quantization_config": native.config}
    folder = open_folder(write_folder(tmp_path / "f", [tensors], config))
    assert list(folder.tensors) == [native.name]
    expected = native.decode(tensors)
    assert folder.tensors[native.name].shape == expected.shape
    q = folder.read(native.name, dtype=F32)
    assert isinstance(q, QTensor)
    np.testing.assert_array_equal(q.dequantize(), expected)
    coding = folder.tensors[native.name].coding
    assert coding is not None
    assert {name: (s.dtype, s.shape) for name, s in coding.specs.items()} == {
        name: (folder._entry(name).spec.dtype, x.shape) for name, x in tensors.items()
    }
    again = {**coding.encode(q), **coding.constants}
    for name, x in tensors.items():
        assert np.asarray(again[name]).tobytes() == x.tobytes(), name
    if expected.ndim == 2 and expected.shape[0] == 64:
        part = folder.read(native.name, slice(16, 48), F32)
        np.testing.assert_array_equal(part.dequantize(), expected[16:48])
    if expected.ndim == 3:
        np.testing.assert_array_equal(folder.read(native.name, slice(1, 2), F32).dequantize(), expected[1:2])


def test_a_scale_of_two_to_the_minus_127_over_zeros_is_read(tmp_path):
    native = natives(4, 64)["gpt-oss"]
    tensors = native.make(rng_for("zeros"))
    tensors[native.codes][0, 0], tensors[native.scale][0, 0] = 0, 0
    folder = open_folder(write_folder(tmp_path / "f", [tensors], {"model_type": "gpt_oss"}))
    np.testing.assert_array_equal(folder.read(native.name, dtype=F32).dequantize(), native.decode(tensors))


@pytest.mark.parametrize(
    ("where", "how", "word"),
    [
        ("config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ("config", {"quantization_config": {"quant_method": "awq"}}, "awq"),
        ("config", {"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ("config", {"text_config": {"quantization_config": {"quant_method": "quark"}}}, "quark"),
        (
            "config",
            {"compression_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
            "24",
        ),
        ("beside", {"quantization": {"quant_algo": "W4A8_AWQ"}}, "W4A8_AWQ"),
    ],
)
def test_another_quantizer_is_refused_by_its_name(where, how, word, tmp_path):
    folder = write_folder(tmp_path / "f", [{"a.weight": normal(0, 4, 4)}], how if where == "config" else {})
    if where == "beside":
        (folder / "hf_quant_config.json").write_text(json.dumps(how))
    with pytest.raises(ValueError, match=f"quantized by '.*{word}', which is not read"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("layout", "part", "change", "words"),
    [
        ("gpt-oss", "scale", lambda x: x[..., :1], r"'.*_blocks' is U8 .* needed 4-bit floats"),
        ("gpt-oss", "codes", lambda x: x[..., :8], r"'.*_blocks' is U8 .* needed 4-bit floats"),
        ("mxfp4-pack", "scale", lambda x: x[:, :1], r"'.*_packed' is U8 .* needed 4-bit floats"),
        ("mxfp4-pack", "scale", lambda x: x.astype(np.float32), r"needed 4-bit floats"),
        ("nvfp4-modelopt", "codes", lambda x: x[:, :-1], r"needed 4-bit floats"),
        ("v4 experts", "scale", lambda x: x[:, :1], r"needed 4-bit floats"),
        ("mxfp8", "scale", lambda x: x[:, :-1], r"is F8_E4M3 .* for each group of a row"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(layout, part, change, words, tmp_path):
    native = natives(64, 256)[layout]
    tensors = native.make(rng_for(layout))
    name = native.codes if part == "codes" else native.scale
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    write_folder(tmp_path / "f", [tensors])
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path / "f")


@pytest.mark.parametrize("number", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("layout", ["nvfp4-pack", "nvfp4-modelopt"])
def test_a_factor_of_scales_must_be_positive_and_finite(layout, number, tmp_path):
    native = natives(64, 256)[layout]
    tensors = native.make(rng_for(layout))
    factor = next(name for name in tensors if name.endswith(("_global_scale", "_scale_2")))
    tensors[factor] = np.full_like(tensors[factor], number)
    write_folder(tmp_path / "f", [tensors])
    with pytest.raises(ValueError, match="one F32 above 0"):
        open_folder(tmp_path / "f")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (
            {
                "quantization_config": {"quant_method": "fp8"},
                "text_config": {"quantization_config": {"quant_method": "awq"}},
            },
            "awq",
        ),
        ({"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "no method, 4 bits"),
        ({"quantization_config": {"config_groups": {"group_0": {"format": "marlin-24"}}}}, "marlin-24"),
        ({"quantization_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}, "sparse-24"),
        (
            {"quantization_config": {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}},
            "transform_config",
        ),
    ],
)
def test_a_quantizer_is_found_wherever_a_config_names_it(how, word, tmp_path):
    folder = write_folder(tmp_path / "f", [{"a.weight": normal(0, 4, 4)}], how)
    with pytest.raises(ValueError, match=f"quantized by '.*{word}.*', which is not read"):
        open_folder(folder)


@pytest.mark.parametrize("dtype", [np.int8, E4M3], ids=str)
@pytest.mark.parametrize("end", ["_zero_point", "_offset", "_zeros", "_g_idx"])
def test_zero_points_of_eight_bits_are_read_only_where_they_are_zero(end, dtype, tmp_path):
    codes = np.arange(-8, 8).reshape(4, 4).astype(dtype)
    stray = np.zeros((4, 1), np.int8)
    tensors = {"a.weight": codes, "a.weight_scale": np.full((4, 1), 0.5, np.float32)}
    if end != "_g_idx":
        folder = open_folder(write_folder(tmp_path / "zero", [tensors | {f"a.weight{end}": stray}]))
        assert list(folder.tensors) == ["a.weight"]
        np.testing.assert_array_equal(
            folder.read("a.weight", dtype=F32).dequantize(), codes.astype(F32) * np.float32(0.5)
        )
    stray[2] = 1
    write_folder(tmp_path / "one", [tensors | {f"a.weight{end}": stray}])
    with pytest.raises(ValueError, match=rf"'a\.weight' comes with 'a\.weight{end}'"):
        open_folder(tmp_path / "one")


def test_a_weight_whose_own_name_ends_as_blocks_do_is_no_stack_of_blocks(tmp_path):
    codes = np.ones((2, 4, 4), np.uint8).view(E4M3)
    folder = open_folder(write_folder(tmp_path / "plain", [{"a.weight_blocks": codes}]))
    assert folder.tensors["a.weight_blocks"].coding is None
    scale = np.full((2, 4, 1), 0.5, np.float32)
    coded = {"a.weight_blocks": codes, "a.weight_blocks_scale": scale}
    folder = open_folder(write_folder(tmp_path / "coded", [coded]))
    np.testing.assert_array_equal(
        folder.read("a.weight_blocks", dtype=F32).dequantize(), codes.astype(F32) * np.float32(0.5)
    )
