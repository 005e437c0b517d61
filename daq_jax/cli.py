"""The command `daq-jax`: words to values, values to calls.

Each subcommand is a function whose keyword arguments are its options; `COMMANDS` is the table of them. What
a command needs is imported when it runs, so that `daq-jax --help` answers at once.

Exit status: 0 done, 1 failed, 2 wrong usage.
"""

import json as json_format
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from daq_jax import __version__
from daq_jax.recipes import RECIPES


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
    recipe: Literal[*RECIPES] = "default",
    format: Literal["fp8-block", "fp8-channel", "int8-channel"] | None = None,
    target: Literal["hopper", "blackwell", "tpu"] = "hopper",
    memory: float | None = None,
    plan: bool = False,
    missing_base: Literal["error", "absmax"] = "error",
    tp: int = 1,
    base_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    shard: str = "1/1",
    overwrite: bool = False,
    custom_code: bool = False,
    json: bool = False,
) -> None:
    """Quantize a checkpoint folder against the one it was tuned from, in bounded memory.

    The result is a folder that transformers, vLLM, SGLang or tpu-inference load. If it is killed, the same
    command goes on where it stopped.

    Args:
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        out: folder to write.
        recipe: what is searched and how codes are rounded.
        format: how weights are stored; None for what suits the target.
        target: who serves the result.
        memory: GB that the process may take; None for a quarter of the machine's.
        plan: say what would be done, and stop.
        missing_base: what becomes of weights that base lacks.
        tp: number of devices over which a server will divide each weight.
        base_dtype: that an FP8 input is dequantized to; None for the tuned model's own.
        shard: I/N does the I-th of N shares of the files; the last process to end completes the folder.
        overwrite: replace the checkpoint that is in OUT.
        custom_code: copy Python files of the tuned model too.
        json: print one JSON object, the report, and nothing else.
    """
    from rich.console import Console

    from daq_jax.io.folder_quantizer import quantize_folder

    found = quantize_folder(
        base,
        tuned,
        out,
        RECIPES[recipe],
        format=format,
        target=target,
        memory_gb=memory,
        missing_base=missing_base,
        tp=tp,
        base_dtype=base_dtype,
        shard=_share(shard),
        overwrite=overwrite,
        custom_code=custom_code,
        plan_only=plan,
        console=Console(quiet=json),
    )
    if json:
        print(json_format.dumps(found, allow_nan=False))


def _share(words: str) -> tuple[int, int]:
    first, slash, last = words.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"`--shard` must be I/N, such as 1/4; got {words!r}.")
    return int(first), int(last)


COMMANDS: dict[str, Callable[..., None]] = {"demo": demo, "quantize": quantize}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        args: the words after `daq-jax`; None for those of the process.

    Returns:
        The exit status, 0 or 1.

    Raises:
        SystemExit: with 2 if the words make no sense, with 0 after `--help`.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words == ["--version"]:
        print(f"daq-jax {__version__}")
        return 0
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="daq-jax",
            description="Quantization that keeps what fine-tuning changed. `--version` prints the version.",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (
        OSError,
        ValueError,
    ) as error:  # what was passed in is at fault; all else is shown whole
        print(f"daq-jax: {error}", file=sys.stderr)
        return 1
    return 0
