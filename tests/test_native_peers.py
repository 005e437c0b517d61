"""The rules of other tools in the benchmark of peers: nearest codes under scales, as the tools give them."""

import numpy as np
import pytest

from benchmarks.native_peers.folders import BASES
from benchmarks.native_peers.installed import compressed_tensors
from benchmarks.native_peers.rules import RULES
from tests.cases import rng_for

NAME = "a.weight"
WEIGHT = (0.02 * rng_for("peers").normal(size=(64, 128))).astype(np.float32)
OWN = {form.split()[0]: base for form, base in BASES.items()}


def decoded(rule: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    return (
        OWN[rule.partition(":")[0]]
        .native(NAME, *WEIGHT.shape)
        .decode({NAME + end: x for end, x in tensors.items()})
    )


def made(rule: str) -> dict[str, np.ndarray]:
    base = OWN[rule.partition(":")[0]].made_by(WEIGHT, {})
    return RULES[rule](WEIGHT, base)


@pytest.mark.parametrize("rule", RULES)
def test_no_other_code_is_nearer_under_the_scales_of_a_rule(rule):
    tensors = made(rule)
    error = np.abs(decoded(rule, tensors) - WEIGHT)
    lowest = 1 if rule in ("int4: absmax / 7", "int4: base's scales") else 0  # of integers, -7
    for code in range(lowest, 16):
        same = np.full_like(tensors["_packed"].view(np.uint8), 17 * code).view(tensors["_packed"].dtype)
        other = np.abs(decoded(rule, tensors | {"_packed": same}) - WEIGHT)
        assert (error <= other + 1e-7).all()


def test_only_the_rule_of_the_next_power_above_clips_nothing():
    largest = np.abs(WEIGHT.reshape(64, 4, 32)).max(-1)
    scale = {
        rule: np.exp2(made(rule)["_scale"].astype(np.float32) - 127) for rule in RULES if "mxfp4" in rule
    }
    assert (6 * scale["mxfp4: ceil"] >= largest).all()
    assert (3 * scale["mxfp4: ceil"] < largest).all()
    for rule, most in (("mxfp4: floor", 8), ("mxfp4: up from 1.75", 7)):
        ratio = largest / scale[rule]
        assert 6 < ratio.max() < most
        assert ratio.min() >= 4 * most / 8


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("mxfp4", "mxfp4: up from 1.75"), ("nvfp4", "nvfp4: absmax / 6"), ("int4", "int4: absmax / 7.5")],
)
def test_the_rules_of_compressed_tensors_are_what_its_functions_give(kind, rule):
    theirs, ours = compressed_tensors(kind)(WEIGHT, {}), made(rule)
    assert theirs.keys() == ours.keys()
    for end, x in ours.items():
        np.testing.assert_array_equal(theirs[end].view(np.uint8), x.view(np.uint8), err_msg=end)
