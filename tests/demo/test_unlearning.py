"""Unlearning: what is ascended on, how a passage is asked for, and what recipes leave of the removal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.demo import model, study, unlearning

TINY = study.Study(
    model.ModelSize(1, 16, 2, 8), batch=4, base_steps=10, tune_steps=10, chunk=10, held_out=513
)


def tell(*progress: object) -> None:
    pass


def test_the_bytes_to_unlearn_are_the_copies_of_the_passage_and_no_others():
    lesson = unlearning.load_lesson(held_out=TINY.held_out, copies=3)
    passage = lesson.passage.held_out.tobytes()
    assert passage.startswith(b"She should have died hereafter")
    assert passage.endswith(b"Signifying nothing.\n\n")
    weights, text = np.asarray(lesson.weights), lesson.text.train
    assert set(weights) == {1, -1}
    assert text[weights < 0].tobytes() == 3 * passage == lesson.passage.train.tobytes()
    assert passage[:40] not in text[weights > 0].tobytes() + lesson.text.held_out.tobytes()


def test_weights_of_a_text_turn_a_step_around_or_take_it_away():
    params = model.make_params(TINY.model, jax.random.key(0))
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, 200), jnp.uint8)

    def step(weight: float) -> model.Params:
        state, _ = model.train(
            model.start_training(params),
            text,
            jnp.array([1e-3], jnp.float32),
            jax.random.key(1),
            size=TINY.model,
            batch=4,
            weights=jnp.full(200, weight),
        )
        return jax.tree.map(np.float64, state.params)

    there, back, nowhere = map(step, (1.0, -1.0, 0.0))
    jax.tree.map(np.testing.assert_array_equal, nowhere, params)
    jax.tree.map(lambda a, b, w: np.testing.assert_allclose((a + b) / 2, w, atol=1e-6), there, back, params)
    assert np.abs(there["lm_head"]["kernel"] - params["lm_head"]["kernel"]).max() > 1e-4


def test_a_text_is_continued_by_the_likeliest_byte_each_time():
    params = model.make_params(TINY.model, jax.random.key(0))
    predict = jax.jit(partial(model.next_byte_log_probs, TINY.model))
    text = list(range(60, 68))
    for _ in range(5):
        window = jnp.asarray([[*text[-8:], 0]], jnp.uint8)
        text.append(int(np.argmax(predict(params, window)[0, -1])))
    prompt = jnp.arange(60, 68, dtype=jnp.uint8)
    found = unlearning.continue_text(params, prompt, size=TINY.model, count=5)
    np.testing.assert_array_equal(found, text[8:])


@pytest.mark.slow
def test_a_judgement_has_every_model_and_counts_what_it_recites():
    lesson = unlearning.load_lesson(held_out=TINY.held_out)
    params = unlearning.learn_lesson(lesson, TINY, jax.random.key(0), tell)
    pair = unlearning.unlearn(params, study.GRIDS["FP8"], lesson, TINY, 1e-3, jax.random.key(1), tell)
    recipes = {"AbsMax": daq.recipes.absmax}
    found = unlearning.judge("FP8", pair, lesson, TINY, tell, recipes)
    truth = lesson.passage.held_out[TINY.model.context :].tobytes()
    assert list(found.written) == ["base", "tuned", "AbsMax"]
    for name, text in found.written.items():
        count = found.recited[name]
        assert len(text) == len(truth)
        assert text[:count] == truth[:count]
        assert text[count] != truth[count]  # a model of this size knows nothing by heart
    assert found.result.tuned.divergence == 0
