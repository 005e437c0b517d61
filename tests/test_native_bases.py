"""The study of native bases: scale rules, what is run again, and what the report holds against what."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from benchmarks.behaviour.native import layouts, methods, pairs, report, study
from benchmarks.behaviour.training import Size
from daq_jax.demo.model import ModelSize, make_params

SIZE = Size(ModelSize(layers=1, width=16, heads=2, context=8), 4, 20, 1e-2, 10, (1e-3,), judged=6)
WEIGHT = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)


def power(largest, top, up_from):
    """The scale of a tile whose largest weight is `largest`, by the exponent `top` of the largest code."""
    mantissa, exponent = math.frexp(largest)
    return 2.0 ** (exponent - 1 + (2 * mantissa >= up_from) - top)


@pytest.mark.parametrize(("name", "up_from"), [("floor rule", 2.0), ("llm-compressor", 1.75)])
def test_powers_of_two_by_the_largest_weight(name, up_from):
    recipe = methods.recipe_of(name, layouts.LAYOUTS["mxfp4"])
    q = daq.quantize({"kernel": WEIGHT}, {"kernel": WEIGHT}, recipe)["kernel"]
    largest = np.abs(WEIGHT.reshape(2, 32, 48)).max(1)
    expected = np.vectorize(power)(largest, 2, up_from)
    np.testing.assert_array_equal(q.scale, expected)


def test_int4_of_llm_compressor_has_sixteen_codes():
    recipe = methods.recipe_of("llm-compressor", layouts.LAYOUTS["int4"])
    q = daq.quantize({"kernel": WEIGHT}, {"kernel": WEIGHT}, recipe)["kernel"]
    scale = np.abs(WEIGHT.reshape(2, 32, 48)).max(1, keepdims=True) / 7.5
    np.testing.assert_allclose(np.asarray(q.scale), scale[:, 0], rtol=2**-8)
    codes = np.clip(np.round(WEIGHT.reshape(2, 32, 48) / np.asarray(q.scale)[:, None]), -8, 7)
    found = np.asarray(q.dequantize()).reshape(2, 32, 48) / np.asarray(q.scale)[:, None]
    assert np.mean(np.isclose(found, codes, atol=1e-5)) > 0.999  # ties differ
    assert found.min() < -7.5


def test_scales_of_nvfp4_are_e4m3_numbers():
    q = daq.quantize({"kernel": WEIGHT}, {"kernel": WEIGHT}, layouts.LAYOUTS["nvfp4"].of(daq.Recipe()))[
        "kernel"
    ]
    units = np.asarray(q.scale) * 2.0**10
    np.testing.assert_array_equal(units.astype(jnp.float8_e4m3fn).astype(np.float32), units)


@pytest.mark.parametrize("kind", layouts.LAYOUTS)
def test_dither_and_feedback_rounds_to_neighbours_and_leaves_a_base_alone(kind):
    recipe = methods.recipe_of("dither + feedback", layouts.LAYOUTS[kind])
    base = pairs.make_base({"kernel": jnp.asarray(WEIGHT)}, kind)
    same = daq.quantize(base.shipped, base.params, recipe)["kernel"]
    np.testing.assert_array_equal(same.dequantize(), base.params["kernel"])
    tuned = {"kernel": base.params["kernel"] + 1e-3 * np.float32(WEIGHT.T.reshape(64, 48))}
    found = daq.quantize(base.shipped, tuned, recipe)["kernel"]
    np.testing.assert_array_equal(found.scale, base.shipped["kernel"].scale)
    assert found.dequantize().shape == WEIGHT.shape
    assert np.isfinite(found.dequantize()).all()


def test_changes_are_those_of_their_names():
    tuner = object.__new__(pairs.Tuner)
    tuner.size, tuner.key = SIZE, jax.random.key(0)
    params = make_params(SIZE.model, jax.random.key(1))
    tuner.paths = pairs.quantized_paths(params)
    assert len(tuner.paths) == 4
    noisy = tuner.change(params, pairs.Change("noise", 0.01))
    weights = [p["layer_0"]["up_proj"]["kernel"] for p in (params, noisy)]
    ratio = np.linalg.norm(weights[1] - weights[0]) / np.linalg.norm(weights[0])
    assert 0.009 < ratio < 0.011
    np.testing.assert_array_equal(noisy["embed"]["embedding"], params["embed"]["embedding"])


def test_a_lora_tune_has_the_rank_of_its_factors(monkeypatch):
    monkeypatch.setattr(pairs, "LORA_RANK", 2)
    text = pairs.Text(
        "noise", np.random.default_rng(0).integers(0, 256, 200, np.uint8), np.zeros(40, np.uint8)
    )
    tuner = pairs.Tuner(SIZE, (text, text), 0)
    kernel = tuner.trained["layer_0"]["up_proj"]["kernel"]
    change = tuner.change(tuner.trained, pairs.Change("lora", 1e-2))["layer_0"]["up_proj"]["kernel"] - kernel
    sizes = np.linalg.svd(np.float64(change), compute_uv=False)
    assert sizes[1] > 1e-4 > 1e-5 > sizes[2]  # subtracting in float32 leaves about 1e-7


def row(method, kl, *, kind="mxfp4", what="tune", rate=1e-3, change=0.01):
    fixed = {
        "seed": 0,
        "stored": "f32",
        "layout": "mxfp4",
        "projection": 1.0,
        "moved": 0.0,
        "scales_changed": 0,
    }
    return {
        "base_kind": kind,
        "what": what,
        "rate": rate,
        "method": method,
        "kl": kl,
        "change": change,
        **fixed,
    }


def test_the_report_holds_the_default_against_the_same_pair_and_the_floor():
    rows = [row("absmax at base scale", 4.0), row("stochastic", 2.0), row("default", 3.0), row("absmax", 0.5)]
    rows += [
        row("absmax", 10.0, kind="bf16"),
        row("absmax", 1.0, kind="bf16", rate=2e-3),
        row("default", 0.0, what="zero"),
    ]
    found = report.Study([{"seed": 0, "rows": rows}])
    assert found.ratios(rows[2]) == (1.5, 0.75, 0.3)
    missed = report.shortfalls(found)
    assert [len(cells) for _, cells in missed.values()] == [1, 0, 0, 0]
    assert [asked for asked, _ in missed.values()] == [1, 1, 1, 0]
    assert "mxfp4, tune 1.00%: 1.50" in missed["no more than 1.1 x the least of the others"][1]
    assert "all 1 cells" in report.zero_change(found)
    rows[-1]["scales_changed"] = 3
    assert "3 scales" in report.zero_change(report.Study([{"seed": 0, "rows": rows}]))


def test_a_run_goes_on_where_the_last_stopped(tmp_path):
    path = tmp_path / "a.json"
    change = pairs.Change("tune", 1e-3)
    wanted = study.cells("mxfp4", change, ("absmax", "default"))
    first = study.Results(path, path, {"size": "tiny", "seed": 0}, ())
    assert first.missing("mxfp4", change, wanted) == wanted
    first.add("mxfp4", change, {"base": {}}, [{"layout": "mxfp4", "method": "absmax", "kl": 1.0}], 2.0)

    second = study.Results(path, path, {}, ())
    assert [cell.method for cell in second.missing("mxfp4", change, wanted)] == ["default"]
    assert len(second.missing("int4", change, study.cells("int4", change, ("absmax",)))) == 1

    third = study.Results(path, path, {}, ("absmax",))
    assert third.missing("mxfp4", change, wanted) == wanted
    third.add("mxfp4", change, {"base": {}}, [{"layout": "mxfp4", "method": "absmax", "kl": 3.0}], 2.0)
    content = json.loads(path.read_text())
    assert [r["kl"] for r in content["rows"]] == [3.0]
    assert content["rows"][0]["run"] == len(content["runs"]) - 1
    assert [cell.method for cell in third.missing("mxfp4", change, wanted)] == ["default"]


def test_a_bf16_base_is_brought_to_every_grid_by_the_methods_that_need_no_scale_of_it():
    found = study.cells("bf16", pairs.Change("tune", 1e-3), tuple(methods.METHODS))
    assert {cell.layout for cell in found} == set(layouts.LAYOUTS)
    assert {cell.method for cell in found} == set(methods.ON_BF16)
    assert not study.cells("bf16", pairs.Change("zero", 0.0), ("absmax", "default"))
