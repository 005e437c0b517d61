"""See what a tune would lose before quantizing it, and what it kept after: words, a table, a page.

    python examples/see_what_was_kept.py [--html FILE] [--screenshot FILE]

The weights are drawn: six layers of a model that was shipped in FP8, tuned so that deeper layers move more.
The page is one file with nothing to load; the screenshot of it needs `chromium`. Needs the extra `plot`.
"""

import shutil
import subprocess
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


def main(html: Path | None = None, screenshot: Path | None = None) -> None:
    """Inspect, quantize by three recipes, compare.

    Args:
        html: where to write the page; a temporary file if not said.
        screenshot: where to write a PNG of it, made by chromium without a window.
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
        file.write_text(page(tables["AbsMax"], title="What AbsMax kept", others=tables), encoding="utf-8")
        if screenshot:
            chromium = shutil.which("chromium") or "chromium"
            options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,1210"]
            command = [chromium, *options, f"--screenshot={screenshot.resolve()}", file.resolve().as_uri()]
            subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    tyro.cli(main)
