"""Rules by name and from files, for the command.

A file of rules is TOML. Its rules are tried in order, and the set of `then` comes after them:

    then = "maxtext"

    [[rule]]
    keep = "vision_tower"

    [[rule]]
    use = "mixer/out/kernel$"
    matrix = [[-3, -2], [-1]]
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daq_jax.errors import DaqError
from daq_jax.rules.rule import Rule, keep, use
from daq_jax.rules.sets import DEFAULT_RULES, GEMMA_RULES, HF_RULES, KERAS_RULES, MAXTEXT_RULES, TUNIX_RULES

RULE_SETS: dict[str, Sequence[Rule]] = {
    "default": DEFAULT_RULES,
    "maxtext": MAXTEXT_RULES,
    "tunix": TUNIX_RULES,
    "gemma": GEMMA_RULES,
    "hf": HF_RULES,
    "keras": KERAS_RULES,
}


def rules_called(name: str) -> Sequence[Rule]:
    """The rules of a set, by its name in lower case without `_RULES`, or those of a file.

    Args:
        name: "default", "maxtext", "tunix", "gemma", "hf", "keras", or the path of a file.

    Raises:
        DaqError: if there is no such set or file, or naming the entry of the file that makes no rule.
    """
    if name in RULE_SETS:
        return RULE_SETS[name]
    try:
        said = tomllib.loads(Path(name).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DaqError(f"--rules {name}: needed one of {', '.join(RULE_SETS)}, or a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise DaqError(f"{name}: is no TOML: {error}.") from error
    then = said.pop("then", "default")
    entries = said.pop("rule", [])
    if then not in RULE_SETS or said or not isinstance(entries, list):
        raise DaqError(
            f"{name}: got {[*said] or then!r}; needed tables [[rule]], and `then` as one of "
            f"{', '.join(RULE_SETS)}."
        )
    return [*(_rule(name, i, entry) for i, entry in enumerate(entries, 1)), *RULE_SETS[then]]


def _rule(file: str, number: int, entry: Any) -> Rule:
    try:
        match entry:
            case {"keep": str(pattern), **others} if not others:
                return keep(pattern)
            case {"use": str(pattern), "matrix": [[*rows], [*columns]], **others} if not others:
                return use(pattern, matrix=(tuple(map(int, rows)), tuple(map(int, columns))))
            case {"use": str(pattern), **others} if not others:
                return use(pattern)
    except ValueError as error:  # a DaqError, or an axis that is no number
        raise DaqError(f"{file}: rule {number}: {error}") from error
    raise DaqError(
        f"{file}: rule {number} is {entry!r}; needed `keep` with a pattern, or `use` with a pattern and "
        "maybe `matrix = [[input axes], [output axes]]`."
    )
