"""Which 4-bit codes keep a language model's perplexity? Trains one, quantizes it each way, and judges.

    python -m benchmarks density --size gpu
    python -m benchmarks density --size cpu
    python -m benchmarks density --size gpu --draws 2 --seeds 0 1 2

A byte-level decoder, that of the behaviour study, learns messages of presidents to Congress. All matrices of
its layers are quantized; Gram matrices are taken on the text it learned. Judged on held-out messages:
perplexity, less that of the float model, and the KL divergence from the float model's predictions. The loss
under an error of the weights has a first-order term, which changes sign with the error and is as large as
the rest. The mean of the increases under the error and under its negative is therefore given too.
`baselines.py` holds round to nearest, AWQ and GPTQ.

Also measures the loss of stage 2 on each layer against the released program's (`released.py`).
With `--draws`, the method and the best peer only, each calibrated on so many samples of the text, for models
trained from several `--seeds`. Writes a JSON file and a Markdown table.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import daq_jax as daq
from benchmarks import common
from benchmarks.behaviour import training
from benchmarks.behaviour.corpora import Text, demo_corpora, load_corpora, windows
from benchmarks.behaviour.training import Size, learn
from benchmarks.density import released
from benchmarks.density.baselines import BASELINES, Grid, Inputs, baseline
from benchmarks.density.report import write_report
from daq_jax.analysis.predictions import kl_divergences
from daq_jax.demo.model import (
    Decoder,
    ModelSize,
    Params,
    losses,
    make_params,
    next_byte_log_probs,
)
from daq_jax.density.centring import align
from daq_jax.density.groups import AffineMap, Groups
from daq_jax.formats import Format

TOKENS = (1, 2, 16, 64)  # times 512, of calibration text
STANDARD = 16  # of them, wherever that is not what varies
JUDGED = {"gpu": 3072, "cpu": 512, "tiny": 16}  # held-out windows of the model's context
SIZES = training.SIZES | {"cpu": dataclasses.replace(training.SIZES["cpu"], base_steps=1000, tune_steps=100)}


def ours(**choices: Any) -> daq.DensityRecipe:
    """The method with some of its choices made otherwise."""
    return daq.DensityRecipe(**choices)


# Rows of the table; the format and the group size are filled in.
STAGES: dict[str, daq.DensityRecipe] = {
    "no stage": ours(centre=None, adjust=None, sweeps=0),
    "stage 1": ours(adjust=None, sweeps=0),
    "stage 2": ours(centre=None, sweeps=0),
    "stages 1, 2": ours(sweeps=0),
    "stages 1, 2, rounding": ours(),
    "rounding, row": ours(loss="row", centre=None, adjust=None),
    "stage 1, rounding, row": ours(loss="row", adjust=None),
    "stage 2, rounding, row": ours(loss="row", centre=None),
    "stages 1, 2, rounding, row": ours(loss="row"),
    "density_paper": daq.recipes.density_paper,
    "density_released": daq.recipes.density_released,
}
BEST = "stages 1, 2, rounding, row"
DRAWN = (daq.nf4, daq.fp4_e2m1, daq.fp4_bnb)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and what it is judged on."""

    size: ModelSize
    params: Params
    learned: np.ndarray  # [bytes] uint8
    held_out: Array  # [windows, context + 1] uint8

    @property
    def flat(self) -> dict[str, Array]:
        return flatten_dict(self.params, sep="/")


def train_model(size: Size, text: Text, judged: int, weights: Path | None, seed: int) -> Trained:
    """Trains the model, or takes the weights of an earlier run from a file."""
    if weights and weights.exists():
        params = unflatten_dict({k: jnp.asarray(v) for k, v in np.load(weights).items()}, sep="|")
    else:
        key = jax.random.key(seed)
        fresh = make_params(size.model, key)
        params = learn(fresh, text, size.base_steps, size.base_rate, key, size)
        if weights:
            np.savez(weights, **{k: np.asarray(v) for k, v in flatten_dict(params, sep="|").items()})
    held_out = jnp.asarray(windows(text.held_out, judged, size.model.context + 1))
    return Trained(size.model, params, text.train, held_out)


@partial(jax.jit, static_argnames="size")
def measure(reference: Params, params: Params, text: Array, *, size: ModelSize) -> tuple[Array, Array]:
    """Mean loss of `params` on a text, and mean KL divergence from the predictions of `reference`."""

    def one(window: Array) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):
            log_p, log_q = (next_byte_log_probs(size, p, window[None]) for p in (reference, params))
        return jnp.mean(losses(log_q, window[None])), jnp.mean(kl_divergences(log_p, log_q))

    return tuple(jnp.mean(x) for x in jax.lax.map(one, text, batch_size=64))


class Study:
    """A trained model, its Gram matrices by amount of calibration, and what is to be done with each row."""

    def __init__(
        self, trained: Trained, amounts: Iterable[int], keep: Callable[[dict[str, Any]], None]
    ) -> None:
        self.trained, self.keep, self.begun = trained, keep, time.perf_counter()
        self.grams = {tokens: self._calibrate(tokens) for tokens in amounts}
        loss, _ = measure(trained.params, trained.params, trained.held_out, size=trained.size)
        self.perplexity = math.exp(loss)

    def _calibrate(self, tokens: int, draw: int = 0) -> daq.Grams:
        context = self.trained.size.context
        text = windows(self.trained.learned[1009 * draw :], tokens * 512 // context, context)
        batches = [jnp.asarray(part) for part in np.array_split(text, max(1, len(text) // 64))]
        model, params = Decoder(self.trained.size), self.trained.params
        return daq.calibrate(model, params, batches, joint=True, progress=False)

    def add(self, name: str, kind: str, fmt: Format, group: int | None, tokens: int, leaves: Any) -> None:
        """Judges some leaves in place of the float ones, and keeps the row."""
        trained, gram = self.trained, self.grams[max(self.grams)].products
        errors = {p: leaves[p] - trained.flat[p] for p in leaves}
        mirrored = {p: trained.flat[p] - e for p, e in errors.items()}
        (loss, kl), (other, _) = (
            measure(
                trained.params,
                unflatten_dict(trained.flat | changed, sep="/"),
                trained.held_out,
                size=trained.size,
            )
            for changed in (leaves, mirrored)
        )
        row = {
            "method": name,
            "kind": kind,
            "format": fmt.name,
            "group": group,
            "tokens": tokens,
            "increase": math.exp(loss) - self.perplexity,
            "even": (math.exp(loss) + math.exp(other)) / 2 - self.perplexity,
            "kl": float(kl),
            "output_loss": float(sum(jnp.sum(e * (gram[p] @ e)) for p, e in errors.items())),
        }
        self.keep(row)
        seconds = time.perf_counter() - self.begun
        words = f"{name}, {fmt.name}, group {group}, {tokens} x 512"
        figures = f"{row['increase']:+.5f}, even part {row['even']:+.5f}, KL {row['kl']:.2e}"
        print(f"{seconds:5.0f} s: {words}: {figures}", flush=True)

    def add_baselines(
        self, fmt: Format, group: int | None, tokens: int, names: Iterable[str] = BASELINES
    ) -> None:
        for name in names:
            for symmetric in (True, False):
                grid, grams = Grid(fmt, group, symmetric), self.grams[tokens].products
                leaves = {
                    p: baseline(self.trained.flat[p], Inputs.of(g), name=name, grid=grid)
                    for p, g in grams.items()
                }
                self.add(
                    f"{name}, {'symmetric' if symmetric else 'with zero'}", "peer", fmt, group, tokens, leaves
                )

    def add_density(self, fmt: Format, group: int | None, tokens: int, names: Iterable[str]) -> None:
        for name in names:
            recipe = dataclasses.replace(STAGES[name], format=fmt, group=group)
            q = flatten_dict(daq.quantize_density(self.trained.params, self.grams[tokens], recipe), sep="/")
            leaves = {p: x.dequantize() for p, x in q.items() if isinstance(x, daq.QTensor)}
            self.add(name, "density", fmt, group, tokens, leaves)

    def add_draws(self, draws: int) -> None:
        """The method and the best peer, calibrated on several samples of one size."""
        for draw in range(draws):
            self.grams[STANDARD] = self._calibrate(STANDARD, draw)
            for fmt in DRAWN:
                self.add_baselines(fmt, 128, STANDARD, ["gptq"])
                self.add_density(fmt, 128, STANDARD, [BEST])

    def add_all(self, name: str) -> None:
        """Every row of the tables, the main ones first; on a CPU, and in a quick look, some are left out."""
        gpu = name == "gpu"
        self.add_baselines(daq.nf4, 128, STANDARD)
        self.add_density(daq.nf4, 128, STANDARD, [BEST])
        if name == "tiny":
            return
        for tokens in (2, 64, 1):
            self.add_density(daq.nf4, 128, tokens, [BEST])
            self.add_baselines(daq.nf4, 128, tokens, ["gptq"])
        self.add_baselines(daq.fp4_e2m1, 128, STANDARD)
        self.add_density(daq.fp4_e2m1, 128, STANDARD, [BEST])
        for group in (None, 64):
            self.add_density(daq.nf4, group, STANDARD, [BEST])
            self.add_baselines(daq.nf4, group, STANDARD)
        left_out = (BEST,) if gpu else (BEST, "no stage", "density_released", "density_paper")
        self.add_density(daq.nf4, 128, STANDARD, [s for s in STAGES if s not in left_out])
        for fmt in (daq.fp4_bnb, daq.int4) if gpu else ():
            self.add_baselines(fmt, 128, STANDARD)
            self.add_density(fmt, 128, STANDARD, [BEST])


def stage_two(study: Study, outputs: int) -> list[dict[str, Any]]:
    """Stage 2 alone against the released program's, from the same start, on some outputs of each layer."""
    rows = []
    for path, gram in study.grams[STANDARD].products.items():
        weight = np.asarray(study.trained.flat[path])[:, :outputs]
        n = min(128, len(weight))
        count = len(weight) // n
        cut = weight.reshape(count, n, -1)
        grams = np.stack([np.asarray(gram)[i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(count)])
        levels = np.asarray(daq.fp4_bnb.levels)
        begin = released.start(np.float64(cut), levels)
        scale, zero, evaluations = released.adjust(np.float64(cut), np.float64(grams), levels, *begin)
        real = jnp.ones((count, n, 1), bool)
        groups = Groups(jnp.asarray(cut), real, jnp.asarray(grams), daq.fp4_bnb, True)
        first = AffineMap(*align(groups.weight, real, daq.fp4_bnb, "quantile", 1.0))
        adjust = daq.LeastSquares()
        line = jax.jit(lambda g, first: adjust(g, g.loss, first))(groups, first)  # noqa: B023

        def loss(scale: Any, zero: Any, cut: Any = cut, grams: Any = grams, levels: Any = levels) -> float:
            s, z = (np.float64(x)[:, None] for x in (scale, zero))
            error = cut - (released.nearest(cut / s + z, levels) - z) * s
            return float(np.sum(error * (grams @ error)))

        rows.append(
            {
                "layer": path,
                "released": loss(scale, zero),
                "ours": loss(*line),
                "released_evaluations": evaluations,
                "our_evaluations": adjust.evaluations,
            }
        )
        print(rows[-1], flush=True)
    return rows


def run(study: Study, size: str, draws: int | None, result: dict[str, Any]) -> None:
    """The rows of one model."""
    if draws:
        return study.add_draws(draws)
    result["layers"] = stage_two(study, {"gpu": 4, "cpu": 8, "tiny": 4}[size])
    return study.add_all(size)


def main(
    *,
    size: Literal[*SIZES] = "cpu",
    draws: int | None = None,
    seeds: tuple[int, ...] = (0,),
    report: Path | None = None,
    wheels: Path = common.CACHE,
    weights: Path | None = None,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Runs the study, or reports on the file of an earlier run.

    Args:
        size: of the model and of its training.
        draws: for a few methods only, over so many samples of calibration text; at least 2.
        seeds: of models; several with `--draws` only.
        report: only report on this JSON file.
        wheels: folder that holds the corpora, or gets them.
        weights: .npz file to keep the trained weights of one model in, or to take them from.
        out: folder for the results; None for `benchmarks/results/density`.
        quick: the smallest model on a text of the demo, to see that it runs.
    """
    if report:
        return write_report(report, BEST)
    if draws is not None and draws < 2:
        raise SystemExit(f"--draws must be 2 or more; got {draws}")
    if len(seeds) > 1 and (weights or not draws):
        raise SystemExit("several --seeds need --draws, and no --weights, which are those of one model")
    size = "tiny" if quick else size
    begun, model = time.perf_counter(), SIZES[size]
    text = (demo_corpora() if quick else load_corpora(wheels.expanduser()))[0]
    path = common.results(out, quick, "density") / f"{size}{'_draws' if draws else ''}.json"
    result = common.environment() | {"size": size, "model": dataclasses.asdict(model.model)}
    result |= {"perplexities": {}, "rows": []}

    def keep(row: dict[str, Any], seed: int) -> None:
        """Rewrites the file after each row, so that a run cut short has its rows."""
        result["rows"].append({"seed": seed, **row})
        result["seconds"] = time.perf_counter() - begun
        common.write(path, result)

    amounts = (STANDARD,) if draws else (1, STANDARD) if size == "tiny" else TOKENS
    for seed in seeds:
        trained = train_model(model, text, JUDGED[size], weights, seed)
        study = Study(trained, amounts, partial(keep, seed=seed))
        result["perplexities"][seed] = study.perplexity
        words = f"seed {seed} trained; perplexity {study.perplexity:.4f} a byte"
        print(f"{time.perf_counter() - begun:.0f} s: {words}", flush=True)
        run(study, size, draws, result)
    return write_report(path, BEST)


COMMANDS = {"density": main}
