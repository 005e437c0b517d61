"""A folder whose weights have other names than those of another folder of the model, seen by the other names.

transformers renames weights as it loads and saves them, so two folders of one model may differ in a prefix,
or in whether experts are fused into stacks. Only what is unambiguous is paired: one tensor of a folder for
one of the other, of the same shape.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from daq_jax.io.hf.architectures import interleaves_experts
from daq_jax.io.hf.folders import Folder, Tensor
from daq_jax.io.hf.tensor_files import TensorSpec, in_chunks
from daq_jax.qtensor import QTensor

# What transformers puts before the names of a model of text, inside another model or alone.
_PREFIX = re.compile(r"^(model\.|transformer\.)?(language_model\.(model\.)?)?")
_SINGLE = re.compile(
    r"(?P<stem>(.*\.)?experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.(?P<kind>weight|bias)"
)
_STACK = re.compile(r"(?P<stem>(.*\.)?experts)\.(?P<part>gate_up_proj|down_proj)(?P<bias>_bias)?")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """A tensor by another name."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, folder: Folder, band: slice, dtype: np.dtype | None) -> np.ndarray | QTensor:
        return folder.read(self.name, band, dtype)


@dataclasses.dataclass(frozen=True)
class _OfStack:
    """The matrix or bias of one expert, or some rows of it, from a stack."""

    name: str
    expert: int
    rows: slice

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, folder: Folder, band: slice, dtype: np.dtype | None) -> np.ndarray | QTensor:
        stack = folder.read(self.name, slice(self.expert, self.expert + 1), dtype)
        assert isinstance(stack, np.ndarray)
        return np.ascontiguousarray(stack[0, self.rows][band])


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """A stack made of matrices or biases of single experts.

    Attributes:
        experts: for each expert the names of those on top of each other.
        alternate: whether their rows alternate instead.
    """

    experts: tuple[tuple[str, ...], ...]
    alternate: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for parts in self.experts for name in parts)

    def read(self, folder: Folder, band: slice, dtype: np.dtype | None) -> np.ndarray | QTensor:
        return np.stack([self._rows([np.asarray(folder.read(n)) for n in e]) for e in self.experts[band]])

    def _rows(self, parts: list[np.ndarray]) -> np.ndarray:
        if not self.alternate:
            return np.concatenate(parts)
        return np.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


# Where the values of a tensor come from in a folder: `names` are read, `read` is as `Folder.read`.
_Source = _Renamed | _OfStack | _Stacked


class PairedFolder(Folder):
    """A folder by the names of another; what has one name in both keeps it. `close` leaves it open."""

    def __init__(self, folder: Folder, sources: Mapping[str, tuple[_Source, Tensor]]) -> None:
        self.path, self.config, self.dtype, self.files = (
            folder.path,
            folder.config,
            folder.dtype,
            folder.files,
        )
        self.working_dtype, self.beside, self.overlay = folder.working_dtype, folder.beside, folder.overlay
        self._folder, self._sources = folder, {name: source for name, (source, _) in sources.items()}
        used = _wholly_used(folder, self._sources.values())
        self.tensors = {name: tensor for name, tensor in folder.tensors.items() if name not in used}
        self.tensors |= {name: tensor for name, (_, tensor) in sources.items()}

    def read(
        self, name: str, band: slice = slice(None), dtype: np.dtype | None = None
    ) -> np.ndarray | QTensor:
        """See `Folder.read`."""
        source = self._sources.get(name)
        if source is None:
            return self._folder.read(name, band, dtype)
        return source.read(self._folder, band, dtype)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """See `Folder.chunks`."""
        source = self._sources.get(name)
        if source is None or isinstance(source, _Renamed):
            yield from self._folder.chunks(name if source is None else source.name)
            return
        length = self.tensors[name].shape[0]
        step = 1 if isinstance(source, _Stacked) else length
        yield from in_chunks(self._array(name, slice(i, i + step)) for i in range(0, length, step))

    def _array(self, name: str, band: slice) -> np.ndarray:
        found = self.read(name, band)
        assert isinstance(found, np.ndarray)  # neither a stack nor an expert of one is paired with codes
        return found

    def close(self) -> None:
        """Does nothing: the folder stays open."""


def paired(folder: Folder, other: Folder) -> tuple[Folder, dict[str, str]]:
    """A folder by the names of another folder of the model, as far as these can be told without a guess.

    Args:
        folder: folder that is to be read, such as a base.
        other: folder whose names are wanted, such as the tuned model.

    Returns:
        The folder, seen by the names of the other, and for each tensor of another name that name in the
        folder, of a stack that is made from single experts the name of its first. The folder itself and
        nothing if all names agree, or if one of its tensors would have two partners.
    """
    missing = [name for name in other.tensors if name not in folder.tensors]
    if not missing:
        return folder, {}
    prefixes = _own_prefix(folder.config), _own_prefix(other.config)
    free = [name for name in folder.tensors if name not in other.tensors]
    there = _unique(free, prefixes[0])
    wanted = _unique(missing, prefixes[1])
    alternate = any(map(_alternates, (folder, other)))
    found: dict[str, tuple[_Source, Tensor]] = {}
    for plain, name in wanted.items():
        source = _source_of(plain, there, folder, alternate)
        if source is None:
            continue
        tensor = _as_read(source, folder, name, other.tensors[name].shape)
        if tensor is not None:
            found[name] = source, tensor
    uses = collections.Counter(str(part) for source, _ in found.values() for part in _uses(source))
    if not found or max(uses.values()) > 1:
        return folder, {}
    return PairedFolder(folder, found), {name: source.names[0] for name, (source, _) in found.items()}


def _uses(source: _Source) -> list[Any]:
    """The parts of a folder that a source reads."""
    return [source] if isinstance(source, _OfStack) else list(source.names)


def _wholly_used(folder: Folder, sources: Iterable[_Source]) -> set[str]:
    """Tensors of a folder all of whose rows some source reads, each source other rows."""
    used: set[str] = set()
    rows = collections.Counter[str]()
    for source in sources:
        if isinstance(source, _OfStack):
            rows[source.name] += _count(source.rows)
        else:
            used.update(source.names)
    return used | {name for name, n in rows.items() if n == math.prod(folder.tensors[name].shape[:2])}


def _own_prefix(config: Mapping[str, Any]) -> re.Pattern[str]:
    """What a model with a head puts before the names of the model without one: often its type."""
    kind = config.get("model_type")
    words = {kind, *re.split(r"[-_]", kind)} if isinstance(kind, str) and kind else set[str]()
    return re.compile(rf"^({'|'.join(map(re.escape, sorted(words))) or '(?!)'})\.")


def _unique(names: list[str], own: re.Pattern[str]) -> dict[str, str]:
    """Names by what is left of them without prefixes, where only one name leaves it."""
    plain = {name: own.sub("", _PREFIX.sub("", name)) for name in names}
    counts = collections.Counter(plain.values())
    return {short: name for name, short in plain.items() if counts[short] == 1}


def _source_of(plain: str, there: Mapping[str, str], folder: Folder, alternate: bool) -> _Source | None:
    """Where a tensor of another folder is in this one, by its name without prefixes."""
    if plain in there:
        return _Renamed(there[plain])
    if stack := _STACK.fullmatch(plain):
        return _stacked(stack, there, folder, alternate)
    single = _SINGLE.fullmatch(plain)
    return None if single is None else _of_stack(single, there, folder, alternate)


def _alternates(folder: Folder) -> bool:
    """Whether rows of gate and up alternate in stacks, by the type of the model or by blocks of gpt-oss."""
    blocks = (t.coding.codes.endswith("_blocks") for t in folder.tensors.values() if t.coding)
    return interleaves_experts(folder.config) or any(blocks)


def _stacked(
    stack: re.Match[str], there: Mapping[str, str], folder: Folder, alternate: bool
) -> _Source | None:
    experts: list[tuple[str, ...]] = []
    stem, parts, kind = stack["stem"], _PARTS[stack["part"]], "bias" if stack["bias"] else "weight"
    while all(names := [there.get(f"{stem}.{len(experts)}.{part}.{kind}", "") for part in parts]):
        experts.append(tuple(names))
    tensors = [folder.tensors[name] for parts_of_one in experts for name in parts_of_one]
    alike = {(t.spec.dtype, t.coding is None, t.shape) for t in tensors}
    fits = len(alike) == 1 and tensors[0].coding is None
    return _Stacked(tuple(experts), alternate and len(parts) > 1) if fits else None


def _of_stack(
    single: re.Match[str], there: Mapping[str, str], folder: Folder, alternate: bool
) -> _Source | None:
    part = "down_proj" if single["part"] == "down_proj" else "gate_up_proj"
    axes, end = (2, "_bias") if single["kind"] == "bias" else (3, "")
    name = there.get(f"{single['stem']}.{part}{end}")
    tensor = folder.tensors.get(name or "")
    expert = int(single["expert"])
    if name is None or tensor is None or tensor.coding or len(tensor.shape) != axes:
        return None
    if expert >= tensor.shape[0]:
        return None
    parts, rows = _PARTS[part], tensor.shape[1]
    half, index = rows // len(parts), parts.index(single["part"])
    which = slice(index, rows, len(parts)) if alternate else slice(index * half, (index + 1) * half)
    return _OfStack(name, expert, which)


def _count(rows: slice) -> int:
    return len(range(rows.start, rows.stop, rows.step or 1))


def _as_read(source: _Source, folder: Folder, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor of a folder as it is read by the name of the other folder; None if it has another shape."""
    tensor = folder.tensors[source.names[0]]
    if isinstance(source, _Renamed):
        return dataclasses.replace(tensor, name=name) if tensor.shape == shape else None
    if isinstance(source, _OfStack):
        found = (_count(source.rows), *tensor.shape[2:])
    else:
        found = (len(source.experts), len(source.experts[0]) * tensor.shape[0], *tensor.shape[1:])
    spec = TensorSpec(tensor.spec.dtype, shape)
    plain = dataclasses.replace(tensor, name=name, spec=spec, copied=None, turned=False)
    return plain if found == shape else None
