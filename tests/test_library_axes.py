"""The gradients of a layer whose axes are known tell them, and refuse every other view."""

import json

import numpy as np
import pytest

from benchmarks.jax_libraries import study
from benchmarks.jax_libraries.axes import contracted, verdict

TOKENS = 2


def gradients(equation):
    """Of three losses in a weight; `equation` makes them from inputs and what arrives at the outputs."""
    rng = np.random.default_rng(0)
    inputs, outputs = equation.partition("->")[0].split(",")
    sizes = {"t": TOKENS, "d": 24, "h": 6, "k": 8}
    x = rng.normal(size=[sizes[a] for a in inputs])
    return [np.einsum(equation, x, rng.normal(size=[sizes[a] for a in outputs])) for _ in range(3)]


@pytest.mark.parametrize(
    ("equation", "view", "wrong"),
    [
        ("td,thk->dhk", ((0,), (1, 2)), ((1,), (2,))),
        ("td,thk->hdk", ((1,), (0, 2)), ((0, 2), (1,))),
        ("thk,td->hkd", ((0, 1), (2,)), ((2,), (0, 1))),
    ],
)
def test_gradients_tell_the_axes_of_a_layer(equation, view, wrong):
    found = gradients(equation)
    assert contracted(found, TOKENS) == [view]
    assert verdict(found, view, TOKENS) == "right"
    assert verdict(found, wrong, TOKENS) == "wrong"


def test_a_view_of_each_head_is_finer_and_a_leaf_without_gradient_tells_nothing():
    found = gradients("td,thk->hdk")
    assert verdict(found, ((1,), (2,)), TOKENS) == "finer"
    assert verdict([0 * g for g in found], ((1,), (2,)), TOKENS) == "not told"


def test_a_library_is_measured_again_beside_the_rows_of_others(tmp_path, monkeypatch):
    said = iter(["first", "second", "third"])
    monkeypatch.setattr(
        study, "rows_of", lambda name, _: [{"library": name, "model": "m", "error": next(said)}]
    )
    study.main(only=("keras", "equinox"), out=tmp_path)
    study.main(only=("keras",), out=tmp_path)
    rows = json.loads((tmp_path / "jax_libraries.json").read_text())["rows"]
    assert [(row["name"], row["error"]) for row in rows] == [("equinox", "second"), ("keras", "third")]
