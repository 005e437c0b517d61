import dataclasses
import io
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax import demo
from daq_jax.demo import model, report, study, texts

TINY = model.ModelSize(layers=1, width=16, heads=2, context=8)
TINY_STUDY = study.Study(
    model=TINY,
    batch=4,
    base_steps=20,
    tune_steps=10,
    chunk=10,
    base_rate=1e-2,
    tune_rate=1e-4,
    held_out=513,
)

LENGTH = TINY_STUDY.held_out  # texts of one length share one compiled program

TWO_RECIPES = {"one": daq.recipes.absmax, "two": daq.recipes.absmax}  # one compilation


def as_bytes(*values: int) -> jax.Array:
    return jnp.array(values, jnp.uint8)


# --- texts ---


@pytest.mark.parametrize("name", ["lincoln", "macbeth"])
def test_a_text_is_plain_ascii_free_of_licence_words_and_cut_at_its_end(name):
    text = texts.load_text(name, held_out=1000)
    whole = bytes(text.train) + bytes(text.held_out)
    assert text.held_out.shape == (1000,)
    assert 100_000 < len(whole) < 200_000
    assert whole.isascii()
    assert not any(word in whole.lower() for word in (b"gutenberg", b"etext", b"copyright", b"app note"))


@pytest.mark.parametrize("held_out", [0, 10**9])
def test_holding_out_nothing_or_too_much_is_refused(held_out):
    with pytest.raises(ValueError, match=r"macbeth has \d+ bytes; cannot hold out"):
        texts.load_text("macbeth", held_out=held_out)


# --- model ---


def test_losses_equal_their_definition():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), (2, 3))
    text = rng.integers(0, 5, (2, 4))
    loss = [[-math.log(p[b, i, text[b, i + 1]]) for i in range(3)] for b in range(2)]
    log_p = jnp.asarray(np.log(p), jnp.float32)
    np.testing.assert_allclose(model.losses(log_p, jnp.asarray(text, jnp.uint8)), loss, rtol=1e-5)


def test_rotate_multiplies_pairs_as_complex_numbers():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
    expected = np.empty((1, 5, 2, 3), complex)
    for place in range(5):
        for i in range(3):
            turn = np.exp(1j * place * 10000 ** (-i / 3))
            expected[:, place, :, i] = (x[:, place, :, i] + 1j * x[:, place, :, i + 3]) * turn
    actual = model.rotate(jnp.asarray(x))
    np.testing.assert_allclose(actual, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)


def test_a_prediction_sees_what_came_before_and_nothing_after():
    params = model.make_params(TINY, jax.random.key(0))
    text = as_bytes(*range(60, 69))
    predict = jax.jit(partial(model.next_byte_log_probs, TINY))
    before, after = (predict(params, t[None]) for t in (text, text.at[4].set(jnp.uint8(7))))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after).max(axis=-1)[:, 4:] > 0).all()


def test_model_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="each size must be 1 or more"):
        model.ModelSize(layers=0)
    with pytest.raises(ValueError, match=r"multiple of 2 \* `heads`"):
        model.ModelSize(width=12, heads=4)
    with pytest.raises(ValueError, match=r"`experts` must be 0, or 2 and more"):
        model.ModelSize(experts=1)


def test_each_byte_takes_the_two_experts_that_its_router_prefers():
    experts, x = (
        model.Experts(dataclasses.replace(TINY, experts=4)),
        jax.random.normal(jax.random.key(0), (1, 3, 16)),
    )
    params = experts.init(jax.random.key(1), x)["params"]
    found = experts.apply({"params": params}, x)

    for row, byte in zip(np.asarray(found)[0], np.float64(x[0]), strict=True):
        preferred = byte @ np.float64(params["router"]["kernel"])
        best = np.argsort(preferred)[-2:]
        shares = np.exp(preferred[best]) / np.exp(preferred[best]).sum()
        hidden = [np.float64(jax.nn.gelu(jnp.float32(byte @ params["up_proj"][e]))) for e in best]
        each = [h @ np.float64(params["down_proj"][e]) for h, e in zip(hidden, best, strict=True)]
        np.testing.assert_allclose(row, shares @ each, rtol=1e-4, atol=1e-6)


def test_learning_rates_rise_to_the_peak_and_fall_to_zero():
    rates = np.asarray(model.learning_rates(20, 0.5, warmup=5))
    np.testing.assert_allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    cosine = [0.25 * (1 + math.cos(math.pi * i / 15)) for i in range(16)]
    np.testing.assert_allclose(rates[4:], cosine, atol=1e-6)


def test_windows_predict_each_byte_once():
    windows = np.asarray(model.cut_windows(jnp.arange(12, dtype=jnp.uint8), 5))
    np.testing.assert_array_equal(windows, [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]])


@pytest.mark.slow
def test_training_learns_a_repeated_text_and_a_rate_of_zero_changes_nothing():
    params = model.make_params(TINY, jax.random.key(0))
    learnt = len(texts.load_text("lincoln", held_out=TINY_STUDY.held_out).train)
    text = jnp.asarray(np.resize(np.frombuffer(b"out, out, brief candle! ", np.uint8), learnt))

    def train(state: model.TrainState, rates: jax.Array) -> tuple[model.TrainState, jax.Array]:
        key = jax.random.key(1)
        return model.train(state, text, rates, key, size=TINY, batch=TINY_STUDY.batch)

    still, _ = train(model.start_training(params), jnp.zeros(TINY_STUDY.chunk))
    jax.tree.map(np.testing.assert_array_equal, still.params, params)

    state, losses = model.start_training(params), []
    for rates in model.learning_rates(60, 1e-2, warmup=5).reshape(-1, TINY_STUDY.chunk):
        state, chunk = train(state, rates)
        losses += [float(loss) for loss in chunk]
    assert len(losses) == 60
    assert losses[-1] < 0.3 * losses[0]
    before, after = (model.mean_loss(p, text[:LENGTH], size=TINY) for p in (params, state.params))
    assert after < 0.3 * before


def test_mean_loss_and_divergence_of_a_model_that_knows_nothing():
    params = model.make_params(TINY, jax.random.key(0))
    blank = params | {"lm_head": {"kernel": 0 * params["lm_head"]["kernel"]}}
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, LENGTH), jnp.uint8)
    np.testing.assert_allclose(model.mean_loss(blank, text, size=TINY), math.log(256), rtol=1e-6)
    assert model.mean_divergence(params, params, text, size=TINY) == 0

    windows = model.cut_windows(text, TINY.context)
    log_p = np.asarray(jax.jit(partial(model.next_byte_log_probs, TINY))(params, windows), np.float64)
    # From p to the uniform distribution: log 256 less the entropy of p.
    expected = math.log(256) + np.mean(np.sum(np.exp(log_p) * log_p, axis=-1))
    actual = model.mean_divergence(params, blank, text, size=TINY)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


# --- study ---


def test_an_fp8_native_base_lies_on_the_e4m3_grid_and_is_stored_in_bfloat16():
    kernel = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]  # the last is NaN
    params = {"up_proj": {"kernel": jnp.asarray(kernel)}, "norm": {"scale": jnp.ones(4)}}
    native = study.on_grid(params, study.GRIDS["FP8"])
    assert {leaf.dtype for leaf in jax.tree.leaves(native)} == {jnp.dtype(jnp.bfloat16)}
    for tile, before in zip(
        np.split(np.asarray(native["up_proj"]["kernel"], np.float64), 2, 1),
        np.split(kernel, 2, 1),
        strict=True,
    ):
        codes = np.abs(tile) / (np.abs(before).max() / 448)
        distance = np.abs(codes[..., None] - np.array(values)).min(-1)
        assert (distance <= 2.0**-8 * codes).all()  # bfloat16 keeps 8 bits


def test_an_mxfp4_native_base_is_a_4_bit_float_times_a_power_of_two_for_each_32_inputs():
    kernel = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    native = study.on_grid({"up_proj": {"kernel": jnp.asarray(kernel)}}, study.GRIDS["MXFP4"])
    found = np.asarray(native["up_proj"]["kernel"], np.float64).reshape(2, 32, 16)
    power = 2.0 ** np.ceil(np.log2(np.abs(kernel.reshape(2, 32, 16)).max(1, keepdims=True) / 6))
    assert set(np.unique(np.abs(found / power))) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert np.abs(found - kernel.reshape(2, 32, 16)).max() <= power.max()


def test_relative_change_counts_quantized_weights_only():
    base = {"a": jnp.full((2, 2), 3.0), "b": jnp.ones(3), "c": jnp.full((1, 2), 4.0)}
    tuned = {"a": jnp.full((2, 2), 3.5), "b": jnp.ones(3) * 9, "c": jnp.array([[4.0, 5.0]])}
    actual = study.relative_change(study.Pair(base, tuned), daq.quantize(base, tuned, daq.recipes.absmax))
    assert actual == pytest.approx(math.sqrt((4 * 0.25 + 1) / (4 * 9 + 2 * 16)))


def test_step_counts_must_be_multiples_of_a_chunk():
    with pytest.raises(ValueError, match="multiples of `chunk`"):
        study.Study(base_steps=70, chunk=50)


def test_the_recipes_run_from_absmax_to_the_default():
    names, recipes = zip(*demo.RECIPES.items(), strict=True)
    assert (names[0], recipes[0]) == ("absmax", daq.recipes.absmax)
    assert (names[-1], recipes[-1]) == ("default", daq.recipes.default)


@pytest.fixture(scope="module")
def tiny_run():
    console = Console(file=io.StringIO(), width=120)
    return demo.run(console, study=TINY_STUDY, recipes=TWO_RECIPES), console.file.getvalue()


def test_a_run_returns_plain_json_with_a_row_for_each_recipe(tiny_run):
    found, _ = tiny_run
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [base["grid"] for base in found["bases"]] == ["FP8", "MXFP4"]
    for base in found["bases"]:
        assert [row["name"] for row in base["recipes"]] == list(TWO_RECIPES)
        assert base["tuned"]["divergence"] == 0
        assert base["tuned"]["second_loss"] < base["base"]["second_loss"] < math.log(256)
        assert 0 < base["relative_change"] < 0.1
        for row in base["recipes"]:
            assert 0 <= row["sign_rate"] <= 1
            assert row["divergence"] > 0
        one, two = base["recipes"]
        assert one == two | {"name": "one"}


def test_without_a_terminal_a_run_prints_plain_lines_then_table_and_sentence(tiny_run):
    found, shown = tiny_run
    assert "train on Lincoln: 10/20\n" in shown
    assert "\x1b" not in shown
    assert all(name in shown for name in (*TWO_RECIPES, "FP8", "MXFP4"))
    assert " ".join(shown.split()).endswith(" ".join(base["sentence"] for base in found["bases"]))


def test_equal_seeds_give_equal_figures_and_json_prints_nothing(tiny_run):
    found, _ = tiny_run
    console = Console(file=io.StringIO())
    again = demo.run(console, study=TINY_STUDY, json=True, recipes=TWO_RECIPES)
    assert console.file.getvalue() == ""
    assert again == found


def test_all_matrices_of_the_layers_are_quantized_and_nothing_else():
    params = model.make_params(TINY, jax.random.key(0))
    quantized = daq.quantize(params, params, daq.recipes.absmax)
    flat = jax.tree_util.tree_leaves_with_path(quantized, is_leaf=lambda x: isinstance(x, daq.QTensor))
    names = {path[-2].key for path, leaf in flat if isinstance(leaf, daq.QTensor)}
    assert names == {"qkv_proj", "out_proj", "up_proj", "down_proj"}


# --- report ---


def test_the_table_fits_in_a_terminal_of_80_columns():
    console = Console(file=io.StringIO(), width=80)
    row = study.Row("a_name_of_20_letters", *(0.123456789,) * 7)
    results = [study.Result(grid, "Lincoln", "Macbeth", 0.01, row, row, (row,)) for grid in study.GRIDS]
    console.print(report.table_of(results))
    assert "projection" in console.file.getvalue()
    assert "…" not in console.file.getvalue()


def result_with(base: float, tuned: float, *recipes: tuple[str, float, float]) -> study.Result:
    rows = tuple(study.Row(name, 1.0, loss, divergence) for name, loss, divergence in recipes)
    return study.Result(
        "FP8", "A", "B", 0.01, study.Row("base", 1.0, base, 0.3), study.Row("tuned", 1.0, tuned, 0.0), rows
    )


def test_the_sentence_compares_the_first_recipe_with_the_last():
    result = result_with(3.0, 2.0, ("x", 2.75, 0.4), ("y", 9.0, 9.0), ("z", 1.9, 0.1))
    assert report.sentence_of(result) == (
        "FP8: tuning moved the weights by 1.00% and gained 1.000 nats per byte on B: "
        "x keeps 25% of that gain at a KL of 4.0e-01 "
        "from the tuned model, z keeps 110% at 1.0e-01, 4.0 times less."
    )
    swapped = dataclasses.replace(result, recipes=result.recipes[::-1])
    assert report.sentence_of(swapped).endswith("x keeps 25% at 4.0e-01, 4.0 times more.")


def test_the_sentence_says_when_there_was_nothing_to_keep():
    assert "nothing to keep" in report.sentence_of(result_with(2.0, 2.0, ("x", 2.0, 0.1)))


def test_on_a_terminal_progress_is_a_bar_for_each_task():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with report.progress_on(console) as tell:
        for done in range(3):
            tell("sow", done, 2)
            tell("reap", done, 2)
    assert all(word in console.file.getvalue() for word in ("sow", "reap", "2/2"))
