"""What the documents promise: examples in docstrings run, links lead somewhere, figures named in prose hold.

The code of the README and of `docs/`, and `examples/`, are run by `tests/run_docs.py`; `.ci/run docs` builds
the site and follows the links between its pages.
"""

import ast
import collections
import doctest
import functools
import importlib
import json
import pathlib
import pkgutil
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from benchmarks.servers.study import verdict
from daq_jax import cli
from tests.hf_folders import BF16, write_folder
from tests.run_docs import cells as code_cells
from tests.run_docs import program

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ["daq_jax", *(m.name for m in pkgutil.walk_packages(daq.__path__, "daq_jax."))]
SLOW = {
    f"daq_jax.{name}"
    for name in (
        "analysis.inspection",
        "density.quantizer",
        "io.orbax.checkpoints",
        "models.flax",
        "models.matmul",
    )
}


def doctests_of(name: str) -> list[doctest.DocTest]:
    """Read from the source, because `jax.jit` and type checkers hide functions from doctest's own search."""
    module = importlib.import_module(name)
    path = pathlib.Path(module.__file__)
    scope = vars(module) | {"jax": jax, "jnp": jnp, "np": np}
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, nodes) and ast.get_docstring(n)
    ]
    parser = doctest.DocTestParser()
    return [
        parser.get_doctest(ast.get_docstring(n), scope, getattr(n, "name", name), str(path), n.body[0].lineno)
        for n in documented
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in MODULES]
)
def test_examples_in_docstrings_run(name):
    said = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctests_of(name):
        with jax.numpy_dtype_promotion("standard"):  # as a user has it
            runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_docstring_examples_are_found():
    assert sum(bool(test.examples) for name in MODULES for test in doctests_of(name)) >= 5


PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@of_each_page
def test_links_lead_to_files(page):
    """Relative ones, and those to files of this repository, by which a page of the site leads out of it."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    ours = re.findall(r"github\.com/daq-jax/daq-jax/blob/main/([^)\s#]+)", page.read_text())
    found = [page.parent / link for link in links] + [ROOT / link for link in ours]
    assert [path for path in found if not path.is_file()] == []


@of_each_page
def test_commands_on_a_page_are_spelt_as_the_command_line_has_them(page, monkeypatch):
    """Each `daq-jax` line of a shell block is parsed, and carried out by nobody."""
    called = []

    def recorded(command):
        return functools.wraps(command)(lambda *args, **kwargs: called.append(command.__name__))

    monkeypatch.setattr(cli, "COMMANDS", {name: recorded(f) for name, f in cli.COMMANDS.items()})
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.removesuffix(" &") for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("daq-jax ")]
    assert [cli.main(shlex.split(line, comments=True)[1:]) for line in lines] == [0] * len(lines)
    assert called == [line.split()[1] for line in lines]


def test_the_program_of_a_page_is_its_python_and_its_marked_shell_in_order():
    blocks = ("python", "one"), ("sh", "two"), ("run", "three"), ("text", "four"), ("python", "five")
    fence = {"run": "<!-- run -->\n```sh"}
    page = "".join(f"{fence.get(kind, f'```{kind}')}\n{code}\n```\ntext\n" for kind, code in blocks)
    assert re.findall("one|two|three|four|five", program(page)) == ["one", "three", "five"]
    assert program("```sh\ntwo\n```\n") == ""


def test_the_code_cells_of_notebooks_are_run_and_kept_without_outputs():
    for path in (ROOT / "docs").rglob("*.ipynb"):
        found = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in found)
        assert code_cells(path.read_text()).count("\n\n") >= len(found) - 1
        assert path.stat().st_size < 20_000


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_page_of_the_docs_is_in_the_navigation():
    listed = re.findall(r"^ +- .*?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in sorted((ROOT / "docs").rglob("*.md"))]
    assert sorted(listed) == pages


def test_files_that_a_page_includes_are_there():
    included = [
        name for page in PAGES for name in re.findall(r'^--8<-- "(.*)"$', page.read_text(), re.MULTILINE)
    ]
    assert len(included) >= 5
    assert [name for name in included if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_opens_by_saying_what_it_shows_and_is_named_in_the_readme(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert f"(examples/{path.name})" in (ROOT / "README.md").read_text()


def test_the_readme_has_one_line_to_try_and_one_to_test():
    for marker, last in (("demo line", "daq-jax demo"), ("test line", "pytest")):
        block = rf"<!-- {marker} -->\n```sh\n(python3 -m venv \.venv && .*{last})\n```\n"
        assert len(re.findall(block, (ROOT / "README.md").read_text())) == 1


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the tables under a heading, without bold."""
    text = (ROOT / "docs" / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.replace("**", "") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_native_bases_is_that_of_the_result_files():
    """Means over the seeds there are, of changes stored in float32 at the five largest rates."""
    found = collections.defaultdict(list)
    for seed in (0, 1, 2):
        path = ROOT / f"benchmarks/results/behaviour/native_gpu_seed{seed}.json"
        for row in json.loads(path.read_text())["rows"]:
            if row["what"] == "tune" and row["stored"] == "f32" and row["rate"] >= 5e-7:
                key = row["base_kind"], row["layout"], row["method"]
                found[key, row["rate"]].append(row["kl"])

    def line(*key):
        return [f"{np.mean(kl):.1e}" for (of, _), kl in sorted(found.items()) if of == key]

    kinds = {"FP8 blocks": "fp8-block", "MXFP4": "mxfp4", "NVFP4": "nvfp4", "INT4, groups of 32": "int4"}
    methods = {"AbsMax": "absmax", "default": "default"}
    methods["stochastic rounding at the base's scale"] = "stochastic"
    rows = [row for row in rows_of("results/index.md", "Native bases, in short") if ": " in row[0]]
    assert len(rows) == 16
    for label, *cells in rows:
        base, _, method = label.partition(": ")
        kind = kinds[base]
        of = ("bf16", kind, "absmax") if method == "floor" else (kind, kind, methods[method])
        assert cells == line(*of), label


def test_the_table_of_formats_lists_those_of_the_command():
    formats = [name for row in rows_of("folders.md", "Formats") for name in re.findall("`([^`]+)`", row[0])]
    assert sorted(formats) == sorted([*cli.FORMATS, "--format"])


def test_the_matrix_of_vllm_is_that_of_the_result_file():
    found = json.loads((ROOT / "benchmarks/results/servers.json").read_text())["rows"]
    verdicts = {(row["model"], row["format"]): verdict(row) for row in found}
    (_, *models), *lines = rows_of("folders.md", "What vLLM loads")
    said = {
        (model, format.strip("`")): cell
        for format, *cells in lines
        for model, cell in zip(models, cells, strict=True)
        if cell
    }
    assert said == verdicts


def test_figures_of_memory_and_time_are_those_of_the_result_files():
    read = {p.stem: json.loads(p.read_text()) for p in (ROOT / "benchmarks/results").glob("folders_*.json")}
    said = {row[0]: row[1] for row in rows_of("results/index.md", "Memory and time")}
    peaks = {f"{run['peak_gb']:.2f} GB for both" for run in read["folders_memory"]["runs"]}
    assert peaks == {said["peak memory, 6 GB and 12 GB of weights, AbsMax, `--memory 2`"]}
    plan = read["folders_plan"]
    assert said["plan of a folder of 671B parameters"] == f"half a minute, {plan['peak_gb']:.2f} GB"
    assert plan["seconds"] < 30
    plan = read["folders_plan_as_base"]
    size = f"{plan['parameters'] / 1e12:.1f}T parameters with {plan['packed']:,} weights in MXFP4"
    label = f"plan of a folder of {size}"
    assert said[label] == f"{plan['seconds']:.0f} s, {plan['peak_gb']:.2f} GB"
    ratio = read["folders_speed_cpu"]["ratios"]["folder / in_memory"]
    label = "folders beside the same tensors in memory, previous default"
    assert said[label] == f"{ratio:.2f} times as long"
    seconds = read["folders_speed_h200"]["best_seconds"]["folder"]
    label = "1.6 GB of tuned weights and their base, previous default"
    assert said[label].startswith(f"{seconds:.1f} s")


def test_figures_of_speed_are_those_of_the_result_file():
    report = json.loads((ROOT / "benchmarks/results/speed_h200.json").read_text())
    measured = {(row["workload"], row["recipe"]): row for row in report["rows"]}
    said = rows_of("results/speed.md", "One GPU")[1:]
    table = [row for row in said if row[0].startswith("`") and "`, `" in row[0]]
    assert len(table) == 10
    for label, *cells in table:
        row = measured[tuple(label.strip("`").split("`, `"))]
        rates = [row[x] / 1e9 for x in ("elements_per_second", "elements_per_second_queued")]
        figures = [*rates, row["floor_elements_per_second"] / 1e9, row.get("times_faster")]
        assert cells == ["-" if x is None else f"{x:.3g}" for x in figures], label


def test_figures_of_other_tools_are_those_of_the_result_file():
    found = json.loads((ROOT / "benchmarks/results/native_peers.json").read_text())["rows"]
    short = {"MXFP4": "mxfp4", "NVFP4": "nvfp4", "INT4, groups of 32": "int4 group 32"}
    rules = {
        "the rule of OCP": "floor",
        "to nearest at": "base's scales",
        "the default": "daq-jax, the default",
    }
    table = rows_of("as-base.md", "What other tools keep of such tunes")[1:14]
    for base, tool, *cells in table:
        rule = next((rule for start, rule in rules.items() if tool.startswith(start)), tool.split()[0])
        one, two = (r for r in found if (r["base"], r["rule"]) == (short[base], rule))
        assert (one["tune"], two["tune"]) == ("rank 16", "dense")
        assert cells == [
            f"{one['projection']:.2f} / {two['projection']:.2f}",
            f"{one['subspace']:.3f} / {two['subspace']:.3f}",
            f"{100 * one['moved_scales']:.0f} %",
        ]
    assert len(table) == 13


def test_figures_of_the_demo_in_the_readme_are_those_of_the_results():
    demo = (ROOT / "docs/results/index.md").read_text().partition("## The demo\n")[2].partition("\n## ")[0]
    table = (ROOT / "README.md").read_text().partition("<!-- demo table -->\n")[2].partition("\n\n")[0]
    figures, words = re.findall(r"(\d+) %.*?(\d\.\de-\d\d)", table), " ".join(demo.split())
    for base, absmax, default in zip(("FP8", "MXFP4"), figures[:2], figures[2:], strict=True):
        said = words.partition(f" {base}: tuning moved")[2]
        found = re.search(
            r"absmax keeps (\d+)% of that gain at a KL of (\S+) from .*? keeps (\d+)% at (\S+),", said
        )
        assert found.groups() == (*absmax, *default)


def test_bytes_for_each_element_are_those_of_the_plan(tmp_path):
    """The plan of three matrices of 34 million elements, and of half: work takes more than compiling."""
    page = " ".join((ROOT / "docs/folders.md").read_text().split())
    for recipe, words in (
        ("absmax", "{} bytes for each element of the largest matrix under `absmax`"),
        ("mse", "{} under the recipes that only search scales"),
        ("default", "and {} under the default"),
    ):
        taken = []
        for n in (8192, 16384):
            weights = {f"model.layers.{i}.mlp.up_proj.weight": np.zeros((2048, n), BF16) for i in range(3)}
            folder = write_folder(tmp_path / f"{recipe}{n}", [weights])
            found = daq.quantize_folder(
                folder, folder, tmp_path / "out", daq.recipes.RECIPES[recipe], plan_only=True
            )
            taken.append(found["memory_bytes"])
        each = (taken[1] - taken[0]) / (2048 * 8192)
        assert words.format(f"{each:.1f}") in page, each


def test_on_grid_tells_the_two_cases_of_the_readme_apart():
    weight, tune = (jax.random.normal(jax.random.key(i), (512, 384)) for i in range(2))
    off_grid, tune = (x.astype(jnp.bfloat16) for x in (0.02 * weight, 2e-4 * tune))
    native = daq.quantize(off_grid, off_grid, daq.recipes.absmax).dequantize()
    apart, on = (
        daq.compare(base, base + tune, daq.quantize(base, base + tune, daq.recipes.absmax)).total
        for base in (off_grid, native)
    )
    assert apart.on_grid < 0.1
    assert on.on_grid > 0.5
    assert apart.projection == pytest.approx(1, abs=0.05)
    assert on.projection < 0.5


def test_figures_of_density_are_those_of_the_result_file():
    rows = json.loads((ROOT / "benchmarks/results/density/gpu.json").read_text())["rows"]
    rows = [row for row in rows if (row["group"], row["tokens"]) == (128, 16)]
    found = {(row["format"], row["method"]): row for row in rows}
    ours = "stages 1, 2, rounding, row"
    table = rows_of("results/density.md", "Beside the best of round to nearest, AWQ and GPTQ")[1:5]
    for fmt, *cells in table:
        peers = [row for row in rows if row["format"] == fmt and row["kind"] == "peer"]
        for cell, figure in zip(cells, ("kl", "increase"), strict=True):
            best = min(peers, key=lambda row: row[figure])
            assert best["method"].startswith("gptq")
            said = cell.partition(" %")[0]
            digits = len(said.partition(".")[2])
            assert said == f"{100 * (1 - found[fmt, ours][figure] / best[figure]):.{digits}f}"
    assert len(table) == 4
    stages = ("stage 1", "stage 2", "stages 1, 2, rounding", ours, "rounding, row")
    plain = found["nf4", "no stage"]["kl"]
    shares = [f"{max(0, 100 * (1 - found['nf4', stage]['kl'] / plain)):.0f} %" for stage in stages]
    told = [cells[1] for cells in rows_of("results/density.md", "What each stage adds")[1:6]]
    assert told[0].startswith("nothing")
    assert [shares[0], *told[1:]] == ["0 %", *shares[1:]]
