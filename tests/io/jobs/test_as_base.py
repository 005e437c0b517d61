"""Back into the format of the base: byte for byte where nothing changed, and the change kept where it did."""

import json
import pathlib

import numpy as np
import pytest

import daq_jax as daq
from tests.cases import rng_for
from tests.hf_folders import BF16, CONFIG, Tensors, normal, write_folder
from tests.native_folders import BY_LAYOUT, Native, natives

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


def stored(path: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                a, b = (start + x for x in entry["data_offsets"])
                found[name] = entry["dtype"], tuple(entry["shape"]), raw[a:b]
    return found


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


def low_rank(seed: int, like: np.ndarray, size: float) -> np.ndarray:
    """A change of rank 8, of a size relative to that of the weights."""
    *batch, outputs, inputs = like.shape
    change = normal(seed, *batch, outputs, 8) @ normal(seed + 1, *batch, 8, inputs)
    return size * np.linalg.norm(like) / np.linalg.norm(change) * change


def kept_of(change: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """Projection, and error along the eight leading directions of a change."""
    projection = np.sum(change * kept) / np.sum(change * change)
    error, size = 0.0, 0.0
    for d, q in zip(
        change.reshape(-1, *change.shape[-2:]), kept.reshape(-1, *change.shape[-2:]), strict=True
    ):
        u, s, v = np.linalg.svd(d, full_matrices=False)
        error += np.linalg.norm(u[:, :8].T @ (q - d) @ v[:8].T) ** 2
        size += np.linalg.norm(s[:8]) ** 2
    return projection, (error / size) ** 0.5


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
    print(layout, projection, error)
    assert 0.9 < projection < 1.1
    assert error < 0.15
    assert 0 < report["identity"]["moved_codes"] < 1
    assert report["identity"]["moved_scales"] == 0
    assert found[native.scale] == stored(paths[0])[native.scale]
    compared = daq.compare_folders(paths[0], paths[1], paths[2])
    assert float(compared.total.projection) == pytest.approx(projection, rel=1e-3)
