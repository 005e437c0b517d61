"""A rule, how one is made, and what is warned of where rules are applied."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from daq_jax.errors import DaqError
from daq_jax.recipe import Recipe, check_recipe
from daq_jax.tilings import Matrix


class AmbiguousMatrixWarning(UserWarning):
    """A leaf's name and shape leave two matrix views, and nothing tells which one the model takes."""


class NarrowMatrixWarning(AmbiguousMatrixWarning):
    """A leaf is taken as many matrices of few rows each; it may be one matrix with several input axes."""


class UnreadMetricWarning(UserWarning):
    """A recipe has a metric of its own and a search that reads none."""


class UnusedRuleWarning(UserWarning):
    """A rule's pattern matched no leaf: probably a misspelt name."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the leaves whose path matches. Made by `keep` and `use`.

    Attributes:
        pattern: regular expression, found anywhere in the path.
        quantize: whether to quantize the leaf or keep it.
        recipe: how to quantize it; None for the recipe that was passed to `quantize`.
        matrix: its input axes and output axes; None for the last two.
        ndim_at_least: leaves with fewer axes are not matched.
        about: what the rule is for, in a few words; empty for a rule of the caller's own.
    """

    pattern: str
    quantize: bool
    recipe: Recipe | None = None
    matrix: Matrix | None = None
    ndim_at_least: int = 0
    about: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise DaqError(f"`{self.pattern}` is not a regular expression: {error}.") from error

    def matches(self, path: str, ndim: int) -> bool:
        """Whether this rule speaks of a leaf."""
        return ndim >= self.ndim_at_least and _is_found(self.pattern, path)

    def shown(self) -> str:
        """What the rule is for or, where it does not say, its pattern."""
        return self.about or f"{'use' if self.quantize else 'keep'}({self.pattern!r})"


@functools.lru_cache(maxsize=2**16)  # calls repeat with the same trees
def _is_found(pattern: str, path: str) -> bool:
    return re.search(pattern, path) is not None


def keep(pattern: str) -> Rule:
    """Leaves whose path matches stay as they are.

    Args:
        pattern: regular expression, found anywhere in the path.

    Raises:
        DaqError: if `pattern` is not a regular expression.

    >>> keep("lm_head").matches("decoder/lm_head/kernel", ndim=2)
    True
    """
    return Rule(pattern, quantize=False)


def use(pattern: str, recipe: Recipe | None = None, *, matrix: Matrix | None = None) -> Rule:
    """Leaves whose path matches are quantized.

    Args:
        pattern: regular expression, found anywhere in the path.
        recipe: how; None for the recipe that was passed to `quantize`.
        matrix: `(input axes, output axes)`, for weights that are not `[..., in, out]`: `((1,), (0,))` for
            a weight `[out, in]` as Hugging Face stores it, `((-3,), (-2, -1))` for a kernel `[D, heads, hd]`.

    Raises:
        DaqError: if `pattern` is not a regular expression, `matrix` is not two tuples of axes, or `recipe` is
            not a Recipe.
    """
    if recipe is not None:
        check_recipe(recipe)
    if matrix is not None:
        try:
            rows, columns = matrix
            matrix = (tuple(int(a) for a in rows), tuple(int(a) for a in columns))
        except (TypeError, ValueError) as error:
            raise DaqError(
                f"`matrix` must be (input axes, output axes), such as ((1,), (0,)); got {matrix!r}."
            ) from error
    return Rule(pattern, quantize=True, recipe=recipe, matrix=matrix)


class RuleSet(tuple[Rule, ...]):
    """A tuple of rules that is shown by its name, and printed as a table of what its rules do.

    Attributes:
        name: public name of the set, such as "DEFAULT_RULES".
    """

    name: str

    def __new__(cls, name: str, rules: Iterable[Rule]) -> "RuleSet":
        """A named set of the rules, in their order."""
        made = super().__new__(cls, rules)
        made.name = name
        return made

    def __getnewargs__(self) -> tuple[str, tuple[Rule, ...]]:
        return self.name, tuple(self)  # for pickle and copy

    def __repr__(self) -> str:
        return f"daq_jax.{self.name}"

    def __str__(self) -> str:
        lines = [("rule", "does", "in > out", "pattern")]
        for rule in self:
            axes = " > ".join(",".join(map(str, side)) for side in rule.matrix) if rule.matrix else ""
            lines.append((rule.shown(), "quantize" if rule.quantize else "keep", axes, rule.pattern))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def check_rules(rules: Any) -> None:
    """Raises DaqError unless `rules` is a sequence of rules, with the form that was probably meant."""
    if isinstance(rules, Rule):
        raise DaqError(
            f"rules: got one rule, needed a list of them: rules=[daq.{rules.shown()}, *daq.DEFAULT_RULES]."
        )
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        example = f"daq.keep({rules!r})" if isinstance(rules, str) else "daq.keep('lm_head')"
        raise DaqError(
            f"rules: got {rules!r}, needed a list of rules: rules=[{example}, *daq.DEFAULT_RULES]."
        )
    strange = [x for x in rules if not isinstance(x, Rule)]
    if strange:
        raise DaqError(
            f"rules: {strange[0]!r} is no rule; needed daq.keep(pattern) or daq.use(pattern, ...)."
        )
