"""Does the benchmark of servers see every way in which a folder may be loaded wrong?"""

import numpy as np
import pytest

from benchmarks.servers.places import Place, judge, place_of
from benchmarks.servers.study import MOST_DIVERGENCE, MOST_ERROR, cases_of, reason, verdict

LAYER, EXPERTS = "model.layers.0.self_attn", "model.layers.1.mlp.experts"
RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


STORED = {
    **{
        f"{LAYER}.{name}.weight": random(rows, 8)
        for name, rows in (("v_proj", 2), ("q_proj", 4), ("k_proj", 2))
    },
    f"{LAYER}.o_proj.weight": random(8, 4),
    **{f"{EXPERTS}.{e}.{n}.weight": random(3, 8) for n in ("up_proj", "gate_proj") for e in (10, 2)},
}


def loaded() -> dict[str, np.ndarray]:
    """What a loader makes of them, written out."""
    qkv = [STORED[f"{LAYER}.{x}_proj.weight"] for x in "qkv"]
    experts = [[STORED[f"{EXPERTS}.{e}.{n}_proj.weight"] for n in ("gate", "up")] for e in (2, 10)]
    return {
        f"{LAYER}.qkv_proj.weight": np.concatenate(qkv),
        f"{LAYER}.o_proj.weight": STORED[f"{LAYER}.o_proj.weight"],
        f"{LAYER}.attn.k_scale": np.zeros((), np.int32),
        f"{EXPERTS}.w13_weight": np.stack([np.concatenate(each) for each in experts]),
    }


def test_names_say_parameter_expert_and_order():
    assert place_of("lm_head.weight") == Place("lm_head.weight")
    assert place_of("a.mlp.up_proj.weight_scale") == Place("a.mlp.gate_up_proj.weight_scale", 0, 1)
    assert place_of("a.experts.7.w2.weight") == Place("a.experts.w2_weight", 7)
    assert place_of("a.shared_experts.gate_proj.weight").parameter == "a.shared_experts.gate_up_proj.weight"


def test_fused_and_stacked_parameters_are_right_also_where_experts_lie_turned():
    found = loaded()
    assert judge(found, STORED) == {"lost": [], "unfilled": []}
    name = f"{EXPERTS}.w13_weight"
    assert judge(found | {name: found[name].swapaxes(1, 2)}, STORED) == {"lost": [], "unfilled": []}


@pytest.mark.parametrize("fault", ["a bit", "order", "experts", "missing", "more"])
def test_a_wrong_parameter_is_named(fault):
    found, qkv, experts = loaded(), f"{LAYER}.qkv_proj.weight", f"{EXPERTS}.w13_weight"
    if fault == "a bit":
        found[qkv][0, 0] ^= 1
    elif fault == "order":
        found[qkv] = np.roll(found[qkv], 2, axis=0)
    elif fault == "experts":
        found[experts] = found[experts][::-1]
    elif fault == "missing":
        del found[qkv]
    else:
        found["model.norm.weight"] = random(8)
    wrong = {"experts": [experts], "more": ["model.norm.weight"], "missing": []}.get(fault, [qkv])
    verdict = judge(found, STORED)
    assert verdict["unfilled"] == wrong
    parts = {"experts": EXPERTS, "more": "none"}.get(fault, f"{LAYER}.[qkv]")
    assert len(verdict["lost"]) == {"experts": 4, "more": 0}.get(fault, 3)
    assert all(name.startswith(parts.partition("[")[0]) for name in verdict["lost"])


RIGHT = {"tensors": 3, "lost": [], "unfilled": []}
SERVED = RIGHT | {"served": True, "divergence": MOST_DIVERGENCE / 2, "layer_error": MOST_ERROR / 2}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (SERVED, "served"),
        (SERVED | {"divergence": 2 * MOST_DIVERGENCE}, "fault"),
        (SERVED | {"divergence": float("nan")}, "fault"),
        (SERVED | {"layer_error": 2 * MOST_ERROR}, "fault"),
        (SERVED | {"lost": ["a.weight"]}, "fault"),
        (RIGHT | {"served": False, "refused": "no kernel", "without_kernels": ""}, "loaded"),
        (RIGHT | {"served": False, "refused": "no kernel", "unfilled": ["a.weight"]}, "fault"),
        ({"served": False, "refused": "no kernel", "without_kernels": "no loader"}, "refused"),
        ({"served": False, "died": "no answer"}, "fault"),
        ({"command_refused": "not a multiple"}, "refused by the command"),
    ],
)
def test_a_row_is_served_or_loaded_only_where_all_of_it_is_right(row, wanted):
    assert verdict(row) == wanted
    assert bool(reason(row)) == (wanted != "served")


def test_cases_are_chosen_by_the_names_of_the_table():
    assert [c.base for c in cases_of("llama", ("as-base, nvfp4", "nvfp4"))] == ["", "nvfp4"]
    assert "int4-group, --tp 2" in [c.column for c in cases_of("llama")]
    assert {c.base for c in cases_of("gpt-oss")} == {"", "gpt-oss"}
