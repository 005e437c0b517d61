"""Rules: which leaves of a tree are quantized, how, and which are left as they are.

A leaf's path is its dict keys, indices and attribute names joined by "/"; a bare array has path "". Rules
are an ordered list; the first one whose pattern is found in the path (`re.search`, case-sensitive) decides.
A leaf that no rule names is quantized if it is floating point with two axes or more, and kept otherwise.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daq_jax.errors import DaqError
from daq_jax.recipe import Recipe, check_recipe
from daq_jax.tilings import DEFAULT_MATRIX, Matrix


class NarrowMatrixWarning(UserWarning):
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
    """

    pattern: str
    quantize: bool
    recipe: Recipe | None = None
    matrix: Matrix | None = None
    ndim_at_least: int = 0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise DaqError(f"`{self.pattern}` is not a regular expression: {error}.") from error

    def matches(self, path: str, ndim: int) -> bool:
        """Whether this rule speaks of a leaf."""
        return ndim >= self.ndim_at_least and re.search(self.pattern, path) is not None


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


def check_rules(rules: Any) -> None:
    """Raises DaqError unless `rules` is a sequence of rules, with the form that was probably meant."""
    if isinstance(rules, Rule):
        raise DaqError(f"rules: got one rule, needed a list of them: rules=[{_shown(rules)}].")
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


def _shown(rule: Rule) -> str:
    return f"daq.{'use' if rule.quantize else 'keep'}({rule.pattern!r}), *daq.DEFAULT_RULES"


def _kernel(pattern: str, matrix: Matrix, ndim: int = 3) -> Rule:
    """A weight of several input or output axes; with fewer than `ndim` axes it is a plain matrix."""
    return Rule(pattern, quantize=True, matrix=matrix, ndim_at_least=ndim)


# Embeddings and output heads decide which token comes out, routers which expert is asked, and norms, biases
# and adapters are small: none is worth the risk. A norm or bias has two axes where layers are stacked.
DEFAULT_RULES: tuple[Rule, ...] = (
    keep(r"(?i)embed|(^|[./])(wte|wpe)([./]|$)"),
    keep(r"(?i)norm|(^|[./])(ln\w*|bn\w*|scale)([./]|$)"),
    keep(r"(?i)bias"),
    keep(r"(?i)(^|[./_])lora([./_]|$)"),
    keep(r"(^|[./])(\w*head|logits\w*|classifier)([./]|$)"),
    keep(r"(?i)router|(moe\w*|experts?)[./]gate([./]|$)|(^|[./])mlp\.gate\.weight$"),
    # Attention of Flax: [D, heads, hd] into the heads, [heads, hd, D] out of them.
    _kernel(r"(^|/)(query|key|value)/kernel$", ((-3,), (-2, -1))),
    _kernel(r"(^|/)out/kernel$", ((-3, -2), (-1,))),
    # Convolutions: [height, width, in, out], or [width, in, out].
    _kernel(r"(?i)conv\w*/kernel$", ((-4, -3, -2), (-1,)), ndim=4),
    _kernel(r"(?i)conv\w*/kernel$", ((-3, -2), (-1,))),
)

# MaxText stacks layers along the second axis of every weight, between the inputs and the rest.
MAXTEXT_RULES: tuple[Rule, ...] = (
    _kernel(r"(^|/)(query|key|value|wq_b|wkv_b)/kernel$", ((-4,), (-2, -1)), ndim=4),
    _kernel(r"(^|/)(query|key|value|wq_b|wkv_b)/kernel$", ((-3,), (-2, -1))),
    _kernel(r"(^|/)out/kernel$", ((-4, -2), (-1,)), ndim=4),
    _kernel(r"(^|/)(wi_0|wi_1|wo|wq_a|wkv_a)/kernel$", ((-3,), (-1,))),
    *DEFAULT_RULES,  # experts, [E, in, out] or [E, L, in, out], are plain
)

# Tunix: heads as einsums hold them, [D, heads, hd] and [heads, hd, D]; in Gemma [heads, D, hd].
TUNIX_RULES: tuple[Rule, ...] = (
    _kernel(r"(^|/)[qkv]_proj/w$", ((-3,), (-2, -1))),
    _kernel(r"(^|/)(o_proj|attn_vec_einsum)/w$", ((-3, -2), (-1,))),
    _kernel(r"(^|/)(q|k|kv|qkv)_einsum/w$", ((-2,), (-3, -1))),
    *DEFAULT_RULES,  # feed-forward layers and experts, [E, in, out], are plain
)

NAMED_RULES = frozenset({*DEFAULT_RULES, *MAXTEXT_RULES, *TUNIX_RULES})  # no model has use for all of them


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the rules say of one leaf; `rule` is None where none speaks of it."""

    rule: Rule | None
    quantize: bool
    recipe: Recipe
    matrix: Matrix


def decide(path: str, ndim: int, is_float: bool, rules: Sequence[Rule], recipe: Recipe) -> Decision:
    """Applies the rules to one leaf.

    Args:
        path: the leaf's path.
        ndim: its number of axes.
        is_float: whether its dtype is a floating-point one.
        rules: in order; the first match wins.
        recipe: for leaves whose rule names none.
    """
    for rule in rules:
        if rule.matches(path, ndim):
            return Decision(rule, rule.quantize, rule.recipe or recipe, rule.matrix or DEFAULT_MATRIX)
    return Decision(None, is_float and ndim >= 2, recipe, DEFAULT_MATRIX)
