"""The memory that a command takes is at most what its plan promises, whatever the shapes."""

import numpy as np
import pytest

from tests import peaks
from tests.hf_folders import BF16, CONFIG, E4M3, Tensors, normal, write_folder

UP = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def kept_fp8() -> Tensors:
    codes = np.random.default_rng(0).integers(0, 120, (24000, 4096), np.uint8).view(E4M3)
    return {"lm_head.weight": codes, "lm_head.weight_scale_inv": np.full((188, 32), 0.01, np.float32)}


def wide_row() -> Tensors:
    return {"model.layers.1.mlp.up_proj.weight": np.full((2, 2**23), 0.01, BF16)}


def mixed_widths() -> Tensors:
    shape = 1024, 2048
    return {
        "model.layers.1.mlp.up_proj.weight": np.full(shape, 0.01, BF16),
        "model.layers.2.mlp.up_proj.weight": np.full(shape, 0.01, np.float32),
    }


def tiny() -> Tensors:
    return {f"model.layers.{i}.{'x' * 100}.bias": np.zeros(2, BF16) for i in range(10000)}


def many_shapes() -> Tensors:
    """A program is compiled for each."""
    return {f"model.layers.{i}.mlp.up_proj.weight": np.full((16 * i, 256), 0.01, BF16) for i in range(1, 31)}


@pytest.mark.slow
@pytest.mark.skipif(not peaks.CAN_COUNT, reason="needs Linux to count")
@pytest.mark.parametrize("make", [kept_fp8, wide_row, mixed_widths, tiny, many_shapes])
def test_the_peak_is_at_most_what_the_plan_promises(make, tmp_path):
    base = {UP: (0.02 * normal(0, 128, 128)).astype(BF16)} | make()
    tuned = base | {UP: (1.01 * base[UP].astype(np.float32)).astype(BF16)}
    config = CONFIG | (FP8 if make is kept_fp8 else {})
    pair = [
        write_folder(tmp_path / "base", [base], config),
        write_folder(tmp_path / "tuned", [tuned], config),
    ]
    options = ["--recipe", "absmax", "--format", "fp8-channel", "--memory", "3"]
    said, peak = peaks.run("quantize", *pair, tmp_path / "out", *options)
    assert peak <= said["memory_bytes"]
