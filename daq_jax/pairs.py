"""Pairs of leaves of two trees, what the rules decide for each, and all that is checked before any work."""

import collections
import dataclasses
import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from daq_jax.errors import refuse
from daq_jax.metrics import cosine
from daq_jax.numerics.arithmetic import LARGEST_SQUARED, is_staged, largest_size
from daq_jax.numerics.sharding import committed_sharding, lie_apart, place_of
from daq_jax.qtensor import FLOATS, codes_of
from daq_jax.recipe import Recipe, check_recipe
from daq_jax.roundings.rounding import as_rounding
from daq_jax.rules import (
    NAMED_RULES,
    AmbiguousMatrixWarning,
    Decision,
    NarrowMatrixWarning,
    Rule,
    UnreadMetricWarning,
    UnusedRuleWarning,
    check_rules,
    decide_all,
    views_by_type,
)
from daq_jax.rules.doubts import doubts, family_of, narrow
from daq_jax.rules.shapes import float_shapes
from daq_jax.searches.search import as_search
from daq_jax.tilings import matrix_problem
from daq_jax.trees import PyTree, is_concrete, named_leaves, unreadable

_CONVERTED = {  # leaves of other libraries, by the package of their type, and how they become JAX's
    "torch": "jnp.asarray(x.detach().cpu().numpy()), after x.float() if x is bfloat16, gives an array",
    "tensorflow": "jnp.asarray(x) gives an array",
    "keras": "{v.path: v.value for v in model.variables} gives the weights of a Keras model as a tree",
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A leaf before and after tuning, and what to do with it."""

    path: str
    base: Any
    tuned: Any
    decision: Decision

    @property
    def program(self) -> Hashable:
        """What a pair that is quantized has in common with the others that one compiled program does."""
        return self.tuned.shape, self.decision.recipe


def planned_pairs(base: PyTree, tuned: PyTree, recipe: Recipe, rules: Sequence[Rule]) -> list[Pair]:
    """What `quantize` does with each leaf, and all that it warns of; `plan` shows the same pairs.

    Args:
        base: tree of weights before tuning, or of their shapes and dtypes.
        tuned: tree of weights after tuning, of the same structure.
        recipe: how to quantize leaves whose rule does not say.
        rules: in order; the first match wins.

    Raises:
        DaqError: for a recipe or rules of another type, and naming every path that only one tree has.
    """
    check_recipe(recipe)
    check_rules(rules)
    pairs = pair_leaves(base, tuned, recipe, rules)
    warn_unused(pairs, rules)
    warn_ambiguous(pairs)
    warn_unread_metrics(pairs)
    return pairs


def pair_leaves(base: PyTree, tuned: PyTree, recipe: Recipe, rules: Sequence[Rule]) -> list[Pair]:
    """Pairs the leaves of two trees by path, in the order of `tuned`, and applies the rules.

    Raises:
        DaqError: naming every path that only one of the trees has.
    """
    before, after = named_leaves(base), named_leaves(tuned)
    problems = [f"{p!r} is in base but not in tuned" for p in before if p not in after]
    problems += [f"{p!r} is in tuned but not in base" for p in after if p not in before]
    if problems:
        way_out = "Pass two trees of the same model, or cut both down to the leaves they share."
        refuse("base and tuned must have one structure", problems, way_out)
    _refuse_foreign(after)
    decisions = decide_all(after, rules, recipe, views_by_type(tuned))
    pairs = [Pair(p, before[p], x, decisions[p]) for p, x in after.items()]
    hidden = [
        f"{p.path!r} is a {type(p.tuned).__name__}"
        for p in pairs
        if p.decision.rule is None and _hides_arrays(p.tuned)
    ]
    if hidden:
        way_out = "Register their class, as with jax.tree_util.register_dataclass, or keep(...) them."
        refuse("JAX does not look for arrays inside these leaves", hidden, way_out)
    return pairs


def _refuse_foreign(leaves: Mapping[str, Any]) -> None:
    """Raises DaqError, naming every leaf that belongs to another library than JAX and NumPy."""
    packages = {path: type(x).__module__.partition(".")[0] for path, x in leaves.items()}
    foreign = {path: name for path, name in packages.items() if name in _CONVERTED}
    if foreign:
        listed = [f"{path!r} is a {name} {type(leaves[path]).__name__}" for path, name in foreign.items()]
        ways = "; ".join(_CONVERTED[name] for name in sorted(set(foreign.values())))
        refuse("leaves must be arrays of JAX or NumPy", listed, f"Convert them first: {ways}.")


def _hides_arrays(x: Any) -> bool:
    """Whether what JAX takes for a leaf is a container that it does not know."""
    if hasattr(x, "dtype") or callable(x):
        return False
    inside = list(x.values()) if isinstance(x, Mapping) else list(getattr(x, "__dict__", {}).values())
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(inside))


def _kind(x: Any) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if hasattr(x, "dtype") else f"a {type(x).__name__}"


def problem_of(pair: Pair) -> str | None:
    """Why a pair cannot be quantized, from shapes and dtypes alone: what came, what was needed."""
    base, tuned = pair.base, pair.tuned
    for word, x in (("base", base), ("tuned", tuned)):
        if is_concrete(x) and (why := unreadable(x)):
            return f"{word} is {why}"
        if not hasattr(x, "dtype") or str(x.dtype) not in FLOATS:
            return f"{word} is {_kind(x)}; a quantized leaf must be bfloat16, float16 or float32"
    if tuple(base.shape) != tuple(tuned.shape):
        return f"base is {tuple(base.shape)} but tuned is {tuple(tuned.shape)}; a pair must share one shape"
    if tuned.size == 0:
        return f"it is empty, {tuple(tuned.shape)}; a quantized leaf needs at least one element"
    places = [committed_sharding(codes_of(x)) for x in (base, tuned)]
    if lie_apart(*places):
        return (
            f"base lies on {place_of(places[0])} but tuned on {place_of(places[1])}; a pair must share its "
            "devices and its mesh: base = jax.device_put(base, tuned.sharding)"
        )
    why = matrix_problem(tuned.shape, pair.decision.matrix)
    if why:
        return f"it is {tuple(tuned.shape)} and cannot be viewed as matrix={pair.decision.matrix}: {why}"
    return None


_largest_size = jax.jit(largest_size)


def _wrong_numbers(pairs: Sequence[Pair]) -> dict[str, str]:
    """Of the pairs with numbers that cannot be quantized: path, and what is wrong."""
    named = [(p.path, word, x) for p in pairs for word, x in (("base", p.base), ("tuned", p.tuned))]
    named = [(path, word, x) for path, word, x in named if is_concrete(x)]
    if not named or is_staged():
        return {}
    largest = jax.device_get([_largest_size(x) for _, _, x in named])  # all asked for before one is awaited
    squares = {p.path for p in pairs if as_rounding(p.decision.recipe.rounding).squares}
    problems = {}
    for (path, word, _), size in zip(named, largest, strict=True):
        if not np.isfinite(size):
            problems[path] = f"{word} holds NaN or infinity; every weight must be finite: mend the checkpoint"
        elif path in squares and size > LARGEST_SQUARED:
            problems[path] = (
                f"{word} holds a weight of size {size:.3g}; the rounding of the recipe adds up squares, so "
                f"every weight must be at most {LARGEST_SQUARED:g}: mend the checkpoint, or use "
                "daq.recipes.absmax"
            )
    return problems


def refuse_abstract(pairs: Sequence[Pair]) -> None:
    """Raises one DaqError that names every pair that is to be quantized and has a shape for an array."""
    problems = [
        f"{p.path!r}: {word} is {unreadable(x)}"
        for p in pairs
        for word, x in (("base", p.base), ("tuned", p.tuned))
        if p.decision.quantize and any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(x))
    ]
    if problems:
        refuse(f"{len(problems)} of the leaves cannot be quantized", problems)


def refuse_unquantizable(pairs: Sequence[Pair], check_finite: bool, *, later: bool = False) -> None:
    """Raises one DaqError that names every pair that is to be quantized and cannot be.

    Args:
        pairs: of both trees.
        check_finite: look for NaN and infinity.
        later: but only if there is something to raise anyway.
    """
    pairs = [p for p in pairs if p.decision.quantize]
    problems = {p.path: why for p in pairs if (why := problem_of(p))}
    if check_finite and (problems or not later):
        problems |= _wrong_numbers([p for p in pairs if p.path not in problems])
    if problems:
        lines = [
            f"{path!r}: {why}. "
            f"Or leave it as it is: put keep({f'^{re.escape(path)}$'!r}) before your other rules."
            for path, why in problems.items()
        ]
        refuse(f"{len(problems)} of the leaves cannot be quantized", lines)


def warn_unused(pairs: Sequence[Pair], rules: Sequence[Rule]) -> None:
    """Warns of each rule of the caller's own that no leaf's path matches."""
    for rule in rules:
        if rule not in NAMED_RULES and not any(rule.matches(p.path, np.ndim(p.tuned)) for p in pairs):
            warnings.warn(f"the rule for {rule.pattern!r} matches no leaf", UnusedRuleWarning, stacklevel=4)


def warn_ambiguous(pairs: Sequence[Pair]) -> None:
    """Warns of leaves whose names and shapes leave two matrix views, once for all that differ in numbers."""
    shapes = float_shapes({p.path: p.tuned for p in pairs})
    decisions = {p.path: p.decision for p in pairs}
    few = narrow(shapes, decisions)
    for kind, found in (
        (NarrowMatrixWarning, few),
        (AmbiguousMatrixWarning, {p: why for p, why in doubts(shapes, decisions).items() if p not in few}),
    ):
        alike = collections.defaultdict[tuple[str, ...], list[str]](list)
        for path, why in found.items():
            alike[(re.sub(r"\d+", "*", path), f"{shapes[path]}", why)].append(path)
        for (_, shape, why), paths in alike.items():
            others = f" (and {len(paths) - 1} like it)" if paths[1:] else ""
            family = family_of(shapes)
            hint = f" The names look like those of daq.{family}." if family else ""
            warnings.warn(
                f"{paths[0]!r} {shape}{others} {why}; if its rows are on other axes, say which with "
                f"use(pattern, matrix=(input axes, output axes)), or pass the rules of its library.{hint}",
                kind,
                stacklevel=4,
            )


def warn_unread_metrics(pairs: Sequence[Pair]) -> None:
    """Warns of each recipe in use whose metric decides nothing, because its search reads none."""
    for recipe in dict.fromkeys(p.decision.recipe for p in pairs if p.decision.quantize):
        if recipe.metric != cosine and not as_search(recipe.search).reads_metric:
            warnings.warn(
                f"the recipe has metric={recipe.metric!r}, which {type(recipe.search).__name__}() does not "
                "read: give it a search too, such as search=daq.CoarseToFine(0.8, 1.5, 5, 10)",
                UnreadMetricWarning,
                stacklevel=4,
            )
