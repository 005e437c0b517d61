"""One rule on one pair of folders, as a process of its own.

python -m benchmarks.native_peers.one RULE BASE TUNED OUT
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.native_peers.installed import INSTALLED
from benchmarks.native_peers.rules import RULES
from tests.hf_folders import read_tensors, write_folder


def main(name: str, base: str, tuned: str, out: str) -> None:
    """Writes what a rule makes of a tuned model, in the layout of its base."""
    rule, before, found = (RULES | INSTALLED)[name], read_tensors(Path(base)), {}
    for weight, x in read_tensors(Path(tuned)).items():
        own = {n.removeprefix(weight): t for n, t in before.items() if n.startswith(weight)}
        found |= {weight + end: t for end, t in rule(x.astype(np.float32), own).items()}
    write_folder(Path(out), [found])


if __name__ == "__main__":
    main(*sys.argv[1:])
