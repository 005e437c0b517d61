"""The most memory that a command takes, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

CAN_COUNT = pathlib.Path("/proc/self/status").exists()  # on Linux
# The peak that the system counts since the program was begun, and not what its parent had taken.
_RUN = """
import pathlib, sys
from daq_jax.cli import main
status = main(sys.argv[1:])
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line for line in lines if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(status)
"""


class Ran(NamedTuple):
    """What became of a command.

    Attributes:
        said: the JSON that it printed.
        peak: most bytes of memory that its process had.
    """

    said: dict[str, Any]
    peak: int


def run(*words: str | pathlib.Path) -> Ran:
    """Runs `daq-jax` with these words and `--json`, without programs that earlier runs compiled.

    Raises:
        RuntimeError: with what it printed, if its exit status is not 0.
    """
    command = [sys.executable, "-c", _RUN, *map(str, words), "--json"]
    # Tests split the processor into several devices, which a user's command does not.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_ENABLE_COMPILATION_CACHE": "false"
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"daq-jax {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr}")
    return Ran(json.loads(done.stdout), 1024 * int(done.stderr.splitlines()[-1]))
