"""Which tensors of a tuned model stay as they are, and why.

A matrix is no linear layer by its name, or by a size: embeddings and heads have one row or column for each
word, routers one row for each expert. Others are kept as the user says, or as the layout cannot store them.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from daq_jax.errors import DaqError, refuse
from daq_jax.io.hf.architectures import LINEAR, parts_experts, role_of, turns_linear_layers
from daq_jax.io.hf.folders import Folder, Tensor
from daq_jax.io.hf.layouts import Layout
from daq_jax.io.hf.orientation import turned_layers
from daq_jax.io.hf.weight_names import fused_with, is_matrix
from daq_jax.rules import DEFAULT_RULES, first_match

BY_NAME = "embedding, norm, head or router"
TOWER = "in a vision or audio tower, or a projector"
_TOWERS = re.compile(
    r"(^|\.)(vision_\w+|visual|image_(encoder|model|tower|vit)|img_processor|vpm|vit|audio_\w+|speech_\w+"
    r"|sound_\w+|(multi_?modal|mm)_\w*projector|\w*_projector|projector|connector|aligner|resampler"
    r"|embed_(vision|audio)|vision|audio|clip|whisper|sam(_model)?|eva|vq_?model|q_?former|perceiver(_\w+)?"
    r"|\w*mm_encoder|patch_merger|img_encoder)\."
)
# Embeddings and heads outside of the layers, of T5, BERT, Whisper and others.
_OF_WORDS = re.compile(
    r"(^|\.)(shared|\w*vocab\w*|\w*logits?|predictions\.decoder|head\.decoder|generator|proj_out"
    r"|(word|tok|token)_\w+)\.weight$"
)
_ROUTERS = re.compile(
    r"(^|\.)((gate|gating|switch)(\.(linear|layer|classifier))?|wg|\w*expert\w*_gate)\.weight$"
)
_TABLE = re.compile(r"(^|[._])(embed_tokens|wte|word_embeddings|tok_embeddings|embedding)\.weight$")
_WORDS = ("vocab_size", "padded_vocab_size", "text_vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
_LAYER = re.compile(r"\.\d+\.")  # of a model, which repeats its layers and neither embedding nor head
_LINEAR = re.compile(r"(proj|\.qkv|\.dense|\.fc\d?|\.w\d|\.experts\.\d+\.\w+)\.weight$")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which weights a user wants quantized.

    Attributes:
        keep: patterns of names of weights that stay as they are.
        only: patterns of names of the only weights that are quantized; empty for all. A tower or a projector
            is quantized where such a pattern names it.

    A pattern is a regular expression, found anywhere in a name; after "re:", as llm-compressor has it, one
    that matches from the beginning of a name.

    Raises:
        DaqError: if a pattern is no regular expression.
    """

    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, patterns in (("keep", self.keep), ("only", self.only)):
            for pattern in patterns:
                try:
                    re.compile(_regex(pattern))
                except re.error as error:
                    raise DaqError(
                        f"`{option}`: {pattern!r} is not a regular expression: {error}."
                    ) from error

    @property
    def is_made(self) -> bool:
        """Whether there is a pattern."""
        return bool(self.keep or self.only)

    def names(self, name: str) -> bool:
        """Whether `only` asks for a weight by its name."""
        return any(re.search(_regex(p), name) for p in self.only)

    def why_kept(self, name: str) -> str:
        """Why a weight is kept by choice; "" if it is not."""
        found = next((p for p in self.keep if re.search(_regex(p), name)), None)
        if found is not None:
            return f"by --keep: {found}"
        return "not named by --only" if self.only and not self.names(name) else ""

    def refuse_idle(self, folder: Folder) -> None:
        """Refuses patterns that name no weight, which are probably misspelt.

        Raises:
            DaqError: naming each such pattern.
        """
        names = [name for name, tensor in folder.tensors.items() if is_matrix(name, len(tensor.shape))]
        patterns = [("--keep", p) for p in self.keep] + [("--only", p) for p in self.only]
        idle = [f"{o} {p!r}" for o, p in patterns if not any(re.search(_regex(p), n) for n in names)]
        if idle:
            example = f"A name of a weight is {names[0]!r}." if names else ""
            refuse(f"{folder.path}: patterns that match no weight", idle, example, one_line=True)


ALL = Choice()


def _regex(pattern: str) -> str:
    return rf"\A(?:{pattern.removeprefix('re:')})" if pattern.startswith("re:") else pattern


def patterns_of(option: str, given: Any) -> tuple[str, ...]:
    """Patterns as a tuple.

    Raises:
        DaqError: if they are no sequence of strings; a string alone is none.
    """
    if isinstance(given, str) or not all(isinstance(p, str) for p in given):
        raise DaqError(f"`{option}` must be a sequence of patterns, such as [{str(given)!r}]; got {given!r}.")
    return tuple(given)


def kept_of(tuned: Folder, layout: Layout, tp: int, choice: Choice) -> dict[str, str]:
    """Tensors that stay as they are, and why.

    Args:
        tuned: folder of the tuned model.
        layout: how quantized weights are stored.
        tp: number of devices over which a server divides each weight.
        choice: which weights the user wants quantized.
    """
    choice.refuse_idle(tuned)
    why = _Reasons(tuned, layout, tp, choice)
    own = {name: why.of(tensor) for name, tensor in tuned.tensors.items()}
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, tensor in tuned.tensors.items():
        if is_matrix(name, len(tensor.shape)):
            groups[fused_with(name)].append(name)
    kept = {name: reason for name, reason in own.items() if reason}
    for names in groups.values():
        at_fault = next((n for n in names if own[n]), None)
        if at_fault is not None:
            kept |= {n: own[n] or f"servers fuse it with a weight that is kept: {at_fault}" for n in names}
    return kept


def refuse_parted_experts(tuned: Folder, layout: Layout) -> None:
    """Refuses a layout in which transformers would look for experts by other names than they are stored by.

    Raises:
        DaqError: of Llama 4 in a layout of compressed-tensors. Its experts stay as they are, fused, and the
            loader of transformers 5.24 takes them apart in the model, but not in the file.
    """
    if layout.config([]).get("quant_method") != "compressed-tensors" or not parts_experts(tuned.config):
        return
    if name := next((n for n, tensor in tuned.tensors.items() if tensor.turned), ""):
        raise DaqError(
            f"{tuned.path}: {name!r} stays fused, and transformers looks for single experts where Llama 4 "
            f"has --format {layout.name}, so it would load noise; use --format fp8-block."
        )


class _Reasons:
    """Why single tensors of a folder are kept."""

    def __init__(self, tuned: Folder, layout: Layout, tp: int, choice: Choice) -> None:
        self._config, self._layout, self._tp, self._choice = tuned.config, layout, tp, choice
        self._turned = turned_layers({n: t.spec for n, t in tuned.tensors.items() if t.coding is None})
        matrices = [n for n, t in tuned.tensors.items() if is_matrix(n, len(t.shape))]
        towers = {n for n in matrices if _TOWERS.search(n)}
        # A model that is all tower, or a tower beside nothing but embeddings, is quantized as such.
        self._towers = towers if any(_LAYER.search(n) for n in matrices if n not in towers) else set()
        tables = [tuned.tensors[n].shape[0] for n in matrices if _TABLE.search(n)]
        self._words = sizes(tuned.config, _WORDS) | {*tables}
        self._experts = sizes(tuned.config, _EXPERTS)

    def of(self, tensor: Tensor) -> str:
        """Why a tensor is kept; "" if it is not."""
        name, shape = tensor.name, tensor.shape
        if not is_matrix(name, len(shape)):
            return "not the weight of a linear layer"
        if turns_linear_layers(self._config) or name in self._turned:
            return "stored [in, out], which servers do not read quantized"
        if 0 in shape:
            return "empty"
        if self._layout.only_experts and not tensor.turned:
            return f"no experts, which alone are quantized in {self._layout.name}"
        if tensor.turned and not self._layout.only_experts:
            return "experts stored [in, out], which servers do not read quantized"
        if why := self._role(name, shape) or self._choice.why_kept(name):
            return why
        if self._layout.plain and re.search(self._layout.plain, name):
            return f"not quantized in models of type {self._layout.model_type}"
        heads = self._config.get("num_key_value_heads")
        return self._layout.of(name).why_not(
            name, shape, self._tp, heads if type(heads) is int and heads > 0 else None
        )

    def _role(self, name: str, shape: Sequence[int]) -> str:
        """What a matrix is, where it is not a linear layer that is quantized."""
        if name in self._towers and not self._choice.names(name):
            return TOWER
        if known := role_of(self._config, name):
            return "" if known in LINEAR else f"{known}, by its class in transformers"
        rule = first_match(name, len(shape), DEFAULT_RULES)
        outside = not _LAYER.search(f".{name}")
        if (rule and not rule.quantize) or _ROUTERS.search(name) or (outside and _OF_WORDS.search(name)):
            return BY_NAME
        if len(shape) == 2 and outside and self._words & {*shape}:
            return f"embedding or head: {max(self._words & {*shape})} rows or columns are its words"
        if len(shape) == 2 and shape[0] in self._experts and not _LINEAR.search(name):
            return f"router: {shape[0]} rows are its experts"
        return "one output" if len(shape) == 2 and shape[0] == 1 else ""


def sizes(config: Mapping[str, Any], keys: Sequence[str]) -> set[int]:
    """The numbers above 1 that a config, or a config inside it, has under any of some keys."""
    return {n for n in _values(config, keys) if type(n) is int and n > 1}


def _values(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[Any]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _values(value, keys)
        elif key in keys:
            yield value
