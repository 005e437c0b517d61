"""The public names: one set in `__all__`, in the README and in docstrings; and a light `import daq_jax`."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import daq_jax as daq

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
HEAVY = ("flax", "optax", "orbax", "tyro", "rich", "safetensors", "matplotlib")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


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


def test_the_readme_lists_the_public_names_and_the_recipes():
    table = "\n".join(line for line in section("Public names").splitlines() if line.startswith("|"))
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(daq.__all__)
    assert sorted(re.findall(r"`recipes\.(\w+)`", table)) == sorted(
        daq.recipes.RECIPES | daq.recipes.DENSITY_RECIPES
    )


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
