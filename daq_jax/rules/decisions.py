"""What the rules say of the leaves of a tree: the one place that decides, for `quantize` and `plan` alike.

Rules of the caller's own come first. What the type of a layer tells (`layers`), or the leaves beside a leaf
(`shapes`), stands above the ready rules, which go by names. The last resort stands below: a leaf of two axes
or more is a stack of `[in, out]` matrices.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from daq_jax.recipe import Recipe
from daq_jax.rules.layers import View
from daq_jax.rules.rule import Rule
from daq_jax.rules.sets import NAMED_RULES
from daq_jax.rules.shapes import float_shapes, own_axes, views_by_shape
from daq_jax.tilings import DEFAULT_MATRIX, Matrix


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done with one leaf.

    Attributes:
        rule: the rule that decided; None where no rule did.
        quantize: whether the leaf is quantized.
        recipe: how the leaf is quantized, if it is.
        matrix: input axes and output axes of the leaf.
        why: what decided, in words: a rule, or what is known of the leaf.
        is_sure: whether the caller, a type or the leaves beside this one told the axes, and not its name.
    """

    rule: Rule | None
    quantize: bool
    recipe: Recipe
    matrix: Matrix
    why: str
    is_sure: bool

    def as_rule(self, path: str) -> Rule:
        """A rule that says the same of the leaf with this path, and of no other leaf."""
        pattern, matrix = f"^{re.escape(path)}$", self.matrix if self.quantize else None
        return Rule(pattern, self.quantize, self.recipe if self.quantize else None, matrix, about=self.why)


def decide_all(
    leaves: Mapping[str, Any],
    rules: Sequence[Rule],
    recipe: Recipe,
    types: Mapping[str, View] | None = None,
) -> dict[str, Decision]:
    """Decides for all leaves of a tree.

    Args:
        leaves: arrays, shapes and dtypes, or anything else, by path.
        rules: in order; the first match wins.
        recipe: for leaves whose rule names none.
        types: what the types of layers tell, by path.
    """
    shapes = float_shapes(leaves)
    own = own_axes(shapes)
    views = views_by_shape({path: tuple(shapes[path][a] for a in axes) for path, axes in own.items()})
    found = {}
    for path, leaf in leaves.items():
        ndim = len(leaf.shape) if hasattr(leaf, "dtype") else 0
        rule = first_match(path, ndim, rules, len(own.get(path, range(ndim))))
        known, view = (types or {}).get(path), views.get(path)
        found[path] = _decide(rule, shapes.get(path), own.get(path, ()), known, view, recipe)
    return found


def first_match(path: str, ndim: int, rules: Sequence[Rule], own: int | None = None) -> Rule | None:
    """The first rule that speaks of a leaf; None if there is none.

    Args:
        path: path of the leaf.
        ndim: number of its axes.
        rules: in order.
        own: number of its axes without those of stacks of layers, of which the ready rules know nothing; None
            for `ndim`.
    """
    for rule in rules:
        if rule.matches(path, ndim if own is None or rule not in NAMED_RULES else own):
            return rule
    return None


def _decide(
    rule: Rule | None,
    shape: tuple[int, ...] | None,
    own: tuple[int, ...],
    known: View | None,
    view: View | None,
    recipe: Recipe,
) -> Decision:
    """What is done with a leaf.

    Args:
        rule: the first rule that speaks of the leaf.
        shape: shape of the leaf; None for a leaf that is not floating point.
        own: its axes without those of stacks of layers.
        known: what its type tells.
        view: what the leaves beside it tell, in its own axes.
        recipe: for a rule that names none.
    """

    def kept(why: str, rule: Rule | None = None) -> Decision:
        return Decision(rule, False, recipe, DEFAULT_MATRIX, why, True)

    def quantized(rule: Rule | None, matrix: Matrix, why: str, is_sure: bool) -> Decision:
        return Decision(rule, True, (rule and rule.recipe) or recipe, matrix, why, is_sure)

    if rule and not rule.quantize:
        return kept(rule.shown(), rule)
    told = known or (view and View(view.matrix and _in_place(view.matrix, own, shape), view.why))
    if rule and rule not in NAMED_RULES:
        matrix = rule.matrix or (told and told.matrix) or _in_place(DEFAULT_MATRIX, own, shape)
        return quantized(rule, matrix, rule.shown(), True)
    if shape is None and rule is None:
        return kept("not floating point")
    if told and told.matrix is None:
        return kept(told.why)
    if rule is None and len(own) < 2:
        return kept("fewer than two axes" if len(shape or ()) < 2 else "a vector of each layer")
    if told and told.matrix:
        return quantized(None, told.matrix, told.why, True)
    matrix = _in_place((rule and rule.matrix) or DEFAULT_MATRIX, own, shape)
    if shape and all(shape[a] == 1 for a in matrix[1]):
        return kept("one output")
    return quantized(rule, matrix, rule.shown() if rule else "last two axes", False)


def _in_place(matrix: Matrix, own: tuple[int, ...], shape: tuple[int, ...] | None) -> Matrix:
    """A view in a leaf's own axes, as a view of the whole leaf; axes are counted from the end.

    Counted so, the view of a stack is the view of each slice of it too.
    """
    rows, columns = matrix
    if not shape or any(not -len(own) <= a < len(own) for a in rows + columns):
        return matrix  # it does not fit, which is told where everything is checked
    placed = [tuple(own[a] - len(shape) for a in axes) for axes in matrix]
    return placed[0], placed[1]
