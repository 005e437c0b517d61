"""What the rules say of the leaves of a tree: the one place that decides, for `quantize` and `plan` alike."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from daq_jax.recipe import Recipe
from daq_jax.rules.rule import Rule
from daq_jax.tilings import DEFAULT_MATRIX, Matrix


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done with one leaf.

    Attributes:
        rule: the rule that decided; None where no rule speaks of the leaf.
        quantize: whether the leaf is quantized.
        recipe: how the leaf is quantized, if it is.
        matrix: input axes and output axes of the leaf.
        why: what decided, in words: a rule, or what is known of the leaf.
    """

    rule: Rule | None
    quantize: bool
    recipe: Recipe
    matrix: Matrix
    why: str

    def as_rule(self, path: str) -> Rule:
        """A rule that says the same of the leaf with this path, and of no other leaf."""
        pattern, matrix = f"^{re.escape(path)}$", self.matrix if self.quantize else None
        return Rule(pattern, self.quantize, self.recipe if self.quantize else None, matrix, about=self.why)


def decide_all(leaves: Mapping[str, Any], rules: Sequence[Rule], recipe: Recipe) -> dict[str, Decision]:
    """Applies the rules to the leaves of a tree.

    Args:
        leaves: arrays, shapes and dtypes, or anything else, by path.
        rules: in order; the first match wins.
        recipe: for leaves whose rule names none.
    """
    return {path: _decide(path, leaf, rules, recipe) for path, leaf in leaves.items()}


def first_match(path: str, ndim: int, rules: Sequence[Rule]) -> Rule | None:
    """The first rule that speaks of a leaf with this path and this number of axes; None if there is none."""
    return next((rule for rule in rules if rule.matches(path, ndim)), None)


def _decide(path: str, leaf: Any, rules: Sequence[Rule], recipe: Recipe) -> Decision:
    ndim = len(leaf.shape) if hasattr(leaf, "dtype") else 0
    rule = first_match(path, ndim, rules)
    if rule:
        return Decision(
            rule, rule.quantize, rule.recipe or recipe, rule.matrix or DEFAULT_MATRIX, rule.shown()
        )
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return Decision(None, False, recipe, DEFAULT_MATRIX, "not floating point")
    if ndim < 2:
        return Decision(None, False, recipe, DEFAULT_MATRIX, "fewer than two axes")
    return Decision(None, True, recipe, DEFAULT_MATRIX, "last two axes")
