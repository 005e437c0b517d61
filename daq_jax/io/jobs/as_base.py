"""The plan of a result in the format of its base: each tensor in the coding that it has there.

Names, files, skip lists and the quantization of the config are those of the base; values and the rest of the
config are those of the tuned model.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from daq_jax import recipes
from daq_jax.errors import DaqError, refuse
from daq_jax.formats import Format
from daq_jax.io.hf.architectures import part_of
from daq_jax.io.hf.codings import Coding, ScaleStorage
from daq_jax.io.hf.folders import Folder, Tensor
from daq_jax.io.hf.layouts import AS_BASE
from daq_jax.io.hf.methods import QUANTIZATION_KEYS, quantizes_cache, uses_static_inputs
from daq_jax.io.hf.paired_names import paired
from daq_jax.io.jobs.leftovers import CACHE, dropped_of, refuse_unread, scale_without_use, unquantized
from daq_jax.io.jobs.memory import Room
from daq_jax.io.jobs.other_names import renamed
from daq_jax.io.jobs.planning import (
    Plan,
    Task,
    in_shards,
    kept_task,
    memory_of,
    problem_of,
    quantized_task,
    stored_dtype,
)
from daq_jax.recipe import Recipe
from daq_jax.roundings.nearest import Nearest
from daq_jax.roundings.rounding import Rounding
from daq_jax.scales import AnyScale
from daq_jax.searches.search import Search
from daq_jax.searches.trials import Trials
from daq_jax.tilings import Tiling

_KEYS = (*QUANTIZATION_KEYS, "expert_dtype", "scale_fmt")  # what a config says of codes


@dataclasses.dataclass(frozen=True)
class OfBase(Search):
    """The stored scale of the base whatever the tuned weights are, of which the largest may be clipped."""

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    @property
    def reads_metric(self) -> bool:
        """See `Search`."""
        return False

    def judged(self, rounding: Rounding) -> Rounding:
        """See `Search`; nothing is scored."""
        return Nearest()

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return trials.base


def recipe_as_base(recipe: Recipe, number: Format, tiling: Tiling, storage: ScaleStorage) -> Recipe:
    """A recipe for a weight in the coding of its base: its format, its tiling, and how it stores scales."""
    recipe = recipe.replace(format=number, tiling=tiling, scales=storage.rule)
    if storage.has_factor and recipe.search == recipes.default.search:
        # The rule of such scales has the factor in it, and would be compiled anew for each. Without another
        # scale than that of the base it is not needed.
        return recipe.replace(search=OfBase(), scales=AnyScale())
    return recipe


def plan_as_base(
    base: Folder, tuned: Folder, recipe: Recipe, *, memory: int, dtype: np.dtype | None = None
) -> Plan:
    """Plans the quantization of one folder into the format of another.

    Args:
        base: folder before tuning, which holds quantized weights.
        tuned: folder after tuning.
        recipe: how to quantize; formats, tilings and scales are those of the base.
        memory: bytes that the work may take.
        dtype: dtype that quantized inputs dequantize to; None for that of each tensor of the tuned model.

    Raises:
        DaqError: naming every tensor that one of the folders lacks, or what does not fit into the memory.
    """
    for folder in (base, tuned):
        refuse_unread(folder)
    keeps_inputs = uses_static_inputs(base.config, base.beside)
    keeps_cache = quantizes_cache(base.config, base.beside)
    scales = {n: why for n in base.tensors if (why := scale_without_use(n))}
    unread = {n: why for n, why in scales.items() if not (keeps_cache if n.endswith(CACHE) else keeps_inputs)}
    dropped = {n: why for n, why in dropped_of(tuned).items() if n not in base.tensors or n in unread}
    dropped |= unread
    _refuse_lacking(base, tuned, dropped)
    stored = dtype or stored_dtype(tuned)
    working = dtype or tuned.working_dtype or stored
    recipe_for = functools.cache(functools.partial(recipe_as_base, recipe))
    room = Room.of(memory, (t for t in base.tensors.values() if t.coding))
    tasks = []
    for name, before in base.tensors.items():
        after = tuned.tensors.get(name)
        if name in dropped:
            continue
        if after is None or name in scales:
            task = kept_task(before, scales[name], recipe, stored, working)
            tasks.append(dataclasses.replace(task, from_base=True))
        elif before.coding is None:
            tasks.append(kept_task(after, "not quantized in base", recipe, stored, working))
        else:
            own = recipe_for(before.coding.full_format, before.coding.tiling, before.coding.storage)
            tasks.append(_coded_task(before, before.coding, after, own, dtype or working, room))
    files = {name: tensor.file for name, tensor in base.tensors.items()}
    config = config_as_base(base.config, tuned.config)
    shards = in_shards(tasks, files)
    return Plan(shards, recipe, AS_BASE, working, config, base.beside, dropped, memory_of(shards))


def by_names_of_base(base: Folder, tuned: Folder) -> tuple[Folder, dict[str, str]]:
    """The tuned model by the names of the base, which those of the result are, as `paired` gives it.

    Raises:
        DaqError: if names differ and the folders are of two types of model: the result has the config of the
            tuned model, whose class would not find the names of the base.
    """
    found, names = paired(tuned, base)
    kinds = [folder.config.get("model_type") for folder in (base, tuned)]
    if names and kinds[0] != kinds[1]:
        name, there = next(iter(names.items()))
        raise DaqError(
            f"{tuned.path}: {name!r} of base is {there!r} here, and base is a model of type {kinds[0]!r} but "
            f"tuned is {kinds[1]!r}: loaders of the one do not find the names of the other. Save the tuned "
            "model by the class of the base, or pass another --format."
        )
    return found, names


def _coded_task(
    before: Tensor, coding: Coding, after: Tensor, recipe: Recipe, dtype: np.dtype, room: Room
) -> Task:
    if after.coding is None and after.dtype is not None:
        dtype = after.dtype
    task = quantized_task(after, before, recipe, coding, dtype, room)
    return dataclasses.replace(task, as_base=True)


def _refuse_lacking(base: Folder, tuned: Folder, dropped: Mapping[str, str]) -> None:
    problems = []
    for name, before in base.tensors.items():
        after = tuned.tensors.get(name)
        if after is None and not scale_without_use(name):
            problems.append(f"{name!r} is not in the tuned model")
        elif after is not None and after.shape != before.shape:
            problems.append(f"{name!r} is {before.shape} but tuned is {after.shape}")
        elif after is not None and before.coding and (why := problem_of(after, before)):
            problems.append(f"{name!r} of the tuned model {why}")
        elif after is not None and not before.coding and before.turned != after.turned:
            problems.append(f"{name!r} is stored [experts, in, out] in one of them alone")
    strange = [name for name in tuned.tensors if name not in base.tensors and name not in dropped]
    problems += [f"{name!r} is not in the base" for name in strange]
    if problems:
        refuse(
            f"{base.path} and {tuned.path}: not two states of one model, as --format as-base needs them",
            problems,
            renamed(strange, base.tensors, "base")
            or "Pass the base that was tuned, of the same names and shapes, or another --format.",
            one_line=True,
        )


def config_as_base(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the tuned model with what that of the base says of quantization."""
    config = unquantized(tuned) | {key: base[key] for key in _KEYS if key in base}
    inner = part_of(base, "text_config")
    if any(key in inner for key in _KEYS):
        own = dict(part_of(config, "text_config"))
        config["text_config"] = own | {key: inner[key] for key in _KEYS if key in inner}
    return config
