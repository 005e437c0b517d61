import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from benchmarks import __main__ as runner
from benchmarks.behaviour import baselines, corpora, methods, study, training
from daq_jax.demo.model import ModelSize, make_params, mean_divergence, mean_loss, next_byte_log_probs
from daq_jax.demo.texts import load_text

SMALL = training.Size(
    model=ModelSize(layers=1, width=16, heads=2, context=8),
    batch=4,
    base_steps=20,
    base_rate=1e-2,
    tune_steps=10,
    tune_rates=(1e-3,),
    judged=6,
    calibrated=4,
)
RECIPES = ("absmax", "gain_column", "awq")


def test_each_twelfth_document_is_held_out():
    text = corpora.split("letters", [bytes([65 + i]) * 3 for i in range(20)])
    assert bytes(text.held_out) == b"GGG\n\nSSS"
    assert b"G" not in bytes(text.train)
    assert len(text.train) == 18 * 3 + 17 * 2


def test_windows_lie_at_even_distances_and_reach_both_ends():
    found = corpora.windows(np.arange(11, dtype=np.uint8), 3, 5)
    np.testing.assert_array_equal(found[:, 0], [0, 3, 6])
    np.testing.assert_array_equal(found[-1], [6, 7, 8, 9, 10])


def test_a_judge_agrees_with_the_demo():
    first, second = (make_params(SMALL.model, jax.random.key(i)) for i in range(2))
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, 33), jnp.uint8)
    windows = text[jnp.arange(4)[:, None] * 8 + jnp.arange(9)]
    log_p = study.predict(first, windows, size=SMALL.model)
    loss, divergence = study.judge(second, windows, log_p, size=SMALL.model)
    np.testing.assert_allclose(loss, mean_loss(second, text, size=SMALL.model), rtol=1e-5)
    expected = mean_divergence(first, second, text, size=SMALL.model)
    np.testing.assert_allclose(divergence, expected, rtol=1e-4)


def test_figures_without_a_qtensor_equal_those_of_compare():
    rng = np.random.default_rng(0)
    base = {"a": {"kernel": rng.normal(size=(32, 48)).astype(np.float32)}}
    tuned = jax.tree.map(lambda w: w + np.float32(0.02) * rng.normal(size=w.shape).astype(np.float32), base)
    quantized = daq.quantize(base, tuned, daq.recipes.absmax)
    kept = daq.dequantize(quantized)
    found = study.change_figures(training.Pair(base, tuned), kept, ["a/kernel"])
    expected = daq.compare(base, tuned, quantized).total
    assert found == pytest.approx({name: float(getattr(expected, name)) for name in found}, rel=1e-4)


@pytest.mark.slow
def test_the_inputs_that_are_watched_are_those_of_the_matrices():
    params = make_params(SMALL.model, jax.random.key(0))
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.uint8)
    seen = baselines.watch_inputs(params, windows, size=SMALL.model)
    assert {"layer_0/qkv_proj/kernel", "layer_0/down_proj/kernel"} < set(seen)
    # The head's input times its weight is the logits, whose log-softmax the model returns.
    head = np.float64(params["lm_head"]["kernel"])
    log_p = np.float64(next_byte_log_probs(SMALL.model, params, windows)).reshape(-1, 256)
    x = np.linalg.lstsq(
        (head - head.mean(axis=1, keepdims=True)).T, (log_p - log_p.mean(axis=1, keepdims=True)).T
    )[0].T
    inputs = seen["lm_head/kernel"]
    np.testing.assert_allclose(inputs.gram, x.T @ x, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(inputs.mean, np.abs(x).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(inputs.largest, np.abs(x).max(axis=0), rtol=1e-3)


def test_awq_is_never_worse_than_absmax_at_the_output_and_smoothquant_is_a_rescaling():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 32)) * np.exp(rng.normal(size=32))
    weight = jnp.asarray(rng.normal(size=(32, 24)), jnp.float32)
    seen = baselines.Inputs(*(jnp.asarray(a, jnp.float32) for a in (x.T @ x, abs(x).mean(0), abs(x).max(0))))
    plain = daq.quantize(weight, weight, daq.recipes.absmax).dequantize()
    kept = baselines.awq(weight, seen, daq.recipes.absmax)
    errors = [np.linalg.norm(x @ np.float64(w - weight)) for w in (kept, plain)]
    assert errors[0] <= errors[1]

    kept = baselines.smoothquant(weight, seen, daq.recipes.absmax)
    factor = np.sqrt(abs(x).max(0) / np.abs(np.asarray(weight)).max(1))[:, None].astype(np.float32)
    scaled = jnp.asarray(np.asarray(weight) * factor)
    expected = daq.quantize(scaled, scaled, daq.recipes.absmax).dequantize() / factor
    # A factor that differs in its last bit may send a weight to the next code.
    assert np.mean(np.isclose(kept, expected, rtol=1e-5)) > 0.99


@pytest.mark.parametrize("layout", methods.LAYOUTS)
def test_every_recipe_of_the_table_fits_every_layout(layout):
    for method in methods.METHODS.values():
        if isinstance(method.means, daq.Recipe):
            recipe = methods.in_layout(method.means, layout)
            assert (recipe.format, recipe.tiling) == methods.LAYOUTS[layout]
            assert recipe.rounding == method.means.rounding


@pytest.mark.slow
def test_a_small_study_writes_json_table_and_plots(tmp_path, monkeypatch, capsys):
    texts = tuple(load_text(name, held_out=600) for name in ("lincoln", "macbeth"))
    monkeypatch.setattr(study, "load_corpora", lambda folder: texts_of(texts))
    monkeypatch.setitem(training.SIZES, "tiny", SMALL)
    pytest.importorskip("matplotlib")
    options = ["--size", "tiny", "--pictures", "--recipes", *RECIPES]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "behaviour", *options, "--out", str(tmp_path)])
    runner.main()

    path = tmp_path / "tiny_fp8-block_seed0.json"
    found = json.loads(path.read_text())
    command = "python -m benchmarks behaviour --size tiny --pictures --recipes absmax gain_column awq"
    assert found["command"] == command
    assert [(row["base_kind"], row["recipe"]) for row in found["rows"]] == [
        (kind, name) for kind in ("fp8", "bf16") for name in RECIPES
    ]
    for row in found["rows"]:
        assert 0 < row["kl"] < 1
        assert row["same_codes"] == {"absmax": 1.0, "awq": None}.get(row["recipe"], row["same_codes"])
    native = found["rows"][:2]
    assert abs(native[1]["projection"] - 1) < 0.05 < abs(native[0]["projection"] - 1)

    for name in ("tiny_fp8-block_kl.png", "tiny_fp8-block_style.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "tiny_fp8-block.md").read_text()
    assert table in capsys.readouterr().out
    floor = found["rows"][3]["kl"]
    assert f"| absmax | {floor:.1e} (1.00) |" in table

    # Merging two seeds shows their mean; the ratio is to the floor of the same seed.
    other = json.loads(path.read_text()) | {"seed": 1}
    for row in other["rows"]:
        row |= {"seed": 1, "kl": 3 * row["kl"]}
    other["pairs"] = [pair | {"seed": 1} for pair in other["pairs"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    merged = ["--merge", str(path), str(tmp_path / "other.json")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "behaviour", *merged, "--out", str(tmp_path)])
    runner.main()
    table = (tmp_path / "tiny_fp8-block.md").read_text()
    assert f"| absmax | {2 * floor:.1e} ± {2**0.5 * floor:.0e} (1.00, 1.00) |" in table


def texts_of(texts):
    return tuple(corpora.Text(t.name, t.train, t.held_out) for t in texts)


def test_studies_of_different_layouts_are_not_merged(tmp_path, monkeypatch):
    paths = []
    for layout in ("fp8-block", "int8-channel"):
        paths.append(tmp_path / f"{layout}.json")
        paths[-1].write_text(json.dumps({"size": "tiny", "layout": layout, "rows": []}))
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "behaviour", "--merge", *map(str, paths), "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="different sizes, layouts or dtypes"):
        runner.main()


def test_stored_pairs_are_exact_in_bfloat16(monkeypatch):
    monkeypatch.setattr(training, "learn", lambda params, *_: jax.tree.map(lambda x: x * 1.001, params))
    text = load_text("lincoln", held_out=600)
    pairs = training.make_pairs(
        SMALL, "fp8-block", ("fp8",), "bf16", texts_of((text, text)), 0, lambda _: None
    )
    for _, _, pair in pairs:
        for leaf in jax.tree.leaves(pair):
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_base_steps_share_the_program_of_tuning():
    for size in training.SIZES.values():
        assert size.base_steps % size.tune_steps == 0
