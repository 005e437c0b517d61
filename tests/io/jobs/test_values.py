"""What a recipe is, by content: two that differ never count as one, and one is the same in each process."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.jobs.values import UNKNOWN, describe, differences

FACTOR = 2.0


def with_closure(factor):
    return lambda d, q: factor * daq.neg_mse(d, q)


def scaled(factor, d, q):
    return factor * daq.neg_mse(d, q)


def with_default(factor):
    def metric(d, q, factor=factor):
        return factor * daq.neg_mse(d, q)

    return metric


def with_global(factor):
    space = {"daq": daq, "FACTOR": factor}
    exec("def metric(d, q):\n    return FACTOR * daq.neg_mse(d, q)", space)
    return space["metric"]


def with_helper(factor):
    space = {"daq": daq}
    exec(
        f"def helper():\n    return {factor}\ndef metric(d, q):\n    return helper() * daq.neg_mse(d, q)",
        space,
    )
    return space["metric"]


class Plain:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, d, q):
        return self.factor * daq.neg_mse(d, q)

    def method(self, d, q):
        return self(d, q)


@dataclasses.dataclass(frozen=True)
class Fields:
    factor: float
    calls: ClassVar[int] = 0

    def __call__(self, d, q):
        return self.factor * daq.neg_mse(d, q)


def local_class(factor):
    @dataclasses.dataclass(frozen=True)
    class Local:
        def __call__(self, d, q):
            return factor * daq.neg_mse(d, q)

    return Local()


KINDS = {
    "closure": with_closure,
    "default": with_default,
    "global": with_global,
    "helper": with_helper,
    "instance": Plain,
    "method": lambda factor: Plain(factor).method,
    "dataclass": Fields,
    "class made in a function": local_class,
    "partial": lambda factor: functools.partial(scaled, factor),
    "jit": lambda factor: jax.jit(with_closure(factor)),
    "array": lambda factor: Plain(jnp.full(3, factor)),
    "NumPy array": lambda factor: Plain(np.full(3, factor)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_differ_as_their_contents_do(kind):
    one, same, other = (json.dumps(describe(daq.Recipe(metric=KINDS[kind](x)))) for x in (2.0, 2.0, 3.0))
    assert one == same
    assert one != other


def test_code_counts_and_names_do_not():
    assert describe(lambda d, q: d) != describe(lambda d, q: q)
    assert describe(daq.neg_mse) != describe(daq.cosine)


def test_class_variables_that_are_state_do_not_count():
    before = describe(Fields(1.0))
    Fields.calls += 1
    assert describe(Fields(1.0)) == before


def test_what_has_no_content_is_never_the_same_and_says_so():
    recipes = [daq.Recipe(metric=Plain(np.random.default_rng(0))) for _ in range(2)]
    one, other = map(describe, recipes)
    assert one != other
    assert UNKNOWN in " ".join(differences(one, other))


def test_circles_end():
    def metric(d, q):
        return metric(q, d)

    loop = {}
    loop["self"] = loop
    assert json.dumps(describe([metric, loop]))


def test_descriptions_are_the_same_in_every_process():
    words = """
import json, daq_jax as daq
from daq_jax.io.jobs.values import describe
def metric(d, q):
    return daq.cosine(d, q) if "a" in {"a", "b", "c"} else d
print(json.dumps(describe([daq.recipes.default, daq.Recipe(metric=metric), {"x", "y", "z"}])))
"""
    found = {
        subprocess.check_output([sys.executable, "-c", words], env={"PYTHONHASHSEED": seed, **_environment()})
        for seed in ("1", "2")
    }
    assert len(found) == 1


def _environment() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}


def test_differences_are_named():
    before, now = {"a": {"b": 1, "c": "x" * 99}, "d": 1}, {"a": {"b": 2, "c": "y" * 99}, "d": 1}
    assert differences(before, now) == ["a.b was 1 and is 2", "a.c is another"]
