"""Leaves whose names and shapes leave two matrix views: what is said of them before a model is quantized.

A wrong view raises no error: codes and scales come out, and the model runs on them. So whatever speaks
against the view that was taken is said, unless the caller, a type or the leaves beside it told the axes.
"""

import collections
import math
import re
from collections.abc import Mapping

from daq_jax.rules.decisions import Decision
from daq_jax.rules.shapes import Shapes, gates, own_axes

_OF_EXPERTS = r"(?i)router|expert"  # a vector with a number for each expert is as long as their stack
_MANY = 16  # matrices for each row of one, above which a leaf looks like heads taken for a stack

# Names that only one kind of tree has, and the rules for it.
_FAMILIES = {
    "MAXTEXT_RULES": r"decoder/(\w+/)*(self_attention|mlp|moe_block|MoeBlock_0)/(\w+/)*(query|wi_0|wo|out)\b",
    "TUNIX_RULES": r"[qkvo]_proj/w(/value)?$",
    "GEMMA_RULES": r"_einsum(/w)?$",
    "KERAS_RULES": r"attention_output/kernel$",
    "HF_RULES": r"[./](q_proj|o_proj|c_attn|up_proj|down_proj|query|dense|fc\d|lin\d)[./]weight$",
}


def family_of(paths: Mapping[str, object]) -> str:
    """The name of the rule set for trees with such paths; empty if no set is known for them."""
    counts = {name: sum(bool(re.search(p, path)) for path in paths) for name, p in _FAMILIES.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""


def doubts(shapes: Shapes, decisions: Mapping[str, Decision]) -> dict[str, str]:
    """What speaks against the views that were taken, by path.

    Args:
        shapes: of the floating-point leaves of a tree.
        decisions: for each leaf.
    """
    own, open_gates = own_axes(shapes), gates(shapes)
    features = {
        s[0] for path, s in shapes.items() if len(s) == 1 and s[0] > 1 and not re.search(_OF_EXPERTS, path)
    }
    found = {}
    for path, how in decisions.items():
        axes = own.get(path, ())
        if not how.quantize or how.is_sure or len(axes) < 2:
            continue
        first = shapes[path][axes[0]]
        if path in open_gates:
            found[path] = (
                "is [2, in, out] in some models and [2, out, in] in others, and no `linear` of another shape "
                "beside it tells which"
            )
        elif how.rule is None and re.search(r"(^|[./])weights?(/value)?$", path):
            found[path] = "is taken as [in, out], but most libraries that say `weight` store [out, in]"
        elif how.rule is None and len(axes) == 3 and first in features:
            found[path] = f"is taken as {first} matrices, but {first} is also the length of a vector"
        elif how.rule is None and len(axes) > 2 and len({shapes[path][a] for a in axes}) == 1:
            found[path] = f"is taken as matrices of {first} rows, but all its axes have the same length"
    return found | _mirrored(shapes, decisions, found)


def _mirrored(shapes: Shapes, decisions: Mapping[str, Decision], found: Mapping[str, str]) -> dict[str, str]:
    """Kernels `[heads, hd, D]`, beside doubtful ones `[D, heads, hd]`."""
    heads = collections.Counter((s[1:], s[0]) for p, s in shapes.items() if p in found and len(s) == 3)
    return {
        path: f"is taken as {shapes[path][0]} matrices; kernels of {shapes[path][:2]} heads lead out of heads"
        for path, how in decisions.items()
        if how.quantize and not how.is_sure and how.rule is None and len(shapes.get(path, ())) == 3
        if path not in found and (shapes[path][:2], shapes[path][2]) in heads
    }


def narrow(shapes: Shapes, decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Leaves that no rule knows, and that are taken as many matrices of few rows in each layer, by path."""
    own, found = own_axes(shapes), {}
    for path, how in decisions.items():
        shape = [shapes[path][a] for a in own.get(path, ())]
        *stack, rows, _ = shape if len(shape) > 2 else (1, 1)
        if how.quantize and how.rule is None and not how.is_sure and math.prod(stack) >= _MANY * rows:
            found[path] = f"is taken as {math.prod(stack)} matrices of {rows} rows, with scales of their own"
    return found
