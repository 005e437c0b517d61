"""The memory that a command takes is at most what its plan promises, whatever the shapes."""

import pathlib
import platform

import jax
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.hf.codings import HF_MATRIX
from daq_jax.io.hf.folders import Tensor
from daq_jax.io.hf.layouts import LAYOUTS
from daq_jax.io.hf.tensor_files import TensorSpec
from daq_jax.io.jobs import memory, streaming
from daq_jax.io.jobs.memory import Need, Room, give_back, need_of, peak_of, runtime_of
from daq_jax.io.jobs.options import in_layout
from daq_jax.io.jobs.planning import quantized_task
from daq_jax.leaves import lowered
from tests import peaks
from tests.compilations import compilations
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


@pytest.mark.parametrize(
    ("recipe", "layout", "dtype"),
    [
        ("absmax", "int8-channel", "BF16"),
        ("absmax", "mxfp8", "F32"),
        pytest.param("mse", "nvfp4", "BF16", marks=pytest.mark.slow),
    ],
)
def test_quantizing_is_promised_what_xla_takes(recipe, layout, dtype):
    shape, how = (1024, 2048), in_layout(daq.recipes.RECIPES[recipe], LAYOUTS[layout])
    weight, coding = (
        Tensor(UP, TensorSpec(dtype, shape), "", None, HF_MATRIX),
        LAYOUTS[layout].coding(UP, shape, 1.0),
    )
    like = jax.ShapeDtypeStruct(shape, weight.dtype)
    used = lowered(like, like, recipe=how, matrix=HF_MATRIX, one_device=True).compile().memory_analysis()
    promised = need_of(shape, shape[0], [weight], how, coding).work  # without a base nothing is compared
    assert used.temp_size_in_bytes + used.output_size_in_bytes <= promised
    assert promised <= 1.4 * (used.temp_size_in_bytes + used.output_size_in_bytes)


def test_one_band_is_quantized_while_the_next_is_read_and_the_last_written():
    small, large, last = Need(10, 5, 1), Need(4, 30, 2), Need(8, 1, 3)
    assert peak_of([small, large, last]) == 1 + 4 + 30 + 8
    assert peak_of([large, Need(write=50)]) == 50  # written when nothing is left to do
    assert peak_of([]) == 0


def test_a_comparison_of_rows_that_cannot_be_cut_is_counted():
    how, layout = in_layout(daq.recipes.absmax, LAYOUTS["int8-channel"]), LAYOUTS["int8-channel"]
    pair = 2 * [Tensor(UP, TensorSpec("BF16", (2, 2**24)), "", None, HF_MATRIX)]
    need = need_of((2, 2**24), 2, pair, how, layout.coding(UP, (2, 2**24), 1.0))
    # Sums of one row, copies of it out of both inputs and codes, and those of the next row.
    assert need.work >= (25 + 2 * (2 + 2 + 1)) * 2**24


def resident_bytes() -> int:
    return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the C library of GNU")
def test_memory_that_is_free_is_given_back():
    pieces = [
        bytes(2000) for _ in range(50000)
    ]  # 100 MB, below the last piece, so that the heap cannot shrink
    last, pieces[:] = pieces[-1], []
    before = resident_bytes()
    assert give_back()
    assert resident_bytes() < before - 50e6
    assert len(last) == 2000


def test_where_memory_is_not_given_back_a_plan_adds_what_compiling_took(monkeypatch):
    shape, recipe = (128, 128), in_layout(daq.recipes.default, LAYOUTS["fp8-block"])
    weight = Tensor(UP, TensorSpec("BF16", shape), "", None, HF_MATRIX)
    coding = LAYOUTS["fp8-block"].coding(UP, shape, 1.0)

    def promised() -> float:
        memory._need_of.cache_clear()
        return runtime_of(recipe, 3) + peak_of([need_of(shape, 128, [weight, weight], recipe, coding)])

    first = promised()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_malloc_trim", lambda: None)
        assert not give_back()
        assert promised() > first or platform.libc_ver()[0] != "glibc"
    memory._need_of.cache_clear()


def test_a_program_that_is_compiled_before_its_memory_is_needed_is_compiled_once(tmp_path, monkeypatch):
    base = {UP: (0.02 * normal(0, 48, 80)).astype(BF16)}
    pair = write_folder(tmp_path / "base", [base], CONFIG), write_folder(tmp_path / "tuned", [base], CONFIG)

    def job() -> None:
        daq.quantize_folder(
            *pair, tmp_path / "out", daq.recipes.absmax, format="int8-channel", overwrite=True
        )

    asked = []

    class Later:
        def compile(self) -> None:
            asked.append(self)

    jax.clear_caches()
    ahead = compilations(job)
    monkeypatch.setattr(streaming, "lowered", lambda *_, **__: Later())
    jax.clear_caches()
    assert compilations(job) == ahead
    assert len(asked) == (jax.default_backend() == "cpu")


def test_memory_that_does_not_suffice_is_told_in_digits_that_differ():
    shape, how = (
        (1024, 2048),
        in_layout(daq.Recipe(rounding=daq.UnbiasedSubspace(rank=4)), LAYOUTS["fp8-block"]),
    )
    weight = Tensor(UP, TensorSpec("BF16", shape), "", None, HF_MATRIX)
    coding = LAYOUTS["fp8-block"].coding(UP, shape, 1.0)
    sources = 3 * [need_of(shape, 1024, [weight, weight], how, coding)]
    needed = runtime_of(how, 1) + peak_of(sources)
    room = Room(int(needed - 10**7), 1)
    with pytest.raises(daq.DaqError) as found:
        quantized_task(weight, weight, how, coding, np.dtype(BF16), room)
    said = str(found.value).split()
    takes, given = said[said.index("takes") + 1], said[said.index("given") + 2]
    assert takes != given
    assert float(takes) == pytest.approx(needed / 1e9, abs=0.05)
