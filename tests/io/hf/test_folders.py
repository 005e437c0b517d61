"""Folders that the reference writer makes, read back; and folders that must be refused."""

import contextlib
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from daq_jax.io.hf.folders import open_folder
from daq_jax.io.hf.tensor_files import TensorReader, TensorSpec, TensorWriter
from daq_jax.qtensor import QTensor
from daq_jax.tilings import Block, Channel, Group, PerTensor
from tests.hf_folders import BF16, E4M3, E8M0, normal, spread, write_folder

RANDOM = np.random.default_rng(0)


WORDS = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "float64",
    "int64",
)
EXTENDED = ("uint64", "complex64", BF16, E4M3, ml_dtypes.float8_e5m2, E8M0)
EVERY_DTYPE = {str(x): np.arange(6).reshape(2, 3).astype(x) for x in (*WORDS, *EXTENDED)} | {
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "ünï": normal(0, 2),
}


def test_a_written_file_is_that_of_the_reference_writer(tmp_path):
    safetensors.numpy.save_file(EVERY_DTYPE, tmp_path / "reference", {"format": "pt"})
    specs = {name: TensorSpec.of(x.dtype, x.shape) for name, x in EVERY_DTYPE.items()}
    with TensorWriter(tmp_path / "ours", specs) as writer:
        for name, x in reversed(EVERY_DTYPE.items()):
            writer.write(name, x)
        assert not (tmp_path / "ours").exists()
        writer.finish()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "reference").read_bytes()


def test_every_dtype_is_read_back_whole_and_in_parts(tmp_path):
    safetensors.numpy.save_file(EVERY_DTYPE, tmp_path / "file")
    reader = TensorReader(tmp_path / "file")
    for name, x in EVERY_DTYPE.items():
        found = reader.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (x.dtype, x.shape, x.tobytes())
        assert b"".join(c.tobytes() for c in reader.chunks(name)) == x.tobytes()
        if x.ndim:
            assert reader.read(name, slice(1, 2)).tobytes() == x[1:2].tobytes()


def test_a_transposed_array_is_written_in_c_order(tmp_path):
    x = normal(0, 2, 3)
    with TensorWriter(tmp_path / "file", {"x": TensorSpec("F32", (3, 2))}) as writer:
        writer.write("x", x.T)
        writer.finish()
    np.testing.assert_array_equal(TensorReader(tmp_path / "file").read("x"), x.T)


def test_shards_and_a_single_file_are_one_to_the_reader(tmp_path):
    tensors = {"b.weight": normal(0, 4, 2), "a.weight": normal(0, 2, 2).astype(BF16), "n": np.arange(3)}
    write_folder(tmp_path / "one", [tensors])
    write_folder(tmp_path / "two", [{"n": tensors["n"]}, {k: v for k, v in tensors.items() if k != "n"}])
    for word in ("one", "two"):
        folder = open_folder(tmp_path / word)
        assert sorted(folder.tensors) == sorted(tensors)
        for name, x in tensors.items():
            assert folder.tensors[name].dtype == x.dtype
            np.testing.assert_array_equal(folder.read(name), x)


@pytest.mark.parametrize("dtype", [np.float32, BF16, E8M0, np.uint8], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 256, 128)])
def test_fp8_blocks_are_read_with_the_scale_of_another_shard(dtype, shape, tmp_path):
    codes = normal(0, *shape).astype(E4M3)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = (2.0 ** RANDOM.integers(-4, 4, grid)).astype(E8M0 if dtype == np.uint8 else dtype)
    stored = scale.view(np.uint8) if dtype == np.uint8 else scale
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write_folder(tmp_path / "f", [{"a.weight": codes}, {"a.weight_scale_inv": stored}], config)
    folder = open_folder(tmp_path / "f")
    assert list(folder.tensors) == ["a.weight"]
    q = folder.read("a.weight", dtype=np.dtype(np.float32))
    assert isinstance(q, QTensor)
    assert q.tiling == Block(128, 128)
    expected = codes.astype(np.float32) * spread(scale, shape)
    np.testing.assert_array_equal(q.dequantize(), expected)
    part = slice(0, 128) if len(shape) == 2 else slice(1, 3)
    np.testing.assert_array_equal(folder.read("a.weight", part).dequantize(jnp.float32), expected[part])


@pytest.mark.parametrize(
    ("scale_shape", "tiling"), [((6, 1), Channel()), ((6,), Channel()), ((), PerTensor())]
)
@pytest.mark.parametrize("dtype", [E4M3, np.int8], ids=str)
def test_channel_and_tensor_scales_are_read(scale_shape, tiling, dtype, tmp_path):
    codes = (10 * normal(0, 6, 8)).astype(dtype)
    scale = np.abs(normal(0, *scale_shape)) + 1
    write_folder(tmp_path / "f", [{"a.weight": codes, "a.weight_scale": np.asarray(scale)}])
    folder = open_folder(tmp_path / "f")
    q = folder.read("a.weight", dtype=np.dtype(np.float32))
    assert q.tiling == tiling
    expected = codes.astype(np.float32) * scale.reshape(-1, 1)
    np.testing.assert_array_equal(q.dequantize(), expected)
    np.testing.assert_array_equal(folder.read("a.weight", slice(2, 4)).dequantize(jnp.float32), expected[2:4])


def packed(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """`a.weight`, 6 x 64 in two groups, as compressed-tensors packs it; other tensors in place of some."""
    codes = RANDOM.integers(-8, 8, (6, 64))
    words = sum((codes[:, i::8] + 8).astype(np.uint32) << 4 * i for i in range(8)).view(np.int32)
    tensors = {
        "weight_packed": words,
        "weight_scale": (np.abs(normal(0, 6, 2)) + 1).astype(BF16),
        "weight_shape": np.array([6, 64]),
        "codes": codes,
    }
    return {f"a.{word}": x for word, x in (tensors | changes).items()}


def test_packed_int4_is_read_whole_and_in_parts(tmp_path):
    tensors = packed()
    codes = tensors.pop("a.codes")
    write_folder(tmp_path / "f", [{"a.weight_packed": tensors.pop("a.weight_packed")}, tensors])
    folder = open_folder(tmp_path / "f")
    assert list(folder.tensors) == ["a.weight"]
    assert folder.tensors["a.weight"].shape == (6, 64)
    expected = codes * tensors["a.weight_scale"].astype(np.float32).repeat(32, 1)
    for part in (slice(None), slice(2, 5)):
        q = folder.read("a.weight", part, np.dtype(np.float32))
        assert q.tiling == Group(32)
        np.testing.assert_array_equal(q.dequantize(), expected[part])


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_shape": np.array([6, 100])},
        {"weight_shape": np.array([6, -1])},
        {"weight_shape": np.array([6, 2**62])},
        {"weight_shape": np.array([6.0, 64.0])},
        {"weight_scale": np.ones((6, 3), np.float32)},
        {"weight_scale": np.ones((6, 0), np.float32)},
        {"weight_zero_point": np.zeros((1, 2), np.int32)},
        {"weight": np.zeros((6, 64), np.float32)},
    ],
    ids=str,
)
def test_words_packed_in_another_way_are_refused_by_name(changes, tmp_path):
    write_folder(tmp_path / "f", [packed(**changes)])
    with pytest.raises(ValueError, match=r"'a\.weight_packed' is I32 .* needed 4 bits, symmetric"):
        open_folder(tmp_path / "f")


def corrupt(change):
    """A file of two tensors whose header `change` has altered."""
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
    }
    text = change(header) or json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text + bytes(12)


BROKEN_FILES = {
    "cut short": lambda h: (h["b"].update(shape=[2], data_offsets=[8, 16]), None)[1],
    "an overlap": lambda h: h["b"].update(data_offsets=[4, 8]),
    "a hole": lambda h: (h["a"].update(shape=[1], data_offsets=[0, 4]), None)[1],
    "unknown dtype": lambda h: h["b"].update(dtype="F7"),
    "a negative shape": lambda h: h["b"].update(shape=[-1]),
    "a huge shape": lambda h: h["b"].update(shape=[2**62, 2**62, 0]),
    "a boolean": lambda h: h["b"].update(shape=[True]),
    "no entry": lambda h: h.update(b=None),
    "offsets of words": lambda h: h["b"].update(data_offsets=["8", "12"]),
    "no JSON": lambda h: "{",
    "no object": lambda h: "[1]",
    "a key twice": lambda h: '{"a":1,"a":2}',
    "too deep": lambda h: '{"a":' + "[" * 100_000,
    "no UTF-8": lambda h: b'{"\xff":1}',
    "a lone surrogate": lambda h: '{"\\ud800":1}',
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_refused_by_name_in_one_line(case, tmp_path):
    write_folder(tmp_path / "f", [{"a": normal(0, 2)}])
    (tmp_path / "f" / "model.safetensors").write_bytes(corrupt(BROKEN_FILES[case]))
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as caught:
        open_folder(tmp_path / "f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_file_without_a_header_is_refused(size, tmp_path):
    write_folder(tmp_path / "f", [{"a": normal(0, 2)}])
    (tmp_path / "f" / "model.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match="not a safetensors file, or cut short"):
        open_folder(tmp_path / "f")


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x",
        "..",
        "",
        "a\\b.safetensors",
        "\0.safetensors",
        "pytorch_model.bin",
        3,
    ],
)
def test_an_index_may_not_lead_out_of_the_folder(file, tmp_path):
    write_folder(tmp_path / "f", [{"a": normal(0, 2)}, {"b": normal(0, 2)}])
    index = tmp_path / "f" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="needed a \\.safetensors file in it"):
        open_folder(tmp_path / "f")


def test_what_an_index_names_must_be_there(tmp_path):
    write_folder(tmp_path / "f", [{"a": normal(0, 2)}, {"b": normal(0, 2)}])
    index = tmp_path / "f" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(
        json.dumps(whole | {"weight_map": {**whole["weight_map"], "c": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"'c' is in 'model-00001-of-00002\.safetensors', which has no"):
        open_folder(tmp_path / "f")
    for name in ("gone", 300 * "x"):  # the latter longer than any file's name can be
        index.write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
        with pytest.raises(ValueError, match=rf"'a' is in '{name}\.safetensors', which is not in the folder"):
            open_folder(tmp_path / "f")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_must_be_positive_and_finite(scale, tmp_path):
    tensors = {"a.weight": normal(0, 2, 2).astype(E4M3), "a.weight_scale": np.full((2, 1), scale, np.float32)}
    write_folder(tmp_path / "f", [tensors])
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'a\.weight': .*not a positive finite"):
        open_folder(tmp_path / "f").read("a.weight")


def test_a_scale_that_fits_no_layout_is_refused(tmp_path):
    tensors = {"a.weight": normal(0, 6, 4).astype(E4M3), "a.weight_scale_inv": normal(0, 4, 4)}
    write_folder(tmp_path / "f", [tensors])
    with pytest.raises(ValueError, match=r"'a\.weight' is F8_E4M3 \(6, 4\) but 'a\.weight_scale_inv' is F32"):
        open_folder(tmp_path / "f")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "a LoRA adapter.*merge it"),
        ("pytorch_model.bin", "never read"),
        ("x", "holds neither"),
    ],
)
def test_what_is_no_whole_safetensors_model_is_refused_with_a_way_out(file, words, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        open_folder(tmp_path / "gone")


def test_jax_takes_what_is_read_without_a_copy(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones(3, np.float32), "b": np.ones((5, 7), BF16)}, path)
    with contextlib.closing(TensorReader(path)) as reader:
        for name, band in (("a", slice(None)), ("b", slice(1, 4))):
            found = reader.read(name, band)
            assert jax.device_put(found, jax.devices("cpu")[0]).unsafe_buffer_pointer() == found.ctypes.data
