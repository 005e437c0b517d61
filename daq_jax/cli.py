"""The command `daq-jax`: words to values, values to calls.

Each subcommand is a function whose keyword arguments are its options; `COMMANDS` is the table of them. What
a command needs is imported when it runs, so that `daq-jax --help` answers at once.

Exit status: 0 done, 1 failed, 2 wrong usage.
"""

import json as json_format
import sys
from collections.abc import Callable, Sequence

import tyro

from daq_jax import __version__


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


COMMANDS: dict[str, Callable[..., None]] = {"demo": demo}


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
