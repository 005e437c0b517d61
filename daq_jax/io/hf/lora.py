"""The tensors of a PEFT LoRA adapter, and what each of them changes in a base.

| tensor of the adapter, after `base_model.model.` | changes in the base |
|---|---|
| `<module>.lora_A.weight` `[r, in]`, `..._B.weight` `[out, r]` | `<module>.weight` by `scale * B A` |
| `<module>.lora_embedding_A` `[r, tokens]`, `..._B` `[width, r]` | `<module>.weight` by `scale * (B A)^T` |
| `<module>.lora_B.bias` `[out]` | `<module>.bias` by `scale * bias` |
| the first row, with A `[E r, in]` and B `[out, r E]` | a stack of `E` experts under `<module>` |
| any other name that `modules_to_save` or `bias` speaks of | replaces that tensor |

Of a stack of experts (`target_parameters`), rows `e r` to `(e + 1) r` of A belong to expert `e`, and columns
`e`, `e + E`, `e + 2 E`, ... of B. Two parameters of one module are wrapped one around the other
(`.base_layer`), in an order that only shapes tell. The base may hold the same experts matrix by matrix.

A weight is `[..., out, in]` here, as `Folder` gives it. Sums are made in float64 and rounded once, to
float32: they do not depend on the bands that a weight is read in.

Source: `get_peft_model_state_dict` and `ParamWrapper.get_delta_weight` of peft 0.21.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

from daq_jax.errors import DaqError
from daq_jax.io.hf.tensor_files import TensorReader

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.(?P<part>weight|bias)$")
_TABLE = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.default)?$")
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)|\.modules_to_save(\.default)?(?=\.|$)")
_FLOATS = ("BF16", "F16", "F32")
_AT_A_TIME = 2**20  # elements of a sum in float64: 8 MB


@dataclasses.dataclass
class Module:
    """The tensors of one adapted module, by what they are.

    Attributes:
        name: of the module in the model that was trained, without the names of wrappers.
        tensors: name in the file by "A", "B" or "bias".
        table: whether the module is an embedding.
    """

    name: str
    tensors: dict[str, str]
    table: bool


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an adapter's file holds.

    Attributes:
        modules: adapted modules.
        whole: name in the file, of each tensor that replaces one of the base, by the name of that one.
        problems: tensors that belong to no kind that is read, and why.
    """

    modules: list[Module]
    whole: dict[str, str]
    problems: list[str]


def sort_tensors(reader: TensorReader) -> Contents:
    """Sorts the tensors of an adapter's file by what they are, from their names and dtypes."""
    modules: dict[str, Module] = {}
    contents = Contents([], {}, [])
    for stored, entry in reader.entries.items():
        name = stored.removeprefix(_PREFIX)
        found, table = _FACTOR.match(name), _TABLE.match(name)
        if entry.spec.dtype not in _FLOATS:
            contents.problems.append(f"{stored!r} is {entry.spec.dtype}; needed {', '.join(_FLOATS)}")
        elif found is None and table is None and "lora_" in name:
            contents.problems.append(f"{stored!r} is of a kind that is not read (DoRA is one)")
        elif match := found or table:
            raw, part = match["module"], "bias" if found and found["part"] == "bias" else match["side"]
            module = modules.setdefault(raw, Module(_WRAPPED.sub("", raw), {}, table is not None))
            module.tensors[part] = stored
        else:
            contents.whole[_WRAPPED.sub("", name)] = stored
    for module in modules.values():
        missing = {"A", "B"} - module.tensors.keys()
        if missing:
            contents.problems.append(f"{module.name!r} has no lora_{min(missing)}")
        else:
            contents.modules.append(module)
    return contents


class Change:
    """What an adapter does to one tensor of a base; reading it is safe from several threads."""

    def add_to(
        self, weight: Float32[np.ndarray, "rows *rest"], first: int
    ) -> Float32[np.ndarray, "rows *rest"]:
        """The tensor after tuning.

        Args:
            weight: rows of the first axis of the tensor of the base.
            first: number of the first of these rows.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Replaced(Change):
    """A tensor that the adapter holds whole."""

    reader: TensorReader
    name: str

    def add_to(self, weight: np.ndarray, first: int) -> np.ndarray:
        """See `Change.add_to`."""
        if not weight.ndim:
            return self.reader.read(self.name).astype(np.float32)
        return self.reader.read(self.name, slice(first, first + len(weight))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class AddedBias(Change):
    """A bias to which the adapter adds `scale` times its own."""

    reader: TensorReader
    name: str
    scale: float

    def add_to(self, weight: np.ndarray, first: int) -> np.ndarray:
        """See `Change.add_to`."""
        own = self.reader.read(self.name, slice(first, first + len(weight))).astype(np.float64)
        return (weight + self.scale * own).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Both(Change):
    """One change after another: an embedding's base, which peft stores too, and what LoRA adds to it."""

    first: Change
    second: Change

    def add_to(self, weight: np.ndarray, first: int) -> np.ndarray:
        """See `Change.add_to`."""
        return self.second.add_to(self.first.add_to(weight, first), first)


Orientation = Literal["out_in", "in_out"]


@dataclasses.dataclass(frozen=True)
class LowRank(Change):
    """A matrix, or a stack of them, to which the adapter adds `scale * B A`.

    Attributes:
        reader: file of the adapter.
        a: name of A, `[E r, in]`.
        b: name of B, `[out, r E]`.
        scale: factor of the product.
        experts: number of matrices `E` whose factors A and B hold; 1 for those of a linear layer.
        expert: number of the matrix that the tensor is; None if it is the whole stack.
        first_row: row of `B A` that is the first row of the tensor.
        step: rows of `B A` from one row of the tensor to the next.
        way: whether the tensor is `B A` ("out_in") or its transpose ("in_out").
    """

    reader: TensorReader
    a: str
    b: str
    scale: float
    experts: int = 1
    expert: int | None = None
    first_row: int = 0
    step: int = 1
    way: Orientation = "out_in"

    def add_to(self, weight: np.ndarray, first: int) -> np.ndarray:
        """See `Change.add_to`."""
        if self.expert is None and self.experts > 1:
            stack = [self._sum(w, first + i, 0) for i, w in enumerate(weight)]
            return np.stack(stack) if stack else weight
        return self._sum(weight, self.expert or 0, first)

    def _sum(self, weight: np.ndarray, expert: int, first: int) -> np.ndarray:
        """Rows of one matrix after tuning."""
        left, right = self._factors(expert)
        left = left[self.first_row :: self.step][first : first + len(weight)]
        tuned = np.empty(weight.shape, np.float32)
        rows = max(1, _AT_A_TIME // max(weight.shape[1], 1))
        for i in range(0, len(weight), rows):
            some = slice(i, i + rows)
            tuned[some] = weight[some] + self.scale * (left[some] @ right)
        return tuned

    def _factors(self, expert: int) -> tuple[Float64[np.ndarray, "rows r"], Float64[np.ndarray, "r columns"]]:
        """The two factors of the change of one matrix."""
        rank = self.reader.entries[self.a].spec.shape[0] // self.experts
        a = self.reader.read(self.a, slice(expert * rank, (expert + 1) * rank)).astype(np.float64)
        b = _whole(self.reader, self.b)[:, expert :: self.experts].astype(np.float64)
        return (b, a) if self.way == "out_in" else (a.T, b.T)


@functools.lru_cache(maxsize=4)
def _whole(reader: TensorReader, name: str) -> np.ndarray:
    """A tensor of the adapter; the B of a stack of experts is asked for once for each of them."""
    return reader.read(name)


def fits(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], experts: int) -> list[Orientation]:
    """The ways in which factors give a matrix of a shape `[out, in]`; none if they do not."""
    if len(a) != 2 or len(b) != 2 or not a[0] or a[0] != b[1] or a[0] % experts:
        return []
    ways: dict[Orientation, tuple[int, int]] = {"out_in": (b[0], a[1]), "in_out": (a[1], b[0])}
    return [way for way, made in ways.items() if made == tuple(shape[-2:])]


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor of the base that a module's factors may belong to.

    Attributes:
        name: of the tensor.
        shape: of the tensor, `[..., out, in]`.
        experts: number of matrices whose factors the module holds.
        expert: number of the matrix that the tensor is; None for all.
        first_row: row of the module's product that is the first row of the tensor.
        step: rows of the product from one row of the tensor to the next.
        rows: rows of the module's product.
    """

    name: str
    shape: tuple[int, ...]
    experts: int = 1
    expert: int | None = None
    first_row: int = 0
    step: int = 1
    rows: int = 0


_GATE_UP_DOWN = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def places_of(
    module: Module, shapes: Mapping[str, tuple[int, ...]], alternate: bool = False
) -> list[list[Place]]:
    """The parameters of a base that a module may have adapted, each as the tensors that hold it.

    Args:
        module: of the adapter, by its name in the base.
        shapes: shape of each tensor of the base, `[..., out, in]`.
        alternate: whether rows of gate and up alternate in the stacks of the model.
    """
    own = f"{module.name}.weight"
    if own in shapes:
        return [[Place(own, shapes[own])]] if len(shapes[own]) == 2 else []
    stacks = [f"{module.name}.gate_up_proj", f"{module.name}.down_proj"]
    found = [
        [Place(n, shapes[n], shapes[n][0])] for n in stacks if len(shapes.get(n, ())) == 3 and shapes[n][0]
    ]
    return found or _single_experts(module.name, shapes, alternate)


def _single_experts(module: str, shapes: Mapping[str, tuple[int, ...]], alternate: bool) -> list[list[Place]]:
    """The experts of a module that the base holds one by one: gate and up as one parameter, then down."""
    for gate, up, down in _GATE_UP_DOWN:
        count = 0
        while f"{module}.{count}.{gate}.weight" in shapes:
            count += 1
        names = {x: [f"{module}.{e}.{x}.weight" for e in range(count)] for x in (gate, up, down)}
        if not count or any(len(shapes.get(n, ())) != 2 for group in names.values() for n in group):
            continue
        half = shapes[names[gate][0]][0]
        second, step = (1, 2) if alternate else (half, 1)
        fused = [(n, e, 0, step) for e, n in enumerate(names[gate])] + [
            (n, e, second, step) for e, n in enumerate(names[up])
        ]
        alone = [(n, e, 0, 1) for e, n in enumerate(names[down])]
        rows = 2 * half, shapes[names[down][0]][0]
        return [
            [Place(n, shapes[n], count, e, row, every, total) for n, e, row, every in group]
            for group, total in zip((fused, alone), rows, strict=True)
        ]
    return []


def check_finite(tuned: np.ndarray, name: str) -> np.ndarray:
    """The array, if all of it is finite.

    Raises:
        DaqError: naming the tensor.
    """
    if not np.isfinite(tuned).all():
        raise DaqError(f"tensor {name!r} holds NaN or infinity in the base or in the adapter; mend it.")
    return tuned
