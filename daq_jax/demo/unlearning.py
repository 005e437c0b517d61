"""A tune that removes something: a model unlearns a passage, is quantized, and is asked for it again.

The text is Lincoln's messages to Congress and many copies of a speech of Macbeth, which the base learns by
heart. Unlearning is gradient ascent on the copies (arXiv:2210.01504) beside descent on the rest. That
quantization can bring back what was unlearned is the finding of arXiv:2410.16454; here the base is native.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

import daq_jax as daq
from daq_jax.demo.model import ModelSize, Params, make_params, next_byte_log_probs, to_dtype
from daq_jax.demo.study import GRIDS, Pair, Result, Study, Tell, learn, measure, of_grid, on_grid
from daq_jax.demo.texts import Text, load_text

FIRST, AFTER = b"She should have died hereafter;", b"[Enter a Messenger.]"  # the passage is between these
STUDY = Study(tune_steps=50, tune_rate=5e-5)
COPIES = 160  # of the passage: a third of the text

RECIPES: Mapping[str, daq.Recipe] = {
    "AbsMax": daq.recipes.absmax,
    "nearest at the base's scale": daq.Recipe(search=daq.BaseScale()),
    "stochastic at the base's scale": daq.Recipe(search=daq.BaseScale(), rounding=daq.Stochastic()),
    "default": daq.recipes.default,
}


class Lesson(NamedTuple):
    """What a base learns, and what of it is unlearned."""

    text: Text  # Lincoln, and behind it the copies; the held-out part is Lincoln's
    passage: Text  # the copies; the held-out part is the passage, once
    weights: Float[Array, " N"]  # of the bytes of `text.train` for unlearning: 1, and -1 in the copies


class Unlearned(NamedTuple):
    """What is left of an unlearning.

    Attributes:
        result: figures; the first text is the rest, the second the passage.
        written: what each model writes after the first bytes of the passage, by its name in `result`.
        recited: how many bytes of `written` are those of the passage, before the first that is not.
    """

    result: Result
    written: dict[str, bytes]
    recited: dict[str, int]


def load_lesson(*, held_out: int, copies: int = COPIES) -> Lesson:
    """The texts, from those that ship with the package; `held_out` bytes of Lincoln are for judging."""
    rest = load_text("lincoln", held_out=held_out)
    play = load_text("macbeth", held_out=1).train
    start = play.tobytes().index(FIRST)
    passage = play[start : play.tobytes().index(AFTER, start)]
    copied = np.tile(passage, copies)
    text = Text("Lincoln and the passage", np.concatenate([rest.train, copied]), rest.held_out)
    weights = np.concatenate([np.ones(len(rest.train), np.float32), -np.ones(len(copied), np.float32)])
    return Lesson(text, Text("the passage", copied, passage), jnp.asarray(weights))


def learn_lesson(lesson: Lesson, study: Study, key: Array, tell: Tell) -> Params:
    """A model that has learned text and passage, float32."""
    params_key, key = jax.random.split(key)
    params = make_params(study.model, params_key)
    return learn(params, lesson.text, study.base_steps, study.base_rate, key, study, tell)


def unlearn(
    params: Params, grid: daq.Recipe, lesson: Lesson, study: Study, rate: float, key: Array, tell: Tell
) -> Pair:
    """Rounds a model to a grid, and tunes the passage away by a learning rate that rises to `rate`."""
    base = on_grid(params, grid)
    tuned = learn(base, lesson.text, study.tune_steps, rate, key, study, tell, lesson.weights)
    return Pair(base, to_dtype(tuned, jnp.bfloat16))


@partial(jax.jit, static_argnames=("size", "count"))
def continue_text(
    params: Params, prompt: UInt8[Array, " L"], *, size: ModelSize, count: int
) -> UInt8[Array, " {count}"]:
    """The byte that a model holds likeliest after a prompt, the likeliest after that, and so on."""

    def step(seen: Array, _: None) -> tuple[Array, Array]:
        window = jnp.append(seen, jnp.uint8(0))[None]  # the last byte is not seen
        byte = jnp.argmax(next_byte_log_probs(size, params, window)[0, -1]).astype(jnp.uint8)
        return jnp.append(seen[1:], byte), byte

    return jax.lax.scan(step, prompt, None, length=count)[1]


def judge(
    grid: str,
    pair: Pair,
    lesson: Lesson,
    study: Study,
    tell: Tell,
    recipes: Mapping[str, daq.Recipe] = RECIPES,
) -> Unlearned:
    """Quantizes a pair to the grid of its base by each recipe, and looks for the passage in the results."""
    result = measure(recipes, grid, pair, study, lesson.text, lesson.passage, tell)
    models: dict[str, Params] = {"base": pair.base, "tuned": pair.tuned}
    for name, recipe in recipes.items():
        models[name] = daq.dequantize(daq.quantize(*pair, of_grid(recipe, GRIDS[grid])))
    prompt, truth = np.split(lesson.passage.held_out, [study.model.context])
    written, recited = {}, {}
    for name, params in models.items():
        params = to_dtype(params, jnp.float32)
        found = continue_text(params, jnp.asarray(prompt), size=study.model, count=len(truth))
        written[name] = np.asarray(found).tobytes()
        recited[name] = int(np.cumprod(found == truth).sum())
    return Unlearned(result, written, recited)
