"""Packed int4: bit by bit against the definition, and read back by compressed-tensors itself."""

import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.hf.packed_int4 import packed_config, packed_tensors
from daq_jax.io.hf.packing import Words
from tests.cases import pair, rng_for


def unpack(words: np.ndarray, inputs: int) -> np.ndarray:
    return Words(4).unpack(words, inputs, np.dtype(np.int8))


INT4 = daq.Recipe(format=daq.int4, tiling=daq.Group(32))


@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 64])
def test_each_code_lies_in_four_bits_of_its_word(inputs):
    codes = rng_for("packed").integers(-8, 8, (3, inputs)).astype(np.int8)
    words = Words(4).pack(codes)
    assert words.dtype == np.int32
    for row in range(3):
        for i in range(inputs):
            assert (int(np.uint32(words.view(np.uint32)[row, i // 8])) >> 4 * (i % 8)) & 15 == codes[
                row, i
            ] + 8
    np.testing.assert_array_equal(unpack(words, inputs), codes)


@pytest.mark.parametrize("layout", ["flax", "hf"])
@pytest.mark.peers
def test_compressed_tensors_reads_the_weights_back(layout):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = pair("packed layer", (96, 40))[1].astype(np.float32)
    matrix = ((-2,), (-1,)) if layout == "flax" else ((1,), (0,))
    given = weight if layout == "flax" else weight.T.copy()
    rules = [daq.use("", INT4, matrix=matrix)]
    q = daq.quantize(given, given, INT4, rules=rules)
    config = QuantizationConfig.model_validate(packed_config(32, ["lm_head"]))
    state = {name: torch.from_numpy(x.copy()) for name, x in packed_tensors(q).items()}
    read = PackedQuantizationCompressor.decompress(state, config.config_groups["group_0"])["weight"]
    wanted = np.asarray(q.dequantize())
    np.testing.assert_array_equal(read.float().numpy(), wanted.T if layout == "flax" else wanted)


def test_what_cannot_be_stored_is_refused_with_the_reason():
    weight = pair("refused", (96, 8))[1].astype(np.float32)
    shifted = daq.quantize_density(
        {"w": weight}, None, daq.DensityRecipe(format=daq.int4, group=32, adjust=None, sweeps=0)
    )
    cases = {
        "real number, and these files hold whole zeros": shifted["w"],
        "format is nf4": daq.quantize(weight, weight, daq.Recipe(format=daq.nf4, tiling=daq.Group(32))),
        "tiling is Channel": daq.quantize(weight, weight, daq.Recipe(format=daq.int4, tiling=daq.Channel())),
        "no whole number of groups of 64": daq.quantize(
            weight, weight, daq.Recipe(format=daq.int4, tiling=daq.Group(64))
        ),
        "matrices: split it": daq.quantize(weight[None], weight[None], INT4),
    }
    for words, q in cases.items():
        with pytest.raises(ValueError, match=words):
            packed_tensors(q)


def test_symmetric_density_codes_can_be_stored():
    weight = pair("symmetric", (64, 8))[1].astype(np.float32)
    recipe = daq.DensityRecipe(format=daq.int4, group=32, centre=None, shift=False, adjust=None, sweeps=1)
    q = daq.quantize_density({"w": weight}, None, recipe)["w"]
    stored = packed_tensors(q)
    codes = unpack(stored["weight_packed"], 64)
    np.testing.assert_array_equal(codes * np.repeat(stored["weight_scale"], 32, axis=1), q.dequantize().T)
