"""What will be done with a pair of folders, decided from headers and configs before any weight is read.

A plan is data: the shards of the result, and for each shard its tensors with what becomes of each. A
`FolderStore` carries the plan out. All that can be known to fail is found here, for all tensors at once.
"""

import bisect
import collections
import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from daq_jax.errors import DaqError, refuse
from daq_jax.io.hf.bands import can_be_cut, rows_per_tile
from daq_jax.io.hf.codings import Coding
from daq_jax.io.hf.folders import Folder, Tensor
from daq_jax.io.hf.layouts import Layout
from daq_jax.io.hf.skip_lists import skip_list
from daq_jax.io.hf.tensor_files import TensorSpec, plan_file
from daq_jax.io.hf.weight_names import is_matrix
from daq_jax.io.jobs.factors import shared_factors
from daq_jax.io.jobs.keeping import ALL, Choice, kept_of, refuse_parted_experts
from daq_jax.io.jobs.leftovers import FLOATS, dropped_of, refuse_unread, unquantized
from daq_jax.io.jobs.memory import RUNTIME, Need, Room, need_of, peak_of, runtime_of, work_of
from daq_jax.io.jobs.options import MissingBase, in_layout
from daq_jax.io.jobs.other_names import renamed
from daq_jax.recipe import Recipe
from daq_jax.tilings import Tiling

_AT_ONCE = 2**22  # elements of a quantized tensor that is kept, which are dequantized at a time
# Bytes for each tensor, beside those for each letter of its name: specs, tasks, records and the report.
_EACH_TENSOR, _EACH_LETTER = 4500, 6
_COPIED = 3 * 2**24  # bytes of a tensor that is copied, 16 MiB at a time
_KEPT_EACH = 16  # bytes for each element of a quantized tensor that is kept, while it is dequantized
_KEPT_HELD = 85 * 10**6  # bytes that this leaves with the process
_LEAST = 50 * 10**6  # bytes of bands, however small: what threads keep of many small ones


@dataclasses.dataclass(frozen=True)
class Task:
    """One tensor of the result, and what becomes of it.

    Attributes:
        tuned: the tensor of the tuned model.
        base: the tensor of the base; None if the tensor is not quantized, or lacks a base and takes AbsMax.
        quantize: whether the tensor is quantized.
        why: why the tensor is kept, or "no base"; "" for a tensor that is quantized with its base.
        outputs: dtype and shape of each tensor that is written, by name.
        rows: length of a band of the first axis, the part that is worked on at a time.
        coding: how the tensor is stored if it is quantized; None if it is not.
        recipe: how the tensor is quantized, the format and the tiling of its coding put in.
        dtype: dtype that quantized inputs dequantize to.
        as_base: whether `coding` is that of the base, whose bytes are then kept where nothing changed.
        from_base: whether a tensor that stays as it is comes from the base.
    """

    tuned: Tensor
    base: Tensor | None
    quantize: bool
    why: str
    outputs: Mapping[str, TensorSpec]
    rows: int
    coding: Coding | None
    recipe: Recipe
    dtype: np.dtype
    as_base: bool = False
    from_base: bool = False

    @property
    def name(self) -> str:
        """Name of the tensor in the tuned model."""
        return self.tuned.name

    @property
    def bands(self) -> list[slice]:
        """Bands of the first axis that are worked on one after another."""
        n = self.tuned.shape[0] if self.tuned.shape else 1
        return [slice(i, min(i + self.rows, n)) for i in range(0, n, self.rows)]

    def nbytes_of(self, rows: slice) -> int:
        """Bytes of a band of the tuned tensor."""
        length = self.tuned.shape[0] if self.tuned.shape else 1
        return int(self.tuned.nbytes * (rows.stop - rows.start) / max(length, 1))

    def program(self, rows: slice) -> Hashable:
        """What a band has in common with the others that one compiled program does."""
        shape = rows.stop - rows.start, *self.tuned.shape[1:]
        return self.recipe, self.tuned.matrix, shape, self.dtype, self.base is None

    @property
    def most_elements(self) -> int:
        """Most elements that are worked on at a time."""
        return self.rows * math.prod(self.tuned.shape[1:])


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the result."""

    file: str
    tasks: tuple[Task, ...]

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """Every tensor of the file."""
        return {name: spec for task in self.tasks for name, spec in task.outputs.items()}

    @property
    def tuned_bytes(self) -> int:
        """Bytes of its tensors in the tuned model."""
        return sum(task.tuned.nbytes for task in self.tasks)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        header, _ = plan_file(self.outputs)
        return len(header) + sum(spec.nbytes for spec in self.outputs.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done with a pair of folders.

    Attributes:
        shards: files of the result, in order.
        recipe: how weights are quantized.
        format: name of the layout of quantized weights, or "as-base".
        dtype: dtype that quantized inputs dequantize to, unless their task has another.
        config: the `config.json` of the result.
        beside: the `hf_quant_config.json` of the result; empty for none.
        dropped: tensors of the tuned model that are left out, and why.
        memory: bytes the work will take at most, the process itself included.
    """

    shards: tuple[Shard, ...]
    recipe: Recipe
    format: str
    dtype: np.dtype
    config: Mapping[str, Any]
    beside: Mapping[str, Any]
    dropped: dict[str, str]
    memory: int

    @property
    def tasks(self) -> list[Task]:
        """Every tensor of the result."""
        return [task for shard in self.shards for task in shard.tasks]

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the result's shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def share(self) -> float:
        """Quantized elements of the tuned model, as a share of all of its elements."""
        sizes = collections.Counter[bool]()
        for task in self.tasks:
            sizes[task.quantize] += task.tuned.spec.size
        return sizes[True] / max(sizes.total(), 1)

    @property
    def kept(self) -> dict[str, list[Task]]:
        """Tensors that stay as they are, by the reason without its particulars."""
        reasons: dict[str, list[Task]] = collections.defaultdict(list)
        for task in self.tasks:
            if not task.quantize:
                reasons[task.why.partition(":")[0]].append(task)
        return dict(reasons)


def make_plan(
    base: Folder,
    tuned: Folder,
    recipe: Recipe,
    layout: Layout,
    *,
    memory: int,
    missing_base: MissingBase = "error",
    tp: int = 1,
    dtype: np.dtype | None = None,
    choice: Choice = ALL,
) -> Plan:
    """Plans the quantization of one folder against another.

    Args:
        base: folder before tuning.
        tuned: folder after tuning.
        recipe: how to quantize, with the format and the tiling of the layout.
        layout: how to store the result.
        memory: bytes that the work may take.
        missing_base: what becomes of weights whose base is missing or has another shape.
        tp: number of devices over which a server will divide each weight.
        dtype: dtype that quantized inputs dequantize to; None for the dtype of the tuned model's weights.
        choice: which weights the user wants quantized.

    Raises:
        DaqError: naming every tensor that has no base, or what does not fit into the memory.
    """
    for folder in (base, tuned):
        refuse_unread(folder)
    if layout.model_type and tuned.config.get("model_type") != layout.model_type:
        raise DaqError(
            f"{tuned.path}: --format {layout.name} is for models of type {layout.model_type!r}, and its "
            f"config says {tuned.config.get('model_type')!r}; use --format mxfp4."
        )
    refuse_parted_experts(tuned, layout)
    kept, dropped = kept_of(tuned, layout, tp, choice), dropped_of(tuned)
    stored = dtype or stored_dtype(tuned)  # of quantized inputs that are kept
    dtype = dtype or tuned.working_dtype or stored
    problems = {}
    for name, tensor in tuned.tensors.items():
        if name not in kept and name not in dropped and (why := problem_of(base.tensors.get(name), tensor)):
            problems[name] = why
    if problems and missing_base == "error":
        refuse(
            f"{base.path}: {len(problems)} weights of the tuned model have no partner in base",
            [f"{name!r} {why}" for name, why in problems.items()],
            renamed(problems, base.tensors, "base")
            or "Pass the base that was tuned, or --missing-base absmax to quantize these without it.",
            one_line=True,
        )
    tasks, quantized = [], [name for name in tuned.tensors if name not in kept and name not in dropped]
    room = Room.of(memory, (tuned.tensors[name] for name in quantized))
    factors = shared_factors(base, tuned, layout, quantized) if layout.factor else {}
    for name, tensor in tuned.tensors.items():
        if name in dropped:
            continue
        if name in kept:
            tasks.append(kept_task(tensor, kept[name], recipe, stored, dtype))
        else:
            partner = None if name in problems else base.tensors[name]
            coding = layout.of(name).coding(name, tensor.shape, factors.get(name, 1.0))
            own = recipe if layout.of(name) is layout else in_layout(recipe, layout.of(name))
            own = own.replace(scales=coding.storage.rule) if layout.factor else own
            tasks.append(quantized_task(tensor, partner, own, coding, dtype, room))
    skipped = skip_list((n for n in kept if is_matrix(n, len(tuned.tensors[n].shape))), tuned.config)
    config = unquantized(tuned.config) | {"quantization_config": layout.config(skipped)} | dict(layout.says)
    beside = layout.beside(skipped)
    shards = in_shards(tasks)
    plan = Plan(shards, recipe, layout.name, dtype, config, beside, dropped, memory_of(shards))
    if not any(task.quantize for task in plan.tasks):
        raise DaqError(f"{tuned.path}: no tensor of it can be quantized: {_reasons(plan)}.")
    return plan


def in_shards(tasks: Sequence[Task], file_of: Mapping[str, str] | None = None) -> tuple[Shard, ...]:
    """Tasks by the files that they are written to: those of their tensors unless `file_of` names others."""
    shards: dict[str, list[Task]] = {}
    for task in tasks:
        shards.setdefault(file_of[task.name] if file_of else task.tuned.file, []).append(task)
    return tuple(Shard(file, tuple(found)) for file, found in shards.items())


def kept_task(tensor: Tensor, why: str, recipe: Recipe, stored: np.dtype, dtype: np.dtype) -> Task:
    """The task of a tensor that stays as it is; one that is quantized is stored dequantized to `stored`."""
    plain = tensor.copied or tensor.spec
    spec = plain if tensor.coding is None else TensorSpec.of(stored, tensor.plain_shape)
    rows = max(1, *tensor.shape[:1], 1)
    if tensor.coding is not None:  # dequantized some rows at a time; others are copied by bytes
        each = max(1, tensor.spec.size // rows)
        rows = max(1, _AT_ONCE // each // tensor.band_step) * tensor.band_step
    return Task(tensor, None, False, why, {tensor.name: spec}, rows, None, recipe, dtype)


def quantized_task(
    tensor: Tensor, base: Tensor | None, recipe: Recipe, coding: Coding, dtype: np.dtype, room: Room
) -> Task:
    """The task of a tensor that is quantized with the format and the tiling of a coding.

    Raises:
        DaqError: if the memory does not suffice.
    """
    rows = _rows_at_a_time(tensor, base, recipe, coding, room)
    why = "" if base else "no base"
    return Task(tensor, base, True, why, coding.specs, rows, coding, recipe, dtype)


def _rows_at_a_time(tensor: Tensor, base: Tensor | None, recipe: Recipe, coding: Coding, room: Room) -> int:
    """Whole matrices one by one; a matrix too large for the memory in bands, if its tiles are independent."""
    *batch, outputs, inputs = tensor.shape
    sources = [tensor] if base is None else [tensor, base]
    runtime, whole = runtime_of(recipe, room.programs), 1 if batch else outputs

    def needed(rows: int) -> float:
        return runtime + peak_of(3 * [need_of(tensor.shape, rows, sources, recipe, coding)])

    if needed(whole) <= room.memory:
        return whole
    step = _step(tensor, base, coding.tiling)
    if not batch and work_of(recipe).by_tile and not can_be_cut(coding.tiling, tensor.shape):
        steps = bisect.bisect(range(1, outputs // step + 1), room.memory, key=lambda n: needed(n * step))
        if steps:
            return steps * step
    gb, given = needed(whole) / 10**9, room.memory / 10**9
    digits = next((n for n in range(1, 9) if f"{gb:.{n}f}" != f"{given:.{n}f}"), 9)  # that tell them apart
    raise DaqError(
        f"{tensor.file}: {tensor.name!r} is {outputs} x {inputs}, which takes {gb:.{digits}f} GB at once; "
        f"the memory given is {given:.{digits}f} GB: raise it (--memory {math.ceil(10 * gb) / 10})."
    )


def _step(tensor: Tensor, base: Tensor | None, tiling: Tiling) -> int:
    """Bands that begin at multiples of this number cut no tile of the result, nor of stored inputs."""
    tilings = [x.coding.tiling for x in (tensor, base) if x is not None and x.coding]
    cut = [t for t in (tiling, *tilings) if not can_be_cut(t, tensor.shape)]
    return math.lcm(*(rows_per_tile(tiling, tensor.shape) for tiling in cut))


def memory_of(shards: Sequence[Shard]) -> int:
    """Bytes that the work takes at most, the process itself included."""
    tasks = [task for shard in shards for task in shard.tasks]
    chosen = [task for task in tasks if task.quantize]
    words = sum(_EACH_TENSOR + _EACH_LETTER * len(task.name) for task in tasks)
    decoded = [task for task in tasks if not task.quantize and task.tuned.coding]
    programs = _programs_of(chosen), _programs_of(decoded) + _programs_of([t for t in chosen if t.as_base])
    runtimes = [runtime_of(recipe, *programs) for recipe in {task.recipe for task in chosen}]
    bands = max(
        (peak_of(need for task in shard.tasks for need in _needs(task)) for shard in shards), default=0
    )
    held = _KEPT_HELD if decoded else 0
    return int(max(runtimes, default=RUNTIME) + words + max(bands, _LEAST) + held)


def _needs(task: Task) -> list[Need]:
    """What the bands of a tensor take; three of them for all that are like them."""
    if task.quantize:
        assert task.coding is not None
        sources = [task.tuned] if task.base is None else [task.tuned, task.base]
        need = need_of(task.tuned.shape, task.rows, sources, task.recipe, task.coding)
        return min(3, len(task.bands)) * [need]
    if task.tuned.coding:
        return [Need(write=_KEPT_EACH * task.most_elements)]
    return [Need(write=min(task.tuned.nbytes, _COPIED))]


def _programs_of(tasks: Sequence[Task]) -> int:
    """How many programs are compiled to quantize tensors, and to dequantize those that are kept."""
    return len({task.program(rows) for task in tasks for rows in task.bands})


def stored_dtype(folder: Folder) -> np.dtype:
    """Dtype of the weights of a folder; if they are all codes, the dtype that its config names."""
    plain = (t for name, t in folder.tensors.items() if is_matrix(name, len(t.shape)) and not t.coding)
    specs = (t.copied or t.spec for t in plain if t.spec.dtype in FLOATS)
    return next((spec.numpy_dtype for spec in specs if spec.numpy_dtype), folder.dtype)


def problem_of(base: Tensor | None, tuned: Tensor) -> str:
    """Why a tensor of the base is no partner of a tensor of the tuned model; "" if it is."""
    if base is None:
        return "is missing"
    if base.shape != tuned.shape:
        return f"is {base.shape} but tuned is {tuned.shape}"
    if base.coding is None and base.spec.dtype not in FLOATS:
        return f"is {base.spec.dtype} without a scale"
    return ""


def _reasons(plan: Plan) -> str:
    return ", ".join(f"{len(tasks)} are {why}" for why, tasks in list(plan.kept.items())[:4]) or "it is empty"
