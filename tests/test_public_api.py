"""The public names: one set in `__all__`, in the API reference, in docstrings; a light `import daq_jax`."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import daq_jax as daq

API = pathlib.Path(__file__).parents[1] / "docs" / "api"
HEAVY = ("flax", "optax", "orbax", "tyro", "rich", "safetensors", "matplotlib")


def documented(value: object) -> object:
    """What bears the docstring of a public name: itself, or the class of a ready-made value."""
    own = inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, types.ModuleType)
    return value if own else type(value)


def test_all_lists_every_public_name_and_nothing_else():
    public = {name: getattr(daq, name) for name in dir(daq) if not name.startswith("_")}
    modules = {name for name, value in public.items() if isinstance(value, types.ModuleType)}
    assert modules == set(daq.NAMESPACES)
    assert set(daq.__all__) == set(public) - (modules - {"recipes"})
    assert len(daq.__all__) == len(set(daq.__all__))


def test_lazily_loaded_names_are_sorted_and_known_to_type_checkers():
    assert list(daq._EDGES) == sorted(daq._EDGES)
    imports = {
        alias.name: node.module
        for block in ast.parse(pathlib.Path(daq.__file__).read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert imports == daq._EDGES


def names_by_page() -> dict[str, list[str]]:
    """The names on each page of the API reference: of a section, or in the first cell of a row."""
    entry = re.compile(r"^(?:::: daq_jax\.|\| `)([\w.]+)", re.MULTILINE)
    return {page.stem: entry.findall(page.read_text()) for page in API.glob("*.md") if page.stem != "index"}


def test_every_public_name_and_recipe_is_on_one_page_of_the_api_reference():
    names = [name for page in names_by_page().values() for name in page]
    recipes = [f"recipes.{name}" for name in daq.recipes.RECIPES | daq.recipes.DENSITY_RECIPES]
    assert sorted(names) == sorted([*daq.__all__, *recipes])


def test_the_index_of_the_api_reference_lists_the_names_of_each_page():
    row = re.compile(r"^\| \[.*?\]\((\w+)\.md\) \| (.*) \|$", re.M)
    listed = row.findall((API / "index.md").read_text())
    assert {page: re.findall(r"`([\w.]+)`", names) for page, names in listed} == names_by_page()


@pytest.mark.parametrize("name", daq.__all__)
def test_a_public_name_has_a_docstring_of_its_own(name):
    where = documented(getattr(daq, name))
    generated = inspect.isclass(where) and (where.__doc__ or "").startswith(f"{where.__name__}(")
    assert where.__doc__
    assert not generated


@pytest.mark.parametrize("name", [n for n in daq.__all__ if inspect.isclass(documented(getattr(daq, n)))])
def test_public_methods_have_docstrings(name):
    where = documented(getattr(daq, name))
    members = {k: v for k, v in vars(where).items() if not k.startswith("_")}
    functions = {k: v for k, v in members.items() if inspect.isroutine(v) or isinstance(v, property)}
    assert [k for k in functions if not inspect.getdoc(getattr(where, k))] == []


def test_importing_the_package_loads_the_core_alone():
    lines = "import sys, daq_jax", "print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY) == set()
