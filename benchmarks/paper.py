"""The comparison of arXiv:2603.22324: AbsMax, the searches by error, by sign and by cosine, and ours beside.

    python -m benchmarks paper

On the small model of `daq-jax demo`, rounded to FP8 in blocks as DeepSeek-V3 ships, and tuned on Macbeth.
Each search scales e4m3 codes by block and by output channel, over several ranges of ratios to the AbsMax
scale. The released program searches 0.8 to 1.5. *Style* is held-out text of the tuning, *general* that of
the base.

Most of the time goes into training the pair and into compiling a program for each search and shape. Two
methods are compiled at a time, and compiled programs are kept on disk for the next run.

Writes `paper.json` and `paper.md`.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

import daq_jax as daq
from benchmarks import common
from benchmarks.progress import telling
from daq_jax.demo.model import Decoder, ModelSize, Params, cut_windows, to_dtype
from daq_jax.demo.study import GRIDS, Pair, Study, Tell, make_pairs, relative_change
from daq_jax.demo.texts import load_text

TILINGS: Mapping[str, daq.Tiling] = {"block": daq.Block(128, 128), "channel": daq.Channel()}
METRICS = {"mse": daq.neg_mse, "sign": daq.SignRate(), "cosine": daq.cosine}
RANGES = ((0.5, 2.0), (0.8, 1.5), (0.9, 1.11))  # of the ratio to the AbsMax scale
PAPER = (0.8, 1.5)  # of the released program
POINTS = (5, 10)  # coarse and fine, as released
ON_GRID = "base's scale"
SMALL = Study(
    model=ModelSize(layers=1, width=32, heads=2, context=16),
    base_steps=100,
    tune_steps=50,
    tune_rate=1e-3,
    held_out=513,
)

AT_ONCE = 2  # methods; compiling one takes one core

Row = dict[str, Any]
Say = Callable[[str], None]


def recipes(ranges: Sequence[tuple[float, float]] = RANGES) -> dict[tuple[str, str], daq.Recipe]:
    """Every method by its name and its range of ratios."""
    found = {("AbsMax", "1"): daq.recipes.absmax}
    for name, metric in METRICS.items():
        for low, high in ranges:
            search = daq.CoarseToFine(low, high, *POINTS)
            found[name, f"{low:g} to {high:g}"] = daq.Recipe(metric=metric, search=search)
    return found | {("ours", ON_GRID): daq.recipes.default}


@functools.cache
def model(size: ModelSize) -> Any:
    """The demo's model as `daq.divergence` takes one; one function for each size."""

    def apply(params: Params, text: Array) -> Array:
        return Decoder(size).apply({"params": params}, text[:, :-1])

    return apply


def following(text: Array) -> Array:
    """The byte after each."""
    return text[:, 1:].astype(jnp.int32)


def behaviour(pair: Pair, params: Params, texts: Sequence[Array], size: ModelSize) -> Row:
    """Losses on both texts, and the divergence from the tuned model on the second, in nats a byte."""
    tuned, params = (to_dtype(x, jnp.float32) for x in (pair.tuned, params))
    general, style = (daq.divergence(model(size), tuned, params, [text], targets=following) for text in texts)
    return {"kl": style.kl, "style": style.quantized_loss, "general": general.quantized_loss}


def judge(
    pair: Pair, recipe: daq.Recipe, texts: Sequence[Array], size: ModelSize, base: Row, tuned: Row
) -> Row:
    """What a recipe keeps of a pair: figures of the change, losses and divergence."""
    q = daq.quantize(*pair, recipe)
    figures = daq.compare(*pair, q).total.to_dict()
    row = behaviour(pair, daq.dequantize(q), texts, size)
    kept = (base["style"] - row["style"]) / (base["style"] - tuned["style"])
    change = {name: figures[name] for name in ("sign_rate", "cosine", "projection", "norm_ratio", "mse")}
    return row | {"style_kept": kept} | change


def measure(
    study: Study, seed: int, chosen: Mapping[tuple[str, str], daq.Recipe], tell: Tell, say: Say
) -> dict[str, Any]:
    """The pair, and a row for each granularity and method."""
    start, used = time.perf_counter(), time.process_time()
    texts = [load_text(name, held_out=study.held_out) for name in ("lincoln", "macbeth")]
    windows = [cut_windows(jnp.asarray(text.held_out), study.model.context) for text in texts]
    grid = {"FP8": GRIDS["FP8"]}
    pair = make_pairs(study, grid, *texts, jax.random.key(seed), tell)["FP8"]
    tell("judge base and tuned", 0, 1)
    base, tuned = (behaviour(pair, params, windows, study.model) for params in pair)
    change = relative_change(pair, daq.quantize(*pair, GRIDS["FP8"]))
    tell("judge base and tuned", 1, 1)
    keys = [(granularity, *key) for granularity in TILINGS for key in chosen]

    def work(key: tuple[str, str, str]) -> Row:
        granularity, method, ratios = key
        recipe = chosen[method, ratios].replace(tiling=TILINGS[granularity])
        row = judge(pair, recipe, windows, study.model, base, tuned)
        say(f"{granularity}, {method} {ratios}: projection {row['projection']:.2f}, KL {row['kl']:.1e}")
        return {"granularity": granularity, "method": method, "ratios": ratios} | row

    task, rows = "search, compare and judge", []
    tell(task, 0, len(keys))
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as workers:
        slow_first = sorted(keys, key=lambda key: key[1] != "ours")
        for row in workers.map(work, slow_first):
            rows.append(row)
            tell(task, len(rows), len(keys))
    rows.sort(key=lambda row: keys.index((row["granularity"], row["method"], row["ratios"])))
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    about = {"seed": seed, "change": change, "base": base, "tuned": tuned}
    return common.environment() | about | seconds | {"rows": rows}


HEADS = (
    *("scales", "method", "ratios", "sign rate", "cosine", "projection", "error"),
    *("style kept", "KL, style", "general"),
)
LEGEND = """\
Sign rate, cosine, projection and error (squared) are of the change of the weights. *Style kept*: share of
the gain of tuning, on its text. *KL, style*: nats a byte from the tuned model. *General*: loss on text of
the base, above the tuned model's. Ratios are to the AbsMax scale; 0.8 to 1.5 is the range of the released
program.
"""


def cells(row: Row, tuned: Row) -> list[str]:
    """A row of the table."""
    found = [
        *(row[key] for key in ("granularity", "method", "ratios")),
        f"{row['sign_rate']:.1%}",
        f"{row['cosine']:.3f}",
        f"{row['projection']:.2f}",
        f"{row['mse']:.1e}",
        f"{row['style_kept']:.0%}",
        f"{row['kl']:.1e}",
        f"{row['general'] - tuned['general']:+.4f}",
    ]
    return [f"**{cell}**" for cell in found] if row["method"] == "ours" else found


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    base, tuned = report["base"], report["tuned"]
    about = (
        "A small byte-level model, rounded to FP8 in blocks of 128 x 128. Tuning moved its weights "
        f"by {report['change']:.2%}. On text of the tuning the loss of the base is {base['style']:.4f} "
        f"nats a byte and that of the tuned model {tuned['style']:.4f}. The base has a KL of "
        f"{base['kl']:.1e} from the tuned model."
    )
    machine = f"{report['cpu']}, {report['cpu_cores']} cores, load average {report['load_average']:.0f}"
    took = f"{report['seconds']:.0f} s, in which the processor worked {report['cpu_seconds']:.0f} s"
    where = f"{common.provenance(report)}; {machine}; {took}."
    table = common.table(HEADS, [cells(row, tuned) for row in report["rows"]])
    return "\n\n".join(["# The comparison of arXiv:2603.22324", where, about, table, LEGEND])


def main(*, seed: int = 0, out: Path | None = None, quick: bool = False) -> None:
    """Trains the pair, quantizes it by each method, prints the table and writes it.

    Args:
        seed: of the first weights and of the batches.
        out: folder for the results; None for `benchmarks/results`.
        quick: a tiny model and one range, to see that it runs.
    """
    daq.enable_compilation_cache()
    study, chosen = (SMALL, recipes([PAPER])) if quick else (Study(), recipes())
    with telling(Console(stderr=True)) as (tell, say):
        report = measure(study, seed, chosen, tell, say)
    text = markdown(report)
    common.write(common.results(out, quick) / "paper.json", report, text)
    print(f"\n{text}")


COMMANDS = {"paper": main}
