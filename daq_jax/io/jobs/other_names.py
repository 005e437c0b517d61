"""Weights that a base has by other names than its tune: told, since no weight may be paired by a guess."""

import re
from collections.abc import Iterable, Mapping

_LAYER = re.compile(r"\w+\.\d+\..*")
_SINGLE = re.compile(r"experts\.\d+\.(\w+)\.weight$")
_FUSED = (
    " Experts one by one are paired with a stack of as many, by the names gate_proj, up_proj and down_proj, "
    "where those that are to be read by other names are not quantized."
)
_DOWN = ("down_proj", "w2")


def renamed(missing: Iterable[str], names: Iterable[str], whose: str) -> str:
    """A sentence on weights that are there by other names: a prefix, or experts fused or not; "" for none.

    Args:
        missing: names that one folder lacks.
        names: names that it has.
        whose: the folder that has them, as the sentence calls it.
    """
    by_tail: Mapping[str, str] = {tail: name for name in reversed([*names]) if (tail := _tail(name))}
    for name in missing:
        there = by_tail.get(_tail(name))
        if there is not None and there != name:
            return (
                f"Names differ: {whose} has {name!r} as {there!r}. Load and save both with one version of "
                "transformers, which renames weights as it loads them."
            ) + (_FUSED if bool(_SINGLE.search(name)) != bool(_SINGLE.search(there)) else "")
    return ""


def _tail(name: str) -> str:
    """A name without its prefix, of an expert that of its stack; "" for a name outside of layers."""
    stack = _SINGLE.sub(lambda m: f"experts.{'down_proj' if m[1] in _DOWN else 'gate_up_proj'}", name)
    found = _LAYER.search(stack)
    return found[0] if found else ""
