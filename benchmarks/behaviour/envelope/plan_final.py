"""Writes the plan of the last run: `python -m benchmarks.behaviour.envelope.plan_final > plan.json`."""

import json

N = [
    "new",
    "new_adapt.3",
    "new_adapt0",
    "new_d3",
    "new_d3_adapt0",
    "new_reach5",
    "new_steps",
    "new_nofb",
    "dither_feedback",
]
RECIPES = {
    "b": ["absmax", "base_scale", "stochastic", "gains"],
    "n": N,
    "few": ["new", "new_adapt.3", "new_d3_adapt0", "dither_feedback"],
    "f": ["absmax", "new", "new_d3"],
    "d": ["default"],
    "r": ["rule floor", "rule 1.75"],
    "z": ["new"],
}
four = [8e-6, 1.5e-4, 2e-8, 5e-7, 2e-6, 3e-5]
P = [[g, r, ["b", "n"]] for r in (8e-6, 5e-7, 1.5e-4) for g in ("mxfp4", "fp8-block")]
P += [[g, r, ["b", "n"]] for r in (8e-6, 1.5e-4) for g in ("int4", "nvfp4")]
P += [["mxfp4", 2e-8, ["b", "n"]], ["fp8-block", 2e-8, ["b", "n"]]]
P += [[g, r, ["b", "few"]] for g in ("mxfp4", "fp8-block", "int4", "nvfp4") for r in (2e-6, 3e-5)]
P += [
    [g, "zero", ["z"]]
    for g in ("mxfp4", "fp8-block", "int4", "nvfp4", "fp8-ue8m0", "fp8-channel", "int8-channel")
]
P += [["bf16", r, ["f"], g] for r in (8e-6, 1.5e-4) for g in ("fp8-block", "mxfp4", "int4", "nvfp4")]
P += [
    [g, n, ["b", "z"]] for g in ("mxfp4", "fp8-block", "int4", "nvfp4") for n in ("noise0.01", "noise0.001")
]
P += [
    [g, r, ["b", "few"]] for r in (8e-6, 1.5e-4, 2e-8) for g in ("fp8-ue8m0", "fp8-channel", "int8-channel")
]
P += [
    ["int4", 2e-8, ["b", "few"]],
    ["nvfp4", 2e-8, ["b", "few"]],
    ["int4", 1.5e-4, ["d"]],
    ["int8-channel", 8e-6, ["d"]],
]
P += [[g, "noise0.01", ["b", "z"]] for g in ("fp8-ue8m0", "fp8-channel", "int8-channel")]
P += [["mxfp4", 8e-6, ["r"]]]
print(json.dumps({"seeds": [0], "judged": 256, "recipes": RECIPES, "pairs": P}))
