"""See what a tune would lose before quantizing it, and what it kept after: words, a table, a page.

    python examples/see_what_was_kept.py [--html FILE]

The weights are drawn: six layers of a model that was shipped in FP8, tuned so that deeper layers move more.
The page is one file with nothing to load. Needs the extra `plot`.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

import daq_jax as daq
from daq_jax.display.page import page

LAYERS = 6
KINDS = ("attention/query", "attention/out", "mlp/up", "mlp/down")
SHAPE = (256, 256)
RECIPES = {
    "AbsMax": daq.recipes.absmax,
    "scale search": daq.recipes.paper_cosine,
    "unbiased": daq.Recipe(rounding=daq.UnbiasedSubspace(rank=64)),
}


def draw_pair() -> tuple[dict, dict]:
    """Weights before and after tuning, bfloat16; the base lies on the grid of FP8."""
    plain, change = {}, {}
    for layer in range(LAYERS):
        for name in KINDS:
            path = f"layers_{layer}/{name}"
            first, second = jax.random.split(jax.random.key(len(plain)))
            plain[path] = 0.02 * jax.random.normal(first, SHAPE, jnp.bfloat16)
            size = 1e-4 * (1 + layer / 2)
            change[path] = (size * jax.random.normal(second, SHAPE)).astype(jnp.bfloat16)
    base = daq.dequantize(daq.quantize(plain, plain, daq.recipes.absmax))
    return base, jax.tree.map(jnp.add, base, change)


def main(html: Path | None = None) -> None:
    """Inspect, quantize by three recipes, compare.

    Args:
        html: where to write the page; a temporary file if not said.
    """
    base, tuned = draw_pair()
    print(daq.inspect(base, tuned, RECIPES["unbiased"]).verdict, "\n")

    tables = {
        name: daq.compare(base, tuned, daq.quantize(base, tuned, recipe), details=True)
        for name, recipe in RECIPES.items()
    }
    print(tables["AbsMax"])
    assert tables["AbsMax"].total.projection < 0.8 < 0.98 < tables["unbiased"].total.projection < 1.02

    with tempfile.TemporaryDirectory() as folder:
        file = html or Path(folder, "page.html")
        facts = {
            "base": "six drawn layers",
            "tuned": "the same, deeper layers moved more",
            "recipe": "AbsMax",
        }
        html_page = page(tables["AbsMax"], title="What AbsMax kept", others=tables, facts=facts)
        file.write_text(html_page, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
