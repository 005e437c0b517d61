"""`adapter_config.json` of a PEFT adapter: which kinds of adapter are read, and the factor of each module.

A LoRA adapter adds `scale * B A` to a weight, with `scale = alpha / r`, or `alpha / sqrt(r)` under
`use_rslora`. `rank_pattern` and `alpha_pattern` give modules an `r` and an `alpha` of their own. All that
would make the sum another one (DoRA, an initialization that changes the base, repeated layers) is refused by
name.

Source: `LoraConfig` and `get_pattern_key` of peft 0.21.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daq_jax.errors import DaqError, refuse
from daq_jax.io.hf.tensor_files import read_json

CONFIG = "adapter_config.json"
_WAY_OUT = "Merge the adapter into its base with peft and pass the merged folder."
# Keys that say how the adapter was trained or where it came from, and nothing of what it adds.
_HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_rslora",
    }
)
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # initializations that leave the base
_LONGEST = 200  # characters of a pattern
_COSTLY = re.compile(r"\)[*+{?]|\\\d")  # a repeated group, or a reference to one
_MOST_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What a config says of the change.

    Attributes:
        rank: rank of modules that no pattern names.
        alpha: numerator of the factor, of modules that no pattern names.
        rank_pattern: rank by pattern of the module's name.
        alpha_pattern: numerator by pattern of the module's name.
        by_root: whether the denominator is the root of the rank (rsLoRA).
        fan_in_fan_out: whether the weights of linear layers are stored `[in, out]`.
        saved: last name components of modules that the adapter holds whole.
        biases: whether the adapter holds biases.
        ties: whether an embedding's change holds for the head that is tied to it.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    by_root: bool
    fan_in_fan_out: bool
    saved: tuple[str, ...]
    biases: bool
    ties: bool

    def rank_of(self, module: str) -> int:
        """Rank of a module by its name in the model that was trained."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of `B A`."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.by_root else rank
        )


def read_lora_config(path: Path) -> LoraConfig:
    """The config of the adapter in a folder.

    Raises:
        DaqError: naming the file and each key that is wrong, or that makes it another kind of adapter.
    """
    found = read_json(path / CONFIG, "the adapter's config")
    kind = found.get("peft_type")
    if kind != "LORA":
        raise DaqError(f"{path / CONFIG}: an adapter of the kind {kind!r}; only LORA is read. {_WAY_OUT}")
    other = [f"{key} = {_short(value)}" for key, value in found.items() if _changes(key, value)]
    if other:
        refuse(f"{path / CONFIG}: not the plain LoRA that is read", other, _WAY_OUT, one_line=True)
    problems = _problems(found)
    if problems:
        refuse(f"{path / CONFIG}: cannot be used", problems, "Mend the file.", one_line=True)
    return LoraConfig(
        rank=found["r"],
        alpha=float(found["lora_alpha"]),
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern={p: float(x) for p, x in (found.get("alpha_pattern") or {}).items()},
        by_root=bool(found.get("use_rslora")),
        fan_in_fan_out=bool(found.get("fan_in_fan_out")),
        saved=tuple(str(x).rpartition(".")[2] for x in found.get("modules_to_save") or ()),
        biases=found.get("bias") not in (None, "none"),
        ties=bool(found.get("ensure_weight_tying")),
    )


def _changes(key: str, value: Any) -> bool:
    """Whether a key that is set makes the adapter another one than `base + scale * B A`."""
    if key == "init_lora_weights":
        return value not in _PLAIN_STARTS and not str(value).lower().startswith("eva")
    return key not in _HARMLESS and value not in (None, False, [], {}, "")


def _problems(found: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(found.get("r")):
        problems.append(f"r must be a whole number above 0; got {_short(found.get('r'))}")
    if not _is_number(found.get("lora_alpha")):
        problems.append(f"lora_alpha must be a finite number; got {_short(found.get('lora_alpha'))}")
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = found.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            problems.append(f"{key} must map patterns to numbers; got {_short(patterns)}")
        else:
            problems += [f"{key} has the pattern {_short(p)}: {why}" for p in patterns if (why := _bad(p))]
    saved = found.get("modules_to_save")
    if saved is not None and not isinstance(saved, list):
        problems.append(f"modules_to_save must be a list; got {_short(saved)}")
    if found.get("bias") not in (None, "none", "all", "lora_only"):
        problems.append(f"bias must be none, all or lora_only; got {_short(found.get('bias'))}")
    return problems


def _bad(pattern: str) -> str:
    """Why a pattern is not used: no regular expression, or one whose search may never end."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _LONGEST or repeats > _MOST_REPEATS or _COSTLY.search(pattern):
        return "a search for it could take too long; name the modules"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"no regular expression: {error}"
    return ""


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """As peft: the first pattern that is the module's name, or the end of it after a point."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), otherwise)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**20


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # which NaN and infinity are not


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
