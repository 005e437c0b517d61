"""What the options of `quantize_folder` mean, and which of them go together."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from daq_jax.density.recipe import DensityRecipe
from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import Folder
from daq_jax.io.hf.layouts import AS_BASE, LAYOUTS, TARGETS, Layout
from daq_jax.io.jobs.keeping import ALL, Choice
from daq_jax.recipe import Recipe
from daq_jax.rules import Rule
from daq_jax.scales import AnyScale, InDtype
from daq_jax.searches.candidates import CoarseToFine, Grid, WithBaseScale

MissingBase = Literal["error", "absmax"]

_DTYPES = ("bfloat16", "float16", "float32")
_QUARTER = 0.25  # of the machine's memory, unless told otherwise
_NOT_FOR_ORBAX = {
    "shard": "one process writes the whole of it",
    "tp": "its leaves are not cut until they are loaded",
    "base_dtype": "each of its quantized leaves says what it dequantizes to",
    "custom_code": "no code lies beside it",
    "keep": "`--rules` takes a file that says it",
    "only": "`--rules` takes a file that says it",
}


@dataclasses.dataclass(frozen=True)
class Output:
    """What the result is to be.

    Attributes:
        format: name of the layout in which weights are stored; None for the layout that suits the target.
        target: name of the kind of machine that will serve the result.
        tp: number of devices over which a server will divide each weight.
        base_dtype: dtype that quantized inputs dequantize to; None for the dtype of the tuned model.
        custom_code: whether Python files of the tuned model are copied too.
        choice: which weights the user wants quantized.
        rules: which leaves of an Orbax checkpoint are quantized, and how; None for `DEFAULT_RULES`.
    """

    format: str | None = None
    target: str = "hopper"
    tp: int = 1
    base_dtype: str | None = None
    custom_code: bool = False
    choice: Choice = ALL
    rules: Sequence[Rule] | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise DaqError(f"`target` must be one of {', '.join(TARGETS)}; got {self.target!r}.")
        if self.format not in (None, AS_BASE, *LAYOUTS):
            raise DaqError(f"`format` must be one of {', '.join((*LAYOUTS, AS_BASE))}; got {self.format!r}.")
        if self.tp < 1:
            raise DaqError(f"`tp` must be a number of devices; got {self.tp}.")
        if self.base_dtype not in (None, *_DTYPES):
            raise DaqError(f"`base_dtype` must be one of {', '.join(_DTYPES)}; got {self.base_dtype!r}.")

    @property
    def layout(self) -> Layout:
        """How weights are stored."""
        name = self.format or TARGETS[self.target].layout
        return LAYOUTS[TARGETS[self.target].instead.get(name, name)]

    def note_of(self, format: str) -> str:
        """What servers of the target do to the scales of a format."""
        return TARGETS[self.target].notes.get(format, "servers treat the result as they treat the base")

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype that `base_dtype` names."""
        return np.dtype(self.base_dtype) if self.base_dtype else None


@dataclasses.dataclass(frozen=True)
class Run:
    """How the work is to be done.

    Attributes:
        memory_gb: GB that the process may take; None for a quarter of the machine's memory.
        missing_base: what becomes of weights that base lacks: "error" or "absmax".
        shard: (I, N): this process writes every N-th file, from the I-th on.
        overwrite: whether the checkpoint in the folder of the result is replaced.
    """

    memory_gb: float | int | None = None
    missing_base: MissingBase = "error"
    shard: tuple[int, int] = (1, 1)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise DaqError(f"`shard` must be (I, N) with I from 1 to N; got {self.shard}.")
        if self.overwrite and self.shard[1] > 1:
            raise DaqError(
                "`overwrite` with several processes would undo the work of the others; empty `out` first."
            )
        if self.missing_base not in get_args(MissingBase):
            raise DaqError(f"`missing_base` must be 'error' or 'absmax'; got {self.missing_base!r}.")
        if self.memory_gb is not None and not 0 < self.memory_gb < float("inf"):
            raise DaqError(f"`memory_gb` must be above 0; got {self.memory_gb}.")

    @property
    def memory(self) -> int:
        """Bytes that the process may take."""
        if self.memory_gb is None:
            return int(_QUARTER * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return int(self.memory_gb * 10**9)


def wants_base_format(output: Output, run: Run, base: Folder) -> bool:
    """Whether the result is stored as the base is.

    Raises:
        DaqError: if this is asked for and cannot be.
    """
    by_default = output.format is None and output.target == "hopper" and run.missing_base == "error"
    as_base = output.format == AS_BASE or (by_default and base.is_coded)
    if as_base and output.choice.is_made:
        raise DaqError(
            f"--format {AS_BASE}, the default where BASE is quantized, codes what the base codes: leave "
            f"out --keep and --only, or pass one of {', '.join(LAYOUTS)}."
        )
    if output.format == AS_BASE:
        if not base.is_coded:
            raise DaqError(
                f"{base.path}: holds no quantized weight, so --format {AS_BASE} has no format to take; "
                f"needed one of {', '.join(LAYOUTS)}."
            )
        if run.missing_base != "error":
            raise DaqError(f"--format {AS_BASE} needs every weight in base: leave out --missing-base.")
    return as_base


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


def refuse_for_orbax(output: Output, run: Run) -> None:
    """Raises DaqError, naming all options that were given and have no effect on Orbax checkpoints."""
    given = {
        "shard": run.shard != (1, 1),
        "tp": output.tp != 1,
        "base_dtype": output.base_dtype,
        "custom_code": output.custom_code,
        "keep": output.choice.keep,
        "only": output.choice.only,
    }
    if output.format == AS_BASE:
        raise DaqError(f"--format {AS_BASE} is for Hugging Face folders; pass one of {', '.join(LAYOUTS)}.")
    if output.layout.factor:
        raise DaqError(
            f"--format {output.layout.name} is for Hugging Face folders: Orbax checkpoints have no place for "
            "the factor that all scales of a weight share."
        )
    if output.layout.experts is not None:
        raise DaqError(
            f"--format {output.layout.name} is for Hugging Face folders: an Orbax checkpoint has one format. "
            "Pass another one, or quantize in Python with a rule for the experts."
        )
    words = [f"--{n.replace('_', '-')} ({_NOT_FOR_ORBAX[n]})" for n, value in given.items() if value]
    if words:
        raise DaqError(
            f"with Orbax checkpoints {' and '.join(words)} would have no effect: leave it out, or pass "
            "Hugging Face folders."
        )


def in_layout(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe, with the format, the tiling and the scales of a layout."""
    recipe = recipe.replace(format=layout.format, tiling=layout.tiling)
    rule = layout.storage.rule
    return recipe if rule == AnyScale() else recipe.replace(scales=rule)


def for_folders(recipe: Recipe, base: Folder, tuned: Folder, layout: Layout) -> Recipe:
    """The recipe, with what a pair of folders says of its scales.

    Scales are numbers of the dtype in which servers will hold them. A search by score also tries the scales
    that the base is stored with.
    """
    if layout.narrow_scales and recipe.scales == AnyScale() and tuned.dtype != np.float32:
        recipe = dataclasses.replace(recipe, scales=InDtype(str(tuned.dtype)))
    stored = any(t.coding and t.coding.tiling == layout.tiling for t in base.tensors.values())
    if stored and _searches_by_score(recipe):
        recipe = dataclasses.replace(recipe, search=WithBaseScale(recipe.search))
    return recipe


def _searches_by_score(recipe: Recipe) -> bool:
    """Whether the search takes the best of any candidates, so that one more can do no harm.

    Known of two searches alone: another one may have its reasons not to try the scales of the base.
    """
    return isinstance(recipe.search, (Grid, CoarseToFine))
