"""The command `daq-jax`: arguments to values, values to calls.

Each subcommand is a function whose keyword arguments are its options; `COMMANDS` is the table of all of them.
What a command needs is imported when it runs, so that `daq-jax --help` answers at once.

Exit status: 0 done, 1 failed or the gate is not met, 2 wrong usage, 3 there is a gate and no figures to hold
against it, 130 stopped by Ctrl-C. A fault of the caller or of the disk is one line on stderr; any other
exception is a fault of the library and is shown whole.
"""

import contextlib
import importlib
import io
import json as json_format
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from daq_jax.display import interrupts, usage
from daq_jax.errors import CannotJudge, DaqError, refuse
from daq_jax.io.disk.compilation_cache import enable_compilation_cache
from daq_jax.io.hf.layouts import AS_BASE, LAYOUTS
from daq_jax.recipes import DENSITY_RECIPES, RECIPES
from daq_jax.version import __version__

FORMATS = (AS_BASE, *LAYOUTS)
Patterns = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATTERN")]


def demo(*, seed: int = 0, json: bool = False) -> None:
    """Make a small real pair, quantize it by each recipe, and show what each keeps. Downloads nothing.

    Trains a byte-level model on Lincoln, rounds it to FP8 as a model that ships in FP8 is, and tunes it
    on Macbeth. Takes about two minutes on two CPU cores.

    Args:
        seed: of the first weights and of the batches.
        json: print one JSON object and nothing else.
    """
    from rich.console import Console

    from daq_jax.demo import run

    found = run(Console(), seed=seed, json=json)
    if json:
        print(json_format.dumps(found, allow_nan=False))


def quantize(
    base: Annotated[Path, tyro.conf.arg(metavar="BASE")],
    tuned: Annotated[Path, tyro.conf.arg(metavar="TUNED")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    recipe: Literal[*RECIPES, *DENSITY_RECIPES] = "default",
    format: Literal[*FORMATS] | None = None,
    target: Literal["hopper", "blackwell", "tpu"] = "hopper",
    memory: float | None = None,
    plan: bool = False,
    missing_base: Literal["error", "absmax"] = "error",
    tp: int = 1,
    base_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    shard: str = "1/1",
    overwrite: bool = False,
    custom_code: bool = False,
    keep: Patterns = (),
    only: Patterns = (),
    rules: str | None = None,
    json: bool = False,
) -> None:
    """Quantize a checkpoint folder against the one it was tuned from, in bounded memory.

    The result is a folder that transformers, vLLM, SGLang or tpu-inference load. If it is killed, the same
    command goes on where it stopped.

    Args:
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        out: folder to write.
        recipe: what is searched and how codes are rounded. Files have no place for the zeros of the density
            recipes, which are refused.
        format: how weights are stored. None is as-base where BASE is quantized: each tensor in the coding
            that it has there; else what suits the target. mxfp4, mxfp8, nvfp4 and the groups of integers are
            those of compressed-tensors.
        target: who serves the result.
        memory: GB that the process may take; None for a quarter of the machine's.
        plan: say what would be done, and stop.
        missing_base: what becomes of weights that base lacks.
        tp: number of devices over which a server will divide each weight.
        base_dtype: that an FP8 input is dequantized to; None for the tuned model's own.
        shard: I/N writes every N-th file, from the I-th on, while other processes write the others; the last
            process to end completes the folder.
        overwrite: replace what an earlier call wrote to OUT; files of others stay, or are refused.
        custom_code: copy Python files of the tuned model too.
        keep: regular expression, found in the names of weights that stay as they are; may be given often.
        only: regular expression, found in the names of the only weights to quantize; may be given often.
        rules: for Orbax checkpoints, which leaves are quantized and which axes are inputs: default, maxtext,
            tunix, gemma, hf or keras; or a TOML file, as `daq_jax.rules.files` describes it.
        json: print one JSON object, the report, and nothing else.
    """
    from rich.console import Console

    from daq_jax.io.jobs.quantize_folders import quantize_folder
    from daq_jax.rules import rules_called

    found = quantize_folder(
        base,
        tuned,
        out,
        (RECIPES | DENSITY_RECIPES)[recipe],
        format=format,
        target=target,
        memory_gb=memory,
        missing_base=missing_base,
        tp=tp,
        base_dtype=base_dtype,
        shard=_shard(shard),
        overwrite=overwrite,
        custom_code=custom_code,
        keep=keep,
        only=only,
        rules=None if rules is None else rules_called(rules),
        plan_only=plan,
        console=Console(quiet=json),
    )
    if json:
        print(json_format.dumps(found, allow_nan=False))


def inspect(
    base: Annotated[Path, tyro.conf.arg(metavar="BASE")],
    tuned: Annotated[Path, tyro.conf.arg(metavar="TUNED")],
    /,
    *,
    recipe: Literal[*RECIPES] = "default",
    format: Literal[*FORMATS] | None = None,
    keep: Patterns = (),
    only: Patterns = (),
    json: bool = False,
) -> None:
    """Say from a sample what a fine-tune would lose, before anything is quantized. Takes seconds.

    Is the base on the grid of the format, how large is the change, what would AbsMax keep of it, and what
    the recipe; each figure with how far it may be off.

    Args:
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        recipe: what to hold against AbsMax.
        format: how weights would be stored; None for as BASE is, or fp8-block where BASE is not quantized.
        keep: regular expression, found in the names of weights that would stay; may be given often.
        only: regular expression, found in the names of the only weights to look at; may be given often.
        json: print one JSON object and nothing else.
    """
    from daq_jax.display import terminal
    from daq_jax.io.jobs.inspect_folders import inspect_folder

    with terminal.working("looking at a sample of the weights"):
        found = inspect_folder(base, tuned, RECIPES[recipe], format=format, keep=keep, only=only)
    if json:
        print(json_format.dumps(found.to_dict(), allow_nan=False))
    else:
        terminal.show(found.sheet(), terminal.console())


def compare(
    base: Annotated[Path, tyro.conf.arg(metavar="BASE")],
    tuned: Annotated[Path, tyro.conf.arg(metavar="TUNED")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    fail_under: str = "",
    json: bool = False,
    csv: bool = False,
) -> None:
    """Say what a quantized folder kept of a fine-tune, from its stored codes, whoever wrote it.

    Args:
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        out: folder of the quantized model: FP8, int8 or packed int4 with scales, as we, transformers,
            compressed-tensors and others write it.
        html: also write a page with pictures and a table that sorts to this file.
        fail_under: exit with status 1 if a total is lower, such as projection=0.95,cosine=0.3, or that of
            any weight, as in worst.projection=0.8; of mse, lost and flipped, if it is higher. The same if
            OUT lacks a tensor of TUNED, or altered one without quantizing it. Status 3 if it cannot be told.
        json: print one JSON object and nothing else.
        csv: print comma-separated values and nothing else, a line a weight.
    """
    from rich.console import Console

    from daq_jax.analysis.gates import floors_of, refuse_low
    from daq_jax.display import terminal
    from daq_jax.io.jobs.compare_folders import compare_folders, facts_of_folders
    from daq_jax.io.jobs.kept_tensors import faults_of_folder
    from daq_jax.io.jobs.progress import progress_on

    if json and csv:
        _wrong("`--json` and `--csv` exclude each other.")
    try:
        floors = floors_of(fail_under)
    except DaqError as error:
        _wrong(f"`--fail-under`: {error}")
    page = _page_for(html) if html else None  # before the work, as it may be impossible
    with contextlib.ExitStack() as stack:

        def tell(total: int) -> Callable[..., None]:
            return stack.enter_context(progress_on(Console(stderr=True), total)).tell

        try:
            found = compare_folders(base, tuned, out, details=html is not None, tell=tell)
            faults = faults_of_folder(base, tuned, out) if floors else []
        except (OSError, DaqError) as error:
            if not floors:
                raise
            raise CannotJudge(str(error)) from error
    if html and page:
        facts = facts_of_folders(base, tuned, out)
        html.write_text(page(found, title=f"What {out.name} kept", facts=facts), encoding="utf-8")
        print(f"daq-jax: wrote {html}", file=sys.stderr)
    if json:
        print(json_format.dumps(found.to_dict(), allow_nan=False))
    elif csv:
        print(terminal.comma_separated(found), end="")
    else:
        terminal.show(found.sheet(), terminal.console())
    if not floors:
        return
    if faults:
        headline = f"the gate is not met: {out} is not whole"
        refuse(headline, faults, "Quantize the tuned model again.", one_line=True)
    print(f"daq-jax: {refuse_low(found, floors)}", file=sys.stderr)


def doctor(*, json: bool = False) -> None:
    """Say what is installed, what the machine has, and what runs where. For a bug report, too.

    Versions, devices and their memory, whether GPU kernels are used and why not, the cache of compiled
    programs, threads, and packages that are missing with the line that installs them.

    Args:
        json: print one JSON object and nothing else.
    """
    from daq_jax.display.doctor import examine, text

    found = examine()
    print(json_format.dumps(found) if json else text(found))


def _page_for(file: Path) -> Callable[..., str]:
    """What makes a page, if it can be made here and written to a file."""
    if not file.parent.is_dir():
        _wrong(f"`--html`: {file.parent} is not a folder; make it first, or name a file in another.")
    if file.is_dir():
        _wrong(f"`--html`: {file} is a folder; needed the name of a file.")
    try:
        return importlib.import_module("daq_jax.display.page").page
    except ImportError as error:
        if "daq-jax[plot]" not in str(error):  # not the missing extra
            raise
        _wrong(f"`--html`: {error}")


def _wrong(message: str) -> NoReturn:
    print(f"daq-jax: {message}", file=sys.stderr)
    raise SystemExit(2)


def _shard(given: str) -> tuple[int, int]:
    first, slash, last = given.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal()):
        raise DaqError(f"`--shard` must be I/N, such as 1/4; got {given!r}.")
    return int(first), int(last)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "quantize": quantize,
    "inspect": inspect,
    "compare": compare,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        args: the arguments after `daq-jax`; None for the arguments of the process.

    Returns:
        The exit status: 0, 1, 3 or 130.

    Raises:
        SystemExit: with 2 if the arguments make no sense, with 0 after `--help`.
    """
    words = list(sys.argv[1:] if args is None else args)
    return interrupts.run(partial(_run, words), words, whole_process=args is None)


def _run(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter of a tensor's name
        sys.stdout.reconfigure(errors="backslashreplace")
    if words == ["--version"]:
        print(f"daq-jax {__version__}")
        return 0
    if fault := usage.fault_of(words, COMMANDS, interrupts.COMMAND):
        print(fault, file=sys.stderr)
        raise SystemExit(2)
    config = (tyro.conf.FlagCreatePairsOff,)
    if not words or words[0] not in COMMANDS:  # prints what is missing, or the help, and exits
        about = "Quantization that keeps what fine-tuning changed. `--version` prints the version."
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog=interrupts.COMMAND, description=about, args=words, config=config
        )
    enable_compilation_cache()
    # The default inverts matrices of 128 x 128, and threads waited 8 ms for each other at each.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    command, *options = words
    try:  # by itself, so that messages name its own help
        tyro.cli(COMMANDS[command], prog=f"{interrupts.COMMAND} {command}", args=options, config=config)
    except (OSError, DaqError) as error:
        print(f"daq-jax: {error}", file=sys.stderr)
        return 3 if isinstance(error, CannotJudge) else 1
    return 0
