"""Two checkpoint folders to a third: the one call behind `daq-jax quantize`."""

import dataclasses
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from daq_jax import recipes
from daq_jax.density.recipe import DensityRecipe
from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import INDEX, Folder, is_orbax, open_folder
from daq_jax.io.hf.layouts import TARGETS
from daq_jax.io.hf.tensor_files import read_json
from daq_jax.io.jobs.completion import CONFIG, complete
from daq_jax.io.jobs.journal import REPORT, Journal, describe, fingerprint
from daq_jax.io.jobs.options import (
    check_options,
    for_folders,
    for_server,
    layout_for,
    memory_of,
    refuse_for_orbax,
    without_zeros,
)
from daq_jax.io.jobs.planning import MissingBase, Plan, make_plan
from daq_jax.io.jobs.progress import progress_on, result_of, table_of, warning_of
from daq_jax.io.jobs.streaming import carry_out
from daq_jax.recipe import Recipe
from daq_jax.version import __version__

_SPARE_DISK = 10**8  # bytes left free for report and side files


def quantize_folder(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    recipe: Recipe | DensityRecipe = recipes.default,
    *,
    format: str | None = None,
    target: str = "hopper",
    memory_gb: float | int | None = None,
    missing_base: MissingBase = "error",
    tp: int = 1,
    base_dtype: str | None = None,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    custom_code: bool = False,
    plan_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Quantizes a checkpoint folder against the one it was tuned from, in bounded memory.

    Everything is checked from headers first. A killed run goes on where it stopped when it is called again,
    and OUT looks complete only when it is.

    Args:
        base: folder before tuning; Hugging Face safetensors, bfloat16, float16, float32, or FP8 with scales.
            Or an Orbax checkpoint, if `tuned` is one too: then so is `out`, for `daq_jax.load`, and `shard`,
            `tp`, `base_dtype` and `custom_code` are refused.
        tuned: folder after tuning; may be sharded in another way.
        out: folder to write; new, empty, or left by the same call.
        recipe: how to quantize; its format and tiling are those of `format`. A `DensityRecipe` is refused.
        format: "fp8-block", "fp8-channel", "int8-channel" or "int4-group"; None for what suits the target.
        target: "hopper", "blackwell" or "tpu": who serves the result.
        memory_gb: GB that the process may take; None for a quarter of the machine's.
        missing_base: "error", or "absmax" to quantize weights that base lacks without it.
        tp: number of devices over which a server will divide each weight.
        base_dtype: that quantized inputs stand for: "bfloat16", "float16" or "float32"; None for the dtype
            that the tuned model's weights are stored in, or that its config names.
        shard: (I, N), to do the I-th of N shares of the files; whoever is last completes the folder.
        overwrite: replace the checkpoint in `out`.
        custom_code: copy Python files of the tuned model too.
        plan_only: make and show the plan, and stop.
        console: where to show plan and progress; None for nowhere.

    Returns:
        What `daq_report.json` holds; for `plan_only`, or a share that was not the last, what is known so far.

    Raises:
        DaqError: in one sentence, before any work where it can be known before: what a header, an index or
            a config has wrong, weights without a base, too little memory or disk, an `out` that is not ours.
        OSError: where the disk fails.
    """
    console = console or Console(quiet=True)
    recipe = without_zeros(recipe)
    layout, power_of_two = layout_for(format, target)
    check_options(shard, tp, base_dtype, overwrite)
    base, tuned, out = Path(base), Path(tuned), Path(out)
    _refuse_same(out, base, tuned)
    recipe = for_server(recipe, layout, power_of_two)
    if is_orbax(base) or is_orbax(tuned):
        refuse_for_orbax(shard=shard != (1, 1), tp=tp != 1, base_dtype=base_dtype, custom_code=custom_code)
        return _quantize_orbax(
            base,
            tuned,
            out,
            recipe,
            about={"version": __version__, "format": layout.name, "target": target},
            memory=memory_of(memory_gb),
            missing_base=missing_base,
            overwrite=overwrite,
            plan_only=plan_only,
            console=console,
        )
    before, after = open_folder(base), open_folder(tuned)
    try:
        if not after.config:
            raise DaqError(f"{tuned}: has no {CONFIG}, without which no server loads the result.")
        recipe = for_folders(recipe, before, after, layout)
        plan = make_plan(
            before,
            after,
            recipe,
            layout,
            memory=memory_of(memory_gb),
            missing_base=missing_base,
            tp=tp,
            dtype=np.dtype(base_dtype) if base_dtype else None,
        )
        choices = {"target": target, "missing_base": missing_base, "tp": tp, "custom_code": custom_code}
        work = _Work(plan, before, after, out, console, choices)
        work.show(TARGETS[target].notes[layout.name])
        return work.summary if plan_only else work.do(shard, overwrite)
    finally:
        before.close()
        after.close()


@dataclasses.dataclass(frozen=True)
class _Work:
    """A plan, and where it is carried out."""

    plan: Plan
    base: Folder
    tuned: Folder
    out: Path
    console: Console
    choices: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the bytes of the result, beside the inputs."""
        plan = self.plan
        bands = {job.name: job.rows for job in plan.jobs if job.quantize and len(job.parts) > 1}
        made = {"version": __version__, "format": plan.layout.name, "recipe": plan.recipe}
        return describe({**made, **self.choices, "dtype": str(plan.dtype), "rows": bands})

    @property
    def summary(self) -> dict[str, Any]:
        """What is known before any weight is read."""
        plan = self.plan
        chosen = [job for job in plan.jobs if job.quantize]
        return self.settings | {
            "server": TARGETS[self.choices["target"]].notes[plan.layout.name],
            "quantized": {job.name: "" if job.base else "no base: AbsMax" for job in chosen},
            "kept": {job.name: job.why for job in plan.jobs if not job.quantize},
            "left_out": plan.dropped,
            "share": plan.share,
            "bytes": plan.nbytes,
            "memory_bytes": plan.memory,
        }

    def show(self, note: str) -> None:
        """Shows the plan."""
        self.console.print(table_of(self.plan, f"{self.choices['target']}: {note}"))
        if warning_of(self.plan):
            self.console.print(warning_of(self.plan), highlight=False)

    def do(self, shard: tuple[int, int], overwrite: bool) -> dict[str, Any]:
        """Carries the plan out, or a share of it."""
        started = time.monotonic()
        _refuse_full_disk(self.out, self.plan)
        journal = Journal(self.out, fingerprint(_files(self.base, self.tuned), self.settings))
        if journal.begin(overwrite=overwrite):
            self.console.print(f"{self.out} is complete already", highlight=False, markup=False)
            return read_json(self.out / REPORT, "the report")
        mine = list(self.plan.shards[shard[0] - 1 :: shard[1]])
        with progress_on(self.console, sum(s.tuned_bytes for s in mine)) as running:
            carry_out(self.plan, self.base, self.tuned, journal, mine, running.tell)
        report = complete(journal, self.plan, self.tuned, self.summary, self.choices["custom_code"])
        words = result_of(running.pooled, self.plan, time.monotonic() - started, _peak())
        self.console.print(words, highlight=False)
        return report


def _quantize_orbax(base: Path, tuned: Path, out: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    from daq_jax.io.jobs.orbax import quantize_orbax  # which loads Orbax

    if not (is_orbax(base) and is_orbax(tuned)):
        raise DaqError(f"{base} and {tuned}: one is an Orbax checkpoint, one is not; needed two of a kind.")
    options["about"] |= {"recipe": describe(recipe), "missing_base": options["missing_base"]}
    return quantize_orbax(base, tuned, out, recipe, **options)


def _refuse_same(out: Path, base: Path, tuned: Path) -> None:
    here = out.resolve()
    for folder in (base, tuned):
        there = folder.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise DaqError(f"{out}: must neither be an input, nor lie in one, nor hold one: {folder}.")
    if out.exists() and not out.is_dir():
        raise DaqError(f"{out}: is a file; needed a folder to write to.")


def _peak() -> int:
    """Most bytes of memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _files(*folders: Folder) -> list[Path]:
    names = [(f.path, {t.file for t in f.tensors.values()} | {CONFIG, INDEX}) for f in folders]
    return [path / name for path, files in names for name in sorted(files) if (path / name).is_file()]


def _refuse_full_disk(out: Path, plan: Plan) -> None:
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    done = sum((out / shard.file).stat().st_size for shard in plan.shards if (out / shard.file).is_file())
    free, needed = shutil.disk_usage(there).free, plan.nbytes - done + _SPARE_DISK
    if free < needed:
        raise DaqError(
            f"{out}: needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; free some, or "
            "pass a folder on a larger disk."
        )
