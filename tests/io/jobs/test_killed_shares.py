"""Four processes share a folder job, and one of them is killed in the middle of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.hf_folders import in_shards, llama, tuned_from, write_folder

SHARES = 4
VICTIM = 3
# Killed when all bytes of its file are written, before the file has its name.
KILLED = """
import os, signal, sys
from daq_jax.cli import main
from daq_jax.io.hf.tensor_files import TensorWriter
TensorWriter.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""
SOUND = "import sys; from daq_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def start(program: str, *words: str | pathlib.Path) -> subprocess.Popen[str]:
    """`daq-jax quantize` in a process of its own; the date in its model card is fixed."""
    command = [
        sys.executable,
        "-c",
        program,
        "quantize",
        *map(str, words),
        "--recipe",
        "absmax",
        "--memory",
        "2",
    ]
    env = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and all that was printed, on one line."""
    out, err = process.communicate(timeout=300)
    return process.returncode, " ".join((out + err).split())


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files of a result; of its report and its card, which name the command, nothing but the figures."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
    del found["README.md"]
    report = json.loads(found.pop("daq_report.json"))
    return found | {"leaves": json.dumps(report["leaves"]).encode()}


@pytest.mark.slow
def test_of_four_shares_one_is_killed_and_the_same_call_completes_the_folder(tmp_path):
    base = llama(layers=1)
    pair = [
        write_folder(tmp_path / "base", [base]),
        write_folder(tmp_path / "tuned", in_shards(tuned_from(base), SHARES)),
    ]
    out = tmp_path / "out"
    whole = start(SOUND, *pair, tmp_path / "whole")
    shares = {
        i: start(KILLED if i == VICTIM else SOUND, *pair, out, "--shard", f"{i}/{SHARES}")
        for i in range(1, SHARES + 1)
    }
    outcomes = {i: ended(process) for i, process in shares.items()}
    assert outcomes.pop(VICTIM)[0] == -signal.SIGKILL
    for status, said in outcomes.values():
        assert status == 0, said
        assert f"of {SHARES} files are written" in said
    assert not {"config.json", "daq_report.json", "model.safetensors.index.json"} & {*os.listdir(out)}
    status, said = ended(start(SOUND, *pair, out, "--shard", f"{VICTIM}/{SHARES}"))
    assert status == 0, said
    assert ended(whole)[0] == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not [name for name in os.listdir(out) if name.startswith(".")]
