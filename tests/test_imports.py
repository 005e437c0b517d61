"""Imports run downward: from what a user calls to the arithmetic below, never up and never in a circle."""

import ast
import pathlib

import pytest

import daq_jax

ROOT = pathlib.Path(daq_jax.__file__).parent

# From the lowest to the highest; a module may import those before it, and its own wing's. A wing is a folder.
ORDER = (
    "errors",
    "version",
    "numerics",
    "tilings",
    "formats",
    "gpu_codes",
    "scales",
    "tiles",
    "grids",
    "cpu_parts",
    "metrics",
    "qtensor",
    "records",
    "roundings",
    "searches",
    "recipe",
    "trees",
    "rules",
    "pairs",
    "density",
    "recipes",
    "leaves",
    "batches",
    "analysis",
    "quantization",
    "models",
    "display",
    "io.disk",
    "io.hf",
    "io.orbax",
    "io.jobs",
    "io",
    "",  # the package itself, which gathers the public names
    "demo",
    "cli",
)


def modules() -> dict[str, pathlib.Path]:
    """Every module below `daq_jax` by its dotted name; a package is named as its folder."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_by(path: pathlib.Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "daq_jax":
            base = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {name.partition(".")[2] for name in names if name.partition(".")[0] == "daq_jax"}
    return found


def place(module: str) -> int:
    """Where a module stands in the order."""
    wing = next(
        (w for w in sorted(ORDER, key=len, reverse=True) if w and f"{module}.".startswith(f"{w}.")), ""
    )
    assert wing or not module, f"{module} has no place in ORDER"
    return ORDER.index(wing)


MODULES = modules()
IMPORTS = {name: imported_by(path, set(MODULES)) - {name} for name, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downward(module):
    upward = {other for other in IMPORTS[module] if place(other) > place(module)}
    assert upward == set()


def test_no_module_imports_itself_through_others():
    seen: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert seen.get(module) != "open", f"a circle: {' -> '.join((*path, module))}"
        if module not in seen:
            seen[module] = "open"
            for other in sorted(IMPORTS[module]):
                # The package `a.b` is imported by every `a.b.c`, whatever it gathers of them.
                if other in MODULES and not module.startswith(f"{other}."):
                    visit(other, (*path, module))
            seen[module] = "done"

    for module in sorted(MODULES):
        visit(module, ())


def test_the_top_of_the_package_is_small():
    top = [path.name for path in ROOT.glob("*.py")]
    assert len(top) <= 20, top


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_and_functions_are_short(module):
    tree = ast.parse(MODULES[module].read_text())
    assert len(MODULES[module].read_text().splitlines()) <= 400
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80}
    assert long == set()
