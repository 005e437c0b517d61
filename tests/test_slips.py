"""The commonest slips of a caller get a sentence that names the right form, never our insides."""

import functools
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

import daq_jax as daq

WEIGHTS = {"k": jnp.ones((128, 128))}


def named_like(package: str) -> object:
    """A leaf whose type another library defines."""
    return type("Tensor", (), {"__module__": f"{package}.core", "dtype": f"{package}.float32"})()


def merged(scale) -> None:
    pair = {"w_lora_a": jnp.ones((4, 2)), "w_lora_b": jnp.ones((2, 6))}
    daq.merge({"w": jnp.ones((4, 6))}, pair, scale=scale)


SLIPS = {
    "a recipe by name": (lambda: daq.quantize(WEIGHTS, WEIGHTS, "paper-sign"), r"daq\.recipes\.paper_sign"),
    "a dict of parts": (
        lambda: daq.quantize(WEIGHTS, WEIGHTS, {"format": 1}),
        r"daq\.Recipe\(format=\.\.\.\)",
    ),
    "a format": (lambda: daq.quantize(WEIGHTS, WEIGHTS, daq.int8), r"daq\.Recipe\(format=daq\.int8\)"),
    "a format without a name": (lambda: daq.Recipe(daq.int8), r"parts go by name"),
    "no such part": (lambda: daq.Recipe().replace(tile=daq.Channel()), r"its parts are format, tiling"),
    "a recipe of a rule": (lambda: daq.use("k", "absmax"), r"recipe: got 'absmax'"),
    "a plan of a recipe by name": (lambda: daq.plan(WEIGHTS, recipe="absmax"), r"daq\.recipes\.absmax"),
    "rules in a string": (lambda: daq.quantize(WEIGHTS, WEIGHTS, rules="k"), r"rules=\[daq\.keep\('k'\)"),
    "one rule": (lambda: daq.quantize(WEIGHTS, WEIGHTS, rules=daq.keep("k")), r"rules=\[daq\.keep\('k'\)"),
    "patterns for rules": (lambda: daq.quantize(WEIGHTS, WEIGHTS, rules=["k"]), r"'k' is no rule"),
    "tensors of torch": (lambda: daq.quantize(*[{"k": named_like("torch")}] * 2), r"'k' is a torch Tensor"),
    "a model of keras": (lambda: daq.quantize(*[named_like("keras")] * 2), r"v\.path: v\.value"),
    "a dtype": (lambda: daq.dequantize(daq.quantize(WEIGHTS, WEIGHTS), "bf16"), r"bfloat16"),
    "a scale in a string": (lambda: merged("2"), r"scale is '2'; needed finite real numbers, alpha / rank"),
    "a scale that says yes": (lambda: merged(True), r"scale is True; needed finite real numbers"),
    "a list of scales": (lambda: merged([1.0, 2.0]), r"its scale is an array \(2,\); needed one number"),
    "a scale by pattern in a string": (lambda: merged({"w": "2"}), r"scale\['w'\] is '2'; needed finite"),
    "one number for all tiles": (
        lambda: daq.quantize(
            WEIGHTS, WEIGHTS, daq.Recipe(metric=lambda d, q: jnp.sum(d * q), search=daq.Grid(0.9, 1.1, 2))
        ),
        r"one score per tile",
    ),
}


@functools.cache
def answers() -> dict[str, str]:
    """What each slip is answered with, in a process where nothing checks types before the library does."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_answered_with_the_right_form(slip):
    assert re.search(SLIPS[slip][1], answers()[slip])


def test_a_metric_that_no_search_reads_is_warned_of():
    with pytest.warns(daq.UnreadMetricWarning, match=r"AbsMax\(\) does not read"):
        daq.quantize(WEIGHTS, WEIGHTS, daq.Recipe(metric=daq.SignRate()))


def answer(run) -> str:
    try:
        run()
    except daq.DaqError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    print(json.dumps({slip: answer(run) for slip, (run, _) in SLIPS.items()}))
