"""Screenshots of the page at three widths, light and dark, and of a comparison in terminals of two widths.

    python examples/see_what_was_kept.py --html page.html
    python docs/tools/screenshots.py page.html

Needs the extras `plot` and `test`, and chromium with its driver. Writes into docs/assets.
"""

import shutil
from pathlib import Path

import jax
import tyro
from rich.console import Console
from selenium import webdriver

import daq_jax as daq
from daq_jax.display import terminal

ASSETS = Path(__file__).parents[1] / "assets"
SIZES = {"phone": (390, 844), "laptop": (1280, 800), "wide": (1920, 1080)}


def of_page(page: Path) -> None:
    """The page in chromium, without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    for name, (width, height) in SIZES.items():
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            driver.get(page.resolve().as_uri())
            driver.save_screenshot(str(ASSETS / f"page_{name}_{scheme}.png"))
    driver.quit()


def of_terminal() -> None:
    """A comparison as the command prints it."""
    keys = jax.random.split(jax.random.key(0), 4)
    names = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(len(keys)))
    base = {name: jax.random.normal(key, (256, 256)) for name, key in zip(names, keys, strict=True)}
    base = daq.dequantize(daq.quantize(base, base, daq.recipes.absmax, rules=daq.HF_RULES))
    tuned = jax.tree.map(lambda w: w + 0.01 * jax.random.normal(jax.random.key(9), w.shape), base)
    found = daq.compare(base, tuned, daq.quantize(base, tuned, rules=daq.HF_RULES))
    for width in (80, 120):
        with open("/dev/null", "w") as nowhere:
            console = Console(record=True, width=width, file=nowhere)
            terminal.show(found.sheet(), console)
            console.save_svg(str(ASSETS / f"terminal_{width}.svg"), title="daq-jax compare BASE TUNED OUT")


def main(page: Path, /) -> None:
    """Writes the pictures.

    Args:
        page: the page to show.
    """
    of_page(page)
    of_terminal()


if __name__ == "__main__":
    tyro.cli(main)
