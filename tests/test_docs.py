"""What the documents promise: examples in docstrings run, links lead somewhere, figures named in prose hold.

The README's code and `examples/` are run by `tests/run_docs.py`.
"""

import ast
import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq

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


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_relative_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_opens_by_saying_what_it_shows_and_is_named_in_the_readme(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert f"(examples/{path.name})" in (ROOT / "README.md").read_text()


def test_the_readme_has_one_line_to_try_and_one_to_test():
    for marker, last in (("demo line", "daq-jax demo"), ("test line", "pytest")):
        block = rf"<!-- {marker} -->\n```sh\n(python3 -m venv \.venv && .*{last})\n```\n"
        assert len(re.findall(block, (ROOT / "README.md").read_text())) == 1


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
