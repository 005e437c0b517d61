"""What the options of `quantize_folder` mean, and which of them go together."""

import dataclasses
import os
from typing import Any

import numpy as np

from daq_jax.density.recipe import DensityRecipe
from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import Folder
from daq_jax.io.hf.layouts import LAYOUTS, TARGETS, Layout
from daq_jax.recipe import Recipe
from daq_jax.scales import AnyScale, InDtype, PowerOfTwo
from daq_jax.searches.candidates import CoarseToFine, Grid, WithBaseScale

_DTYPES = ("bfloat16", "float16", "float32")
_QUARTER = 0.25  # of the machine's memory, unless told otherwise
_NOT_FOR_ORBAX = {
    "shard": "one process writes the whole of it",
    "tp": "its leaves are not cut until they are loaded",
    "base_dtype": "each of its quantized leaves says what it dequantizes to",
    "custom_code": "no code lies beside it",
}


def layout_for(format: str | None, target: str) -> tuple[Layout, bool]:
    """The layout to write, and whether its scales must be powers of two."""
    if target not in TARGETS:
        raise DaqError(f"`target` must be one of {', '.join(TARGETS)}; got {target!r}.")
    name = format or TARGETS[target].layout
    if name not in LAYOUTS:
        raise DaqError(f"`format` must be one of {', '.join(LAYOUTS)}; got {name!r}.")
    return LAYOUTS[name], name in TARGETS[target].power_of_two


def without_zeros(recipe: Recipe | DensityRecipe) -> Recipe:
    """The recipe, if files can hold what it gives.

    Raises:
        DaqError: if it may give groups a zero, or needs the inputs of layers.
    """
    if isinstance(recipe, Recipe):
        return recipe
    why = "is fitted to the inputs of layers, which folders do not have"
    if recipe.shift:
        why = (
            "gives each group a zero that is a real number, and the files of servers hold whole zeros or none"
        )
    raise DaqError(
        f"a DensityRecipe {why}: pass a Recipe, such as `mse` with --format int4-group, or call "
        "`daq_jax.quantize_density` on the weights in memory."
    )


def check_options(shard: tuple[int, int], tp: int, base_dtype: str | None, overwrite: bool) -> None:
    """Raises DaqError for values that make no sense."""
    if not 1 <= shard[0] <= shard[1]:
        raise DaqError(f"`shard` must be (I, N) with I from 1 to N; got {shard}.")
    if overwrite and shard[1] > 1:
        raise DaqError(
            "`overwrite` with several shares would undo the work of the others; empty `out` first."
        )
    if tp < 1:
        raise DaqError(f"`tp` must be a number of devices; got {tp}.")
    if base_dtype not in (None, *_DTYPES):
        raise DaqError(f"`base_dtype` must be one of {', '.join(_DTYPES)}; got {base_dtype!r}.")


def refuse_for_orbax(**given: Any) -> None:
    """Raises DaqError, naming all options that were given and have no effect on Orbax checkpoints."""
    words = [f"--{n.replace('_', '-')} ({_NOT_FOR_ORBAX[n]})" for n, value in given.items() if value]
    if words:
        raise DaqError(
            f"with Orbax checkpoints {' and '.join(words)} would have no effect: leave it out, or pass "
            "Hugging Face folders."
        )


def for_server(recipe: Recipe, layout: Layout, power_of_two: bool) -> Recipe:
    """The recipe, with the format, the tiling and the scales that a server reads."""
    recipe = dataclasses.replace(recipe, format=layout.format, tiling=layout.tiling)
    return dataclasses.replace(recipe, scales=PowerOfTwo()) if power_of_two else recipe


def for_folders(recipe: Recipe, base: Folder, tuned: Folder, layout: Layout) -> Recipe:
    """The recipe, with what these folders say of scales.

    Those that a server will hold; and for a search by score those that the base was stored with, if it was.
    """
    if layout.narrow_scales and recipe.scales == AnyScale() and tuned.dtype != np.float32:
        recipe = dataclasses.replace(recipe, scales=InDtype(str(tuned.dtype)))
    stored = any(t.coding and t.coding.tiling == layout.tiling for t in base.tensors.values())
    if stored and isinstance(recipe.search, (Grid, CoarseToFine)):
        recipe = dataclasses.replace(recipe, search=WithBaseScale(recipe.search))
    return recipe


def memory_of(memory_gb: float | int | None) -> int:
    """Bytes that the work may take.

    Raises:
        DaqError: if that is no amount of memory.
    """
    if memory_gb is None:
        return int(_QUARTER * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if not 0 < memory_gb < float("inf"):
        raise DaqError(f"`memory_gb` must be above 0; got {memory_gb}.")
    return int(memory_gb * 10**9)
