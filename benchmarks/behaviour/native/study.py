"""Which rounding keeps a tune of a base that ships on a grid? KL from the tuned model, seven grids and bf16.

    python -m benchmarks native_bases --size cpu
    python -m benchmarks native_bases --size gpu --seeds 0 --bases mxfp4 int4 --seconds 400
    python -m benchmarks native_bases --size gpu --report

The model and the texts are those of `python -m benchmarks behaviour`. The trained weights are rounded to a
grid, as a model that ships on it has them, changed, and brought back to the same grid by each method. A
change is a tune at one of seven learning rates (0.004 % to 6 % of the weights), a LoRA tune of rank 16, or
random noise of 0.1 % and 1 %; some tunes are judged once more with both weights stored in bfloat16. The
library gets the base as QTensors with their stored scales; where both weights are stored in bfloat16 it gets
two arrays and no scales. The base `bf16` is on no grid: it is brought to each of the seven, and what AbsMax
loses there is the floor of the format.

Results are one JSON file for each size and seed. A run reads the file of `--known`, measures what it does not
hold, and writes the file to `--out` after every pair: a study may take several runs. `--seconds` starts no
further pair after that time; `--again default` measures a method anew. `--report` writes one table for each
base and the list of cells that miss what the default is to show. On a GPU the programs of the library are
compiled by several threads while the base is trained.

On a machine that has this checkout, JAX, Flax, optax, tyro and the files of the corpora but no network, a
seed takes two runs of about 8 minutes on one H100. After each, copy the file from `--out` to
`benchmarks/results/behaviour/`, so that the next run goes on from it. `benchmarks/behaviour/native/README.md`
has the command lines.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

import daq_jax as daq
from benchmarks import common
from benchmarks.behaviour.corpora import Text, demo_corpora, load_corpora, windows
from benchmarks.behaviour.native.layouts import BF16, KINDS, LAYOUTS
from benchmarks.behaviour.native.methods import METHODS, OF_ZERO, ON_BF16, recipe_of
from benchmarks.behaviour.native.pairs import PLANS, SIZES, Base, Change, Plan, Tuner, make_base
from benchmarks.behaviour.native.report import write_report
from benchmarks.behaviour.study import judge, predict
from benchmarks.behaviour.training import Size
from daq_jax.demo.model import Params, make_params, to_dtype

KEY = ("base_kind", "what", "rate", "stored")
CELL = (*KEY, "layout", "method")
Row = dict[str, Any]


class Cell(NamedTuple):
    """One measurement of a pair."""

    layout: str
    method: str
    recipe: daq.Recipe


def cells(kind: str, change: Change, methods: Sequence[str]) -> list[Cell]:
    """What is measured of a pair."""
    names = [name for name in methods if kind != BF16 or name in ON_BF16]
    if change.what == "zero":
        names = [name for name in names if name in OF_ZERO and kind != BF16]
    layouts = LAYOUTS if kind == BF16 else (kind,)
    found = [(layout, name, recipe_of(name, LAYOUTS[layout])) for layout in layouts for name in names]
    return [Cell(layout, name, recipe) for layout, name, recipe in found if recipe is not None]


def given(base: Base, tuned: Params, change: Change) -> tuple[Params, Params]:
    """What the library gets of a pair."""
    if change.stored == "f32":
        return base.shipped, tuned
    return to_dtype(base.params, jnp.bfloat16), to_dtype(tuned, jnp.bfloat16)


class Judge:
    """Held-out text of both styles, and how far weights are from a reference on it."""

    def __init__(self, size: Size, texts: tuple[Text, Text]) -> None:
        self.size = size.model
        counts = (max(1, size.judged // 4), max(1, size.judged // 2))  # general text, tuning text
        length = size.model.context + 1
        self.texts = [jnp.asarray(windows(t.held_out, n, length)) for t, n in zip(texts, counts, strict=True)]

    def reference(self, params: Params) -> list[Array]:
        """Predictions on both texts."""
        return [predict(params, text, size=self.size) for text in self.texts]

    def __call__(self, params: Params, reference: list[Array]) -> dict[str, float]:
        """Loss and divergence from the reference, nats per byte."""
        found = (judge(params, t, p, size=self.size) for t, p in zip(self.texts, reference, strict=True))
        (general_loss, general_kl), (loss, kl) = jax.device_get(list(found))
        named = {"kl": kl, "general_kl": general_kl, "loss": loss, "general_loss": general_loss}
        return {name: float(x) for name, x in named.items()}


@jax.jit
def _sums(base: list[Array], tuned: list[Array], kept: list[Array]) -> Array:
    """`<d, d>`, `<d, q>`, `|q - d|^2`, `|base|^2` and the number of weights that moved, `[5]` float32."""
    total = jnp.zeros(5)
    for b, t, w in zip(base, tuned, kept, strict=True):
        d, q = t - b, w - b
        total += jnp.stack([jnp.sum(x) for x in (d * d, d * q, (q - d) ** 2, b * b, q != 0)])
    return total


def figures(paths: Iterable[str], base: Params, tuned: Params, kept: Params) -> dict[str, float | None]:
    """Of the weights: the change kept, the error, and the share of weights that moved."""
    trees = [flatten_dict(tree, sep="/") for tree in (base, tuned, kept)]
    leaves = [[jnp.asarray(tree[path], jnp.float32) for path in paths] for tree in trees]
    d2, dq, e2, w2, moved = map(float, _sums(*leaves))
    count = sum(x.size for x in leaves[0])
    return {
        "change": math.sqrt(d2 / w2),
        "projection": dq / d2 if d2 else None,
        "error": math.sqrt(e2 / w2),
        "moved": moved / count,
    }


def measure(
    tuner: Tuner, judge_: Judge, base: Base, tuned: Params, change: Change, todo: list[Cell]
) -> tuple:
    """What a pair is like, and one row for each cell."""
    pair = given(base, tuned, change)
    before, after = (to_dtype(x, jnp.float32) for x in (daq.dequantize(pair[0]), pair[1]))
    reference = judge_.reference(after)
    about = {name: judge_(params, reference) for name, params in (("base", before), ("tuned", after))}
    rows = []
    for layout, method, recipe in todo:
        quantized = daq.quantize(*pair, recipe)
        kept = daq.dequantize(quantized, jnp.float32)
        row = {"layout": layout, "method": method, **judge_(kept, reference)}
        row |= figures(tuner.paths, before, after, kept)
        if change.what == "zero":
            row["scales_changed"] = scales_changed(pair[0], quantized)
        rows.append(row)
    return about, rows


def scales_changed(base: Params, quantized: Params) -> int:
    """How many scales differ from those that the base was stored with."""
    leaves = zip(
        *(jax.tree.leaves(t, is_leaf=lambda x: isinstance(x, daq.QTensor)) for t in (base, quantized)),
        strict=True,
    )
    return sum(int(jnp.sum(b.scale != q.scale)) for b, q in leaves if isinstance(b, daq.QTensor))


class Results:
    """The JSON file of a size and a seed: what is known, and what comes to it."""

    def __init__(self, known: Path, out: Path, header: Mapping[str, Any], again: Sequence[str]) -> None:
        self.path, found = out, {}
        if known.exists():
            found = json.loads(known.read_text())
        self.content: dict[str, Any] = dict(header) | {"runs": [], "pairs": [], "rows": []} | found
        self.content["runs"].append(common.environment())
        self.again, self.run = frozenset(again), len(self.content["runs"]) - 1

    def missing(self, kind: str, change: Change, wanted: list[Cell]) -> list[Cell]:
        """The cells of a pair that no row holds."""
        key = self._key(kind, change)
        rows = (row for row in self.content["rows"] if key.items() <= row.items())
        there = {
            (r["layout"], r["method"]) for r in rows if r["method"] not in self.again or r["run"] == self.run
        }
        return [cell for cell in wanted if (cell.layout, cell.method) not in there]

    def add(self, kind: str, change: Change, about: Row, rows: list[Row], seconds: float) -> None:
        """Writes more rows, in place of any that a method had."""
        key = self._key(kind, change)
        new = [key | {"run": self.run} | row for row in rows]
        measured = {tuple(row[k] for k in CELL) for row in new}
        old = [row for row in self.content["rows"] if tuple(row[k] for k in CELL) not in measured]
        pairs = [pair for pair in self.content["pairs"] if not key.items() <= pair.items()]
        self.content |= {"pairs": [*pairs, key | about], "rows": [*old, *new]}
        self.content["runs"][-1]["seconds"] = seconds
        self.path.write_text(_lines(self.content))

    @staticmethod
    def _key(kind: str, change: Change) -> Row:
        return dict(zip(KEY, (kind, *change), strict=True))


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with one row a line: a study has a thousand."""
    parts = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(x) for x in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def compile_early(size: Size, todo: Mapping[str, Mapping[Change, list[Cell]]]) -> list[Future]:
    """Starts to compile every program of the library in threads, on weights of no meaning."""
    if jax.default_backend() == "cpu":
        return []
    params, pool, jobs = make_params(size.model, jax.random.key(0)), ThreadPoolExecutor(os.cpu_count()), {}
    for kind, changes in todo.items():
        base = make_base(params, kind)
        for change, some in changes.items():
            pair = given(base, base.params, change)
            for cell in some:
                jobs.setdefault((kind, change.stored, cell.recipe), (pair, cell.recipe))
    return [pool.submit(lambda pair, recipe: daq.quantize(*pair, recipe), *job) for job in jobs.values()]


def run_seed(
    size: Size, plan: Plan, todo: dict, texts: tuple[Text, Text], seed: int, results: Results, limit: float
) -> None:
    """Trains a model and measures every pair that something is missing of."""
    start = time.perf_counter()
    compiled = compile_early(size, todo)
    tuner, judge_ = Tuner(size, texts, seed), Judge(size, texts)
    print(f"seed {seed}: base trained after {time.perf_counter() - start:.0f} s", flush=True)
    for job in compiled:
        job.result()
    print(f"seed {seed}: compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for kind, changes in todo.items():
        base, last, tuned = make_base(tuner.trained, kind), None, None
        for change, some in changes.items():
            if time.perf_counter() - start > limit:
                print(f"seed {seed}: out of time before {kind} {change}", flush=True)
                return
            if last != change[:2]:  # a tune that is stored twice is made once
                last, tuned = change[:2], tuner.change(base.params, change)
            about, rows = measure(tuner, judge_, base, tuned, change, some)
            seconds = time.perf_counter() - start
            results.add(kind, change, about, rows, seconds)
            words = "; ".join(
                f"{r['layout']} {r['method']} {r['kl']:.2e} ({r['projection'] or 0:.2f})" for r in rows
            )
            head = f"{kind} {change.what} {change.rate:g} {change.stored}: change {rows[0]['change']:.3%}"
            print(
                f"seed {seed}, {seconds:4.0f} s: {head}, base {about['base']['kl']:.1e}\n    {words}",
                flush=True,
            )


def main(
    *,
    size: Literal[*SIZES] = "cpu",
    bases: tuple[Literal[*KINDS], ...] = KINDS,
    seeds: tuple[int, ...] = (0,),
    methods: tuple[Literal[*METHODS], ...] = tuple(METHODS),
    again: tuple[Literal[*METHODS], ...] = (),
    seconds: float = math.inf,
    known: Path | None = None,
    report: bool = False,
    wheels: Path = common.CACHE,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Runs the study, or reports on its files.

    Args:
        size: of the model and of its training.
        bases: kinds of base.
        seeds: one file each.
        methods: methods by name.
        again: methods that are measured anew where the file has them.
        seconds: no pair is started after that time from the start of a seed.
        known: folder with the files of earlier runs; None for `benchmarks/results/behaviour`.
        report: only write the tables of what the folder of results holds.
        wheels: folder that holds the corpora, or gets them.
        out: folder for the results; None for `benchmarks/results/behaviour`.
        quick: the smallest model on the texts of the demo, one base and two methods, to see that it runs.
    """
    folder = common.results(out, quick, "behaviour")
    if quick:
        size, bases, methods = "tiny", ("mxfp4",), ("absmax", "default")
    if not report:
        texts, plan = (demo_corpora() if quick else load_corpora(wheels.expanduser())), PLANS[size]
        for seed in seeds:
            name = f"native_{size}_seed{seed}.json"
            header = {"size": size, "seed": seed}
            results = Results(
                (known or common.results(None, quick, "behaviour")) / name, folder / name, header, again
            )
            todo = {
                kind: {
                    c: x for c in plan.changes() if (x := results.missing(kind, c, cells(kind, c, methods)))
                }
                for kind in bases
            }
            if any(todo.values()):
                run_seed(
                    SIZES[size], plan, {k: x for k, x in todo.items() if x}, texts, seed, results, seconds
                )
    write_report(sorted(folder.glob(f"native_{size}_seed*.json")), folder / f"native_{size}.md")


COMMANDS = {"native_bases": main}
