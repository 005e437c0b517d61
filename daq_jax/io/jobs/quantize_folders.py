"""Two checkpoint folders to a third: the one call behind `daq-jax quantize`."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from daq_jax import recipes
from daq_jax.analysis.names import on_one_line
from daq_jax.analysis.relation import doubt_of
from daq_jax.density.recipe import DensityRecipe
from daq_jax.errors import DaqError
from daq_jax.io.disk.orbax_places import is_orbax
from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.architectures import is_unloaded
from daq_jax.io.hf.folders import Folder, open_folder
from daq_jax.io.hf.paired_names import paired
from daq_jax.io.hf.weight_names import is_expert
from daq_jax.io.jobs.as_base import by_names_of_base, plan_as_base
from daq_jax.io.jobs.compare_folders import patches_of_folders
from daq_jax.io.jobs.folder_store import CONFIG, FolderStore
from daq_jax.io.jobs.job import Job
from daq_jax.io.jobs.keeping import Choice, patterns_of
from daq_jax.io.jobs.model_card import origin_of
from daq_jax.io.jobs.options import (
    MissingBase,
    Output,
    Run,
    for_folders,
    in_layout,
    refuse_for_orbax,
    wants_base_format,
    without_zeros,
)
from daq_jax.io.jobs.planning import Plan, make_plan
from daq_jax.io.jobs.progress import table_of, warning_of
from daq_jax.io.jobs.side_files import CARD
from daq_jax.io.jobs.values import describe, flags
from daq_jax.recipe import Recipe
from daq_jax.rules import Rule, check_rules
from daq_jax.version import __version__

# By `CompressedTensorsDequantize` of transformers 5.24, which decodes experts in FP8 and packed ones.
_INT8_EXPERTS = "transformers does not load experts in int8-channel: pass fp8-channel or int4-group for it"


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
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    rules: Sequence[Rule] | None = None,
    plan_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Quantizes a checkpoint folder against the one it was tuned from, in bounded memory.

    Everything is checked from headers first. A killed run goes on where it stopped when it is called again,
    and OUT looks complete only when it is.

    Args:
        base: folder before tuning; Hugging Face safetensors, bfloat16, float16, float32, or quantized weights
            in any layout of `daq_jax.io.hf.recognition`.
            Or an Orbax checkpoint, if `tuned` is one too: then so is `out`, for `daq_jax.load`, and `shard`,
            `tp`, `base_dtype`, `custom_code`, `keep` and `only` are refused.
        tuned: folder after tuning, which may be sharded in another way; or a LoRA adapter of `base`, as PEFT
            saves it: each weight is then the base's plus `scale * B A` in float32, with no merged folder.
        out: folder to write; new, empty, or left by the same call.
        recipe: how to quantize; its format and tiling are those of `format`. A `DensityRecipe` is refused.
        format: one of the layouts of `daq_jax.io.hf.layouts`, such as "fp8-block", "int4-group", "mxfp4" or
            "nvfp4"; or "as-base": each tensor in the
            coding that it has in `base`, which must hold the same tensors as `tuned`. None for "as-base" if
            `base` holds quantized weights, `target` is "hopper" and `missing_base` is "error"; else for what
            suits the target.
        target: "hopper", "blackwell" or "tpu": who serves the result.
        memory_gb: GB that the process may take; None for a quarter of the machine's.
        missing_base: "error", or "absmax" to quantize weights that base lacks without it.
        tp: number of devices over which a server will divide each weight.
        base_dtype: that quantized inputs stand for: "bfloat16", "float16" or "float32"; None for the dtype
            that the tuned model's weights are stored in, or that its config names.
        shard: (I, N), to write every N-th file of the result, from the I-th on, while other processes write
            the others; the last process to end completes the folder.
        overwrite: replace what an earlier call wrote to `out`; files of others stay, or are refused.
        custom_code: copy Python files of the tuned model too.
        keep: patterns of names of weights that stay as they are: regular expressions, found anywhere in a
            name; after "re:", as llm-compressor has them, from its beginning.
        only: such patterns of the only weights that are quantized; empty for all. Towers and projectors of
            vision and audio are quantized only where one of these patterns names them.
        rules: for Orbax checkpoints, which leaves are quantized, how, and which of their axes are inputs,
            such as `MAXTEXT_RULES`; None for `DEFAULT_RULES`.
        plan_only: make and show the plan, and stop.
        console: where to show plan and progress; None for nowhere.

    Returns:
        What `daq_report.json` holds; for `plan_only`, or while files of other processes are missing,
        what is known before any weight is read.

    Raises:
        DaqError: in one sentence, before any work where it can be known before: what a header, an index or
            a config has wrong, weights without a base, too little memory or disk, an `out` that is not ours.
        OSError: where the disk fails.
    """
    console = console or Console(quiet=True)
    folders = Path(base), Path(tuned), Path(out)
    choice = Choice(patterns_of("keep", keep), patterns_of("only", only))
    if rules is not None:
        check_rules(rules)
    output = Output(format, target, tp, base_dtype, custom_code, choice, rules)
    run = Run(memory_gb, missing_base, shard, overwrite)
    with open_job(*folders, without_zeros(recipe), output, run, console) as job:
        return dict(job.summary) if plan_only else job.run()


@contextlib.contextmanager
def open_job(
    base: Path, tuned: Path, out: Path, recipe: Recipe, output: Output, run: Run, console: Console
) -> Iterator[Job]:
    """Plans the work of `quantize_folder` and shows the plan; the job yielded carries it out.

    Raises:
        DaqError: as `quantize_folder`.
    """
    _refuse_same(out, base, tuned)
    if is_orbax(base) or is_orbax(tuned):
        refuse_for_orbax(output, run)
        if not (is_orbax(base) and is_orbax(tuned)):
            raise DaqError(
                f"{base} and {tuned}: one is an Orbax checkpoint, one is not; needed two of a kind."
            )
        from daq_jax.io.jobs.orbax import open_orbax_job  # which loads Orbax

        opened = open_orbax_job(base, tuned, out, in_layout(recipe, output.layout), output, run, console)
    elif output.rules is not None:
        raise DaqError(
            f"{tuned}: --rules is for Orbax checkpoints; the axes of a Hugging Face folder are known, and "
            "--keep and --only say which of its weights are quantized."
        )
    else:
        opened = _open_folder_job(base, tuned, out, recipe, output, run, console)
    with opened as job:
        yield job


@contextlib.contextmanager
def _open_folder_job(
    base: Path, tuned: Path, out: Path, recipe: Recipe, output: Output, run: Run, console: Console
) -> Iterator[Job]:
    with (
        contextlib.closing(open_folder(base)) as before,
        contextlib.closing(open_tuned(tuned, before)) as after,
    ):
        if not after.config:
            raise DaqError(f"{tuned}: has no {CONFIG}, without which no server loads the result.")
        as_base = wants_base_format(output, run, before)
        if as_base:
            after, names = by_names_of_base(before, after)
        else:
            before, names = paired(before, after)
        plan = _plan(before, after, recipe, output, run, console)
        _show(plan, output, console)
        _show_names(names, "tuned" if as_base else "base", console)
        _show_doubt(before, after, plan, console)
        settings = _settings(plan, output, run)
        store = FolderStore(out, plan, before, after, output.custom_code)
        beside = store.side_files
        _show_side_files(store, console)
        summary = _summary(plan, output)
        summary["left_out"] |= beside.left_out
        summary |= {"tuned_names" if as_base else "base_names": names} if names else {}
        summary |= {"copied": [str(p) for p in beside.copied], "written": list(store.written)}
        yield Job(
            store=store,
            inputs={f"base/{p.name}": p for p in before.files}
            | {f"tuned/{p.name}": p for p in after.files}
            | {f"copied/{p}": folder / p for p, folder in beside.copied.items()}
            | ({f"tuned/{CARD}": beside.card} if beside.card else {}),
            settings=settings,
            summary=settings | summary,
            overwrite=run.overwrite,
            console=console,
            share=run.shard,
            memory=plan.memory,
            origin=origin_of(before, after, recipe, plan, output, run),
        )


def _plan(before: Folder, after: Folder, recipe: Recipe, output: Output, run: Run, console: Console) -> Plan:
    if wants_base_format(output, run, before):
        return plan_as_base(before, after, recipe, memory=run.memory, dtype=output.dtype)
    reads = console.status("reading the largest weight of each matrix") if output.layout.factor else None
    with reads or contextlib.nullcontext():
        return _plan_layout(before, after, recipe, output, run)


def _plan_layout(before: Folder, after: Folder, recipe: Recipe, output: Output, run: Run) -> Plan:
    return make_plan(
        before,
        after,
        for_folders(in_layout(recipe, output.layout), before, after, output.layout),
        output.layout,
        memory=run.memory,
        missing_base=run.missing_base,
        tp=output.tp,
        dtype=output.dtype,
        choice=output.choice,
    )


def _settings(plan: Plan, output: Output, run: Run) -> dict[str, Any]:
    """All that decides the bytes of the result, beside the inputs."""
    return describe(
        {
            "version": __version__,
            "format": plan.format,
            "recipe": plan.recipe,
            "target": output.target,
            "missing_base": run.missing_base,
            "tp": output.tp,
            "custom_code": output.custom_code,
            "keep": list(output.choice.keep),
            "only": list(output.choice.only),
            "dtype": str(plan.dtype),
            "jax": flags(),
            "rows": {task.name: task.rows for task in plan.tasks if task.quantize and len(task.bands) > 1},
        }
    )


def _summary(plan: Plan, output: Output) -> dict[str, Any]:
    """What a plan says of the result."""
    chosen = [task for task in plan.tasks if task.quantize]
    return {
        "server": _note_of(plan, output),
        "quantized": {task.name: "" if task.base else "no base: AbsMax" for task in chosen},
        "kept": {task.name: task.why for task in plan.tasks if not task.quantize},
        "left_out": dict(plan.dropped),
        "share": plan.share,
        "bytes": plan.nbytes,
        "memory_bytes": plan.memory,
    }


def _note_of(plan: Plan, output: Output) -> str:
    """What servers of the target do to the scales, and which loader does not read the result."""
    note = output.note_of(plan.format)
    experts = any(task.quantize and is_expert(task.name) for task in plan.tasks)
    if experts and plan.format == "int8-channel":
        return f"{note}; {_INT8_EXPERTS}"
    stacks = any(task.quantize and len(task.tuned.shape) > 2 for task in plan.tasks)
    unloaded = is_unloaded(plan.config, stacks)
    return f"{note}; transformers does not load models of this type in {plan.format}" if unloaded else note


def _show(plan: Plan, output: Output, console: Console) -> None:
    console.print(table_of(plan, f"{output.target}: {_note_of(plan, output)}"))
    if warning_of(plan):
        console.print(warning_of(plan), highlight=False)


def _show_names(names: Mapping[str, str], whose: str, console: Console) -> None:
    """Says which tensors of the result have another name in base or tuned, as `whose` says."""
    for name, there in list(names.items())[:1]:
        words = f"{len(names)} tensors have another name in {whose}, such as {name} there {there}"
        console.print(on_one_line(words), highlight=False, markup=False)


def _show_doubt(before: Folder, after: Folder, plan: Plan, console: Console) -> None:
    """Says where base and tuned look swapped or unrelated; an adapter on its base can be neither."""
    chosen = [task.name for task in plan.tasks if task.quantize and after.overlay is None]
    if doubt := doubt_of(patches_of_folders(before, after, chosen)):
        console.print(doubt, highlight=False, markup=False)


def _show_side_files(store: FolderStore, console: Console) -> None:
    """Shows what becomes of the files beside the weights."""
    beside = store.side_files
    card = " (with the text of the tuned model's)" if beside.card else ""
    written = ", ".join(name + card * (name == CARD) for name in store.written)
    lines = [f"files copied: {', '.join(map(str, beside.copied)) or 'none'}", f"files written: {written}"]
    lines += [f"file left out: {name}: {why}" for name, why in beside.left_out.items()]
    for line in lines:
        console.print(on_one_line(line), highlight=False, markup=False)


def _refuse_same(out: Path, base: Path, tuned: Path) -> None:
    here = out.resolve()
    for folder in (base, tuned):
        there = folder.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise DaqError(f"{out}: must neither be an input, nor lie in one, nor hold one: {folder}.")
    if out.exists() and not out.is_dir():
        raise DaqError(f"{out}: is a file; needed a folder to write to.")
