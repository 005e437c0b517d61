"""`daq_jax.recipes`: recipes by name. Those of the density wing load when they are first asked for."""

import dataclasses
import re
import subprocess
import sys

import pytest

import daq_jax as daq
from daq_jax.searches.candidates import Released


def test_an_unknown_recipe_is_answered_with_close_names_and_all_names():
    with pytest.raises(AttributeError, match=r"'abs_max'.*Did you mean absmax\?") as error:
        daq.recipes.abs_max  # noqa: B018
    for name in (*daq.recipes.RECIPES, *daq.recipes.DENSITY_RECIPES):
        assert name in str(error.value)
    with pytest.raises(AttributeError, match=r"no recipe 'xyz'\. There are"):
        daq.recipes.xyz  # noqa: B018


def test_density_recipes_are_recipes_too():
    for name, recipe in daq.recipes.DENSITY_RECIPES.items():
        assert getattr(daq.recipes, name) is recipe
    assert {*daq.recipes.RECIPES, *daq.recipes.DENSITY_RECIPES} <= set(dir(daq.recipes))


def test_the_density_wing_is_loaded_when_it_is_asked_for():
    lines = (
        "import sys, daq_jax as daq",
        "loaded = lambda: [m for m in sys.modules if m.startswith('daq_jax.density')]",
        "assert loaded() == [], loaded()",
        "daq.recipes.RECIPES",
        "assert loaded() == [], loaded()",
        "assert daq.recipes.density == daq.DensityRecipe()",
        "assert 'daq_jax.density.recipe' in loaded()",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize("name", daq.recipes.RECIPES)
def test_a_recipe_is_shown_by_its_own_parts_and_reads_back(name):
    recipe = daq.recipes.RECIPES[name]
    assert len(repr(recipe)) <= 110
    assert eval(repr(recipe), vars(daq.metrics) | vars(daq) | {"Released": Released}) == recipe


def test_replace_changes_one_part_and_leaves_the_recipe_as_it_is():
    changed = daq.recipes.default.replace(format=daq.int8)
    assert changed.format == daq.int8
    assert dataclasses.replace(changed, format=daq.fp8_e4m3fn) == daq.recipes.default
    assert daq.recipes.default.format == daq.fp8_e4m3fn


@pytest.mark.parametrize(
    ("part", "function", "wanted"),
    [
        ("metric", lambda d: d, "(d, q)"),
        ("rounding", lambda tiles: tiles, "(tiles, scale)"),
        ("search", lambda a, b: a, "(trials)"),
        ("scales", lambda: 1, "(scale)"),
    ],
)
def test_a_part_that_takes_other_arguments_is_refused_with_those_it_is_called_with(part, function, wanted):
    with pytest.raises(
        daq.DaqError, match=re.escape(f"Recipe: `{part}` is called with {wanted}, which <func")
    ):
        daq.Recipe(**{part: function})
    assert daq.Recipe(**{part: lambda *given: given})
    assert daq.Recipe(**{part: max})  # whose signature Python does not know
