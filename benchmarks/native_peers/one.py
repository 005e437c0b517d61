"""One rule on one pair of folders, as a process of its own that prints its peak memory in bytes at the end.

It is called by `study`, with the name of a rule and three folders, or with the words of `daq-jax`.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.native_peers.installed import INSTALLED
from benchmarks.native_peers.rules import RULES
from tests.hf_folders import read_tensors, write_folder


def peak() -> int:
    """Peak memory of this program; unlike `ru_maxrss`, without that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(name: str, base: str, tuned: str, out: str) -> None:
    """Writes what a rule makes of a tuned model, in the layout of its base."""
    rule, before, found = (RULES | INSTALLED)[name], read_tensors(Path(base)), {}
    for weight, x in read_tensors(Path(tuned)).items():
        own = {n.removeprefix(weight): t for n, t in before.items() if n.startswith(weight)}
        found |= {weight + end: t for end, t in rule(x.astype(np.float32), own).items()}
    write_folder(Path(out), [found])


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        from daq_jax import cli

        assert cli.main(sys.argv[1:]) == 0
    else:
        main(*sys.argv[1:])
    print(f"\n{peak()}")
