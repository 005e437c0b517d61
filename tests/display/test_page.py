"""The page as a browser shows it, and what it may weigh."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from daq_jax.analysis.comparison import Comparison
from daq_jax.analysis.figures import Figures, pool
from daq_jax.analysis.histograms import Details
from daq_jax.analysis.verdicts import verdict_of_result
from daq_jax.display.page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def shown():
    """A comparison of three leaves with details, and the page made of it."""
    rng = np.random.default_rng(0)
    sums = many_leaves(4).leaves.values()
    names = ("layers_10/kernel", "layers_2/kernel", "<script>alert(1)</script>")
    leaves = dict(zip(names, [*sums][1:], strict=True))
    found = Details(4096, rng.integers(0, 99, (64, 64)), np.full(36, 99), np.full(36, 66), np.arange(97))
    table = Comparison(leaves, pool(leaves.values()), {names[0]: found})
    facts = {"base": "a <base>", "recipe": "default", "date": "2026-11-27"}
    return table, page(table, title="A <page>", others={"absmax": table}, facts=facts)


def many_leaves(n):
    """A comparison of `n` leaves whose figures differ, without weights."""
    names = [field.name for field in dataclasses.fields(Figures)]
    leaves = {}
    for i in range(n):
        values = dict.fromkeys(names, np.float64(1000)) | {"dq": np.float64(i), "elements": 2**24 + i}
        path = f"model.layers.{i // 7}.self_attn.some_projection_{i % 7}.weight"
        leaves[path] = Figures(**values | {"counts": np.full(4, 250)})
    return Comparison(leaves, pool(leaves.values()))


def test_a_page_escapes_what_it_shows_and_names_no_place_to_load_from(shown):
    _, html = shown
    assert "<script>alert(1)" not in html
    assert "A &lt;page&gt;" in html
    markup = re.sub(r"base64,[\w+/=]*", "", html)
    assert re.findall(r"https?:|url\(|@import|(?:href|src)=\"(?!data:)", markup) == []
    assert html.count("data:image/png;base64,") == 5


@pytest.mark.slow
def test_a_thousand_leaves_weigh_less_than_2_mb(shown):
    table, _ = shown
    large = dataclasses.replace(many_leaves(1000), details=table.details)
    weight = len(page(large, others={str(i): large for i in range(6)}).encode())
    assert 100_000 < weight < 2_000_000


def test_a_page_without_details_or_leaves_still_shows_its_table():
    assert page(many_leaves(2)).count("data:image/png;base64,") == 1
    assert '<span id="count">0</span> leaves' in page(Comparison({}, pool([])))


def test_a_page_says_what_was_compared_and_what_to_do(shown):
    _, html = shown
    assert "a &lt;base&gt;" in html
    assert '<p class="verdict">' in html
    empty = page(Comparison({}, pool([])))
    assert "No weight is quantized" in empty


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (0.4, "60% of the change is lost (least in w, 40%). Quantize with the default"),
        (0.98, "The change is kept, at 98% of its size (least in w, 98%). Compare the predictions"),
        (1.4, "comes out at 140% of its size"),
    ],
)
def test_a_verdict_ends_with_what_to_do(kept, words):
    figures = next(iter(many_leaves(1).leaves.values()))
    figures = dataclasses.replace(figures, dd=np.float64(1), dq=np.float64(kept))
    assert words in verdict_of_result(figures, {"w": figures})


# --- in a browser ---


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here: the page was not opened")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1500"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def column(driver, number):
    return driver.execute_script(
        "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[arguments[0]].textContent)",
        number,
    )


@pytest.mark.slow
def test_in_a_browser_the_table_sorts_the_pictures_load_and_nothing_leaves_the_page(shown, browser, tmp_path):
    table, html = shown
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    browser.get(file.as_uri())

    widths = browser.execute_script("return [...document.images].map(x => x.complete ? x.naturalWidth : 0)")
    assert len(widths) == 5
    assert min(widths) > 200

    paths = list(table.worst(3))
    assert column(browser, 0) == paths
    buttons = browser.find_elements("css selector", "thead button")
    buttons[2].click()  # cosine
    rising = [float(x) for x in column(browser, 2)]
    assert rising == sorted(rising)
    assert rising[0] < rising[-1]
    buttons[2].click()
    assert [float(x) for x in column(browser, 2)] == rising[::-1]
    buttons[0].click()
    assert column(browser, 0) == ["<script>alert(1)</script>", "layers_2/kernel", "layers_10/kernel"]
    assert browser.find_element("css selector", "th[aria-sort]").text.startswith("leaf")

    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("data:", file.as_uri()))] == []

    shots = pathlib.Path(os.environ.get("DAQ_ARTEFACTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(shots / "page.png"))
    assert (shots / "page.png").stat().st_size > 20_000


@pytest.mark.slow
def test_a_search_leaves_the_leaves_with_its_words(shown, browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(shown[1], encoding="utf-8")
    browser.get(file.as_uri())
    count = browser.find_element("css selector", "h2 span")
    assert count.text == "3"
    box = browser.find_element("css selector", "input")
    box.send_keys("kernel LAYERS_2")
    rows = browser.find_elements("css selector", "tbody tr")
    assert [row.text.split()[0] for row in rows if row.is_displayed()] == ["layers_2/kernel"]
    assert count.text == "1 of 3"
    box.clear()
    box.send_keys(" ")
    assert all(row.is_displayed() for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_nothing_is_cut_at_any_width_and_dark_pages_are_dark(shown, browser, tmp_path, width, scheme):
    file = tmp_path / "page.html"
    large = dataclasses.replace(many_leaves(30), details=shown[0].details)
    file.write_text(page(large, title="model" * 20, facts={"base": "path/" * 40}), encoding="utf-8")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    shade = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    inks = browser.execute_script("return getComputedStyle(document.querySelector('td')).color")
    paper, ink = (np.mean([int(n) for n in re.findall(r"\d+", x)[:3]]) for x in (shade, inks))
    assert (paper < 50) == (scheme == "dark")
    assert abs(paper - ink) > 150
    right = browser.execute_script(
        "return Math.max(...[...document.querySelectorAll('.verdict, dl, img, input, .rows')]"
        ".map(x => x.getBoundingClientRect().right))"
    )
    assert right <= width


@pytest.mark.slow
def test_a_request_that_leaves_the_page_would_be_seen(shown, browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(
        shown[1].replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'), encoding="utf-8"
    )
    browser.get(file.as_uri())

    def is_logged(browser):
        return any("127.0.0.1:9" in entry["message"] for entry in browser.get_log("browser"))

    wait = pytest.importorskip("selenium.webdriver.support.wait")
    wait.WebDriverWait(browser, 30).until(is_logged)  # a busy browser logs it a little later
