"""`inspect` for two checkpoint folders: reads the bands of rows that hold the sample, and nothing else."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daq_jax import recipes
from daq_jax.analysis.inspection import MOST_ELEMENTS, Inspection, Source, inspect_sources
from daq_jax.analysis.sampling import Index, Patches, scales, take
from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.bands import band_around
from daq_jax.io.hf.folders import Folder, Tensor, open_safetensors
from daq_jax.io.hf.layouts import Layout
from daq_jax.io.hf.paired_names import paired
from daq_jax.io.jobs.as_base import plan_as_base
from daq_jax.io.jobs.keeping import ALL, Choice, patterns_of
from daq_jax.io.jobs.options import Output, Run, in_layout, wants_base_format
from daq_jax.io.jobs.planning import Task, make_plan
from daq_jax.qtensor import QTensor
from daq_jax.recipe import Recipe
from daq_jax.tilings import TileView

_Leaf = NDArray | QTensor
_Pair = tuple[_Leaf, _Leaf]
_NO_LIMIT = 2**60  # bytes: nothing is quantized whole here


def inspect_folder(
    base: str | Path,
    tuned: str | Path,
    recipe: Recipe = recipes.default,
    *,
    format: str | None = None,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    most_elements: int = MOST_ELEMENTS,
) -> Inspection:
    """Says before any quantizing whether there is a change to lose between two checkpoint folders.

    Looks at the weights that `quantize_folder` would quantize; see `inspect`. Memory and time depend on the
    size of the sample, hardly on that of the folders.

    Args:
        base: folder before tuning.
        tuned: folder after tuning, or a LoRA adapter of `base`.
        recipe: what to hold against AbsMax; its format and tiling are those of `format`.
        format: as of `quantize_folder`; None for "as-base" if `base` holds quantized weights, else for
            "fp8-block".
        keep: patterns of names of weights that would stay as they are; as of `quantize_folder`.
        only: patterns of names of the only weights that would be quantized; as of `quantize_folder`.
        most_elements: how many elements to look at, at most.

    Raises:
        DaqError: in one sentence: what a folder has wrong, weights without a base, NaN or infinity in the
            sample.
    """
    choice = Choice(patterns_of("keep", keep), patterns_of("only", only))
    output = Output(format, choice=choice)
    with (
        contextlib.closing(open_safetensors(base)) as before,
        contextlib.closing(open_tuned(tuned, before)) as after,
    ):
        if wants_base_format(output, Run(), before):
            by_base, _ = paired(after, before)
            # Without a format, a part of a model may be looked at, though not quantized so.
            if format is not None or before.tensors.keys() == by_base.tensors.keys():
                return inspect_opened(before, by_base, recipe, None, most_elements, choice)
        before, _ = paired(before, after)
        return inspect_opened(before, after, recipe, output.layout, most_elements, choice)


def inspect_opened(
    base: Folder,
    tuned: Folder,
    recipe: Recipe,
    layout: Layout | None,
    most_elements: int,
    choice: Choice = ALL,
) -> Inspection:
    """As `inspect_folder`, of folders that are open; without a layout in the format of the base."""
    if layout is None:
        plan = plan_as_base(base, tuned, recipe, memory=_NO_LIMIT)
    else:
        layout = dataclasses.replace(layout, factor="")  # to find it every weight would be read
        plan = make_plan(base, tuned, in_layout(recipe, layout), layout, memory=_NO_LIMIT, choice=choice)
    tasks = {task.name: task for task in plan.tasks if task.quantize}

    @functools.lru_cache(maxsize=1)  # patches of one band come one after another
    def band(name: str, first: int, last: int) -> _Pair:
        rows, dtype = slice(first, last), tasks[name].dtype
        old, new = (folder.read(name, rows, dtype) for folder in (base, tuned))
        return old, new

    sources = {name: _source(task, band) for name, task in tasks.items()}
    return inspect_sources(sources, recipe, most_elements=most_elements)


def _source(task: Task, band: Callable[[str, int, int], _Pair]) -> Source:
    partner = task.base
    assert partner is not None  # the plan refuses weights without
    coding, recipe = partner.coding, task.recipe
    stored = coding is not None and recipe.format in (coding.format, coding.full_format)
    step, length = math.lcm(partner.band_step, task.tuned.band_step), task.tuned.shape[0]

    def read(index: Index) -> tuple[NDArray, NDArray, NDArray | None]:
        rows = np.asarray(index[0])
        here = band_around(int(rows.min()), int(rows.max()) + 1, step, length)
        old, new = band(task.name, here.start, here.stop)
        inside = (rows - here.start, *index[1:])
        spread = scales(old, inside) if stored and isinstance(old, QTensor) else None
        return take(old, inside), take(new, inside), spread

    def dtype(tensor: Tensor) -> np.dtype:
        return task.dtype if tensor.coding or tensor.dtype is None else tensor.dtype

    view = TileView(task.tuned.shape, task.tuned.matrix, recipe.tiling)
    return Source(Patches(view), (dtype(partner), dtype(task.tuned)), recipe, read)
