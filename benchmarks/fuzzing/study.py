"""Coverage-guided fuzzing of all that reads the files of others.

    pip install atheris
    python -m benchmarks fuzz --minutes 60

Readers are those of `tests/readers.py`, and take the time in `SHARES`, one after another. Each gives a
result or raises a `DaqError`, whatever the bytes are; another exception is a crash, and a call that takes
more than a second of its thread a hang. Memory above the bound ends a reader's process, and is a crash too.
Inputs that reach something new are kept in `tests/corpus`, as few as reach it all, and a test tries them.
"""

import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import daq_jax
from benchmarks import common
from tests.readers import CORPUS, READERS, Reader

LONGEST = 8192  # bytes of an input
MEMORY = 1500  # MB of a reader's process, of which JAX and the interpreter take 250
STUCK = 20  # seconds after which a call is given up
SHARES = {"adapter": 3, "adapter_names": 3, "report": 3}  # of the time; others, which are faster, get one
HEADS = ("reader", "executions", "read", "refused", "crashes", "hangs", "slowest_s", "peak_mb", "kept")
_STATUS = {70: "hangs", 71: "crashes", 77: "crashes"}  # by which libFuzzer says that it gave up


def fuzz_one(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Fuzzes a reader for some time, anew where it was given up. Returns counts and findings."""
    found: dict[str, Any] = dict.fromkeys(HEADS[1:-1], 0)
    end, findings = time.monotonic() + seconds, set[str]()
    while (left := int(end - time.monotonic())) > 0:
        how = [f"-max_total_time={left}", f"-max_len={LONGEST}", f"-timeout={STUCK}", "-mutate_depth=2"]
        how += ["-print_final_stats=1", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={folder}/"]
        words = [sys.executable, "-m", "benchmarks.fuzzing.engine", name, str(folder), *how]
        done = subprocess.run(words, cwd=common.ROOT, stderr=subprocess.PIPE, text=True, errors="replace")
        counts = json.loads((folder / "counts.json").read_text())
        for key, value in counts.items():
            found[key] = max(found[key], value) if key == "slowest_s" else found[key] + value
        peaks = [x.split()[-1] for x in done.stderr.splitlines() if x.startswith("stat::peak_rss_mb")]
        found["peak_mb"] = max([found["peak_mb"], *map(int, peaks)])
        if done.returncode:
            found[_STATUS.get(done.returncode, "crashes")] += 1
            findings.add(f"given up with status {done.returncode}")
    findings |= {path.read_text() for path in folder.glob("findings/*.txt")}
    return {"reader": name, **found, "findings": sorted(findings)}


def fewest(reader: Reader, inputs: Iterable[bytes]) -> list[bytes]:
    """Of some inputs, the shortest first, those that take a step that none before them took.

    A step is from one line of `daq_jax.io` to another. Lines are counted by Python, and not by atheris, which
    counts branches.
    """
    source = str(Path(daq_jax.__file__).parent / "io")
    steps, before = set[tuple[str, int, int]](), {"line": 0}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(source):
            return None
        steps.add((file, before["line"], frame.f_lineno))
        before["line"] = frame.f_lineno
        return trace

    reached, kept = set[tuple[str, int, int]](), list[bytes]()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        steps.clear()
        before["line"] = 0
        sys.settrace(trace)
        with contextlib.suppress(Exception):  # of inputs that crash, which are kept as well
            reader.read(data)
        sys.settrace(None)
        if steps - reached:
            reached |= steps
            kept.append(data)
    return kept


def studied(name: str, seconds: float, keep: bool) -> dict[str, Any]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / name
        row = fuzz_one(name, here, seconds)
        inputs = [path.read_bytes() for path in (here / "corpus").iterdir()]
        kept = fewest(READERS[name](here / "scratch"), inputs)
    if keep:
        CORPUS.mkdir(exist_ok=True)
        texts = [data.decode("latin-1") for data in kept]
        (CORPUS / f"{name}.json").write_text(json.dumps(texts, indent=0) + "\n")
    row |= {"reached_new": len(inputs), "kept": len(kept)}
    print(json.dumps(row), flush=True)
    return row


def study(
    minutes: float = 60,
    reader: str | None = None,
    processes: int = 1,
    out: Path | None = None,
    quick: bool = False,
) -> int:
    """Fuzzes each reader, and keeps the inputs that reach most. Returns 1 if there was a crash or a hang.

    Args:
        minutes: of all readers together.
        reader: only this one; its inputs are kept, and no table is written.
        processes: readers that are fuzzed at a time.
        out: folder for the table; None for that of the repository.
        quick: some seconds for each, and nothing is kept.
    """
    names = [reader] if reader else list(READERS)
    shares = [SHARES.get(name, 1) for name in names]
    seconds = [3.0 if quick else 60 * minutes * share / sum(shares) for share in shares]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(studied, names, seconds, [not quick] * len(names)))
    report = common.environment() | {"minutes": sum(seconds) / 60, "readers": rows}
    if not reader:
        common.write(common.results(out, quick) / "fuzz.json", report, markdown_of(report))
    return int(any(row["crashes"] or row["hangs"] for row in rows))


def markdown_of(report: dict[str, Any]) -> str:
    """The table."""
    rows = [[row[head] for head in HEADS] for row in report["readers"]]
    sums = [sum(row[i] for row in rows) for i in range(1, 6)]
    most = [max(row[i] for row in rows) for i in (6, 7)]
    words = (
        f"{sums[0]} inputs in {report['minutes']:.0f} minutes, {sums[3]} crashes, {sums[4]} hangs. "
        "An input is read, or refused with a `DaqError`. Any other exception is a crash, and so is memory of "
        f"the process above {MEMORY} MB; a call of more than a second is a hang. Kept are the inputs in "
        "`tests/corpus`, which `tests/io/test_corpus.py` tries."
    )
    body = common.table(HEADS, [*rows, ["all", *sums, *most, sum(row[-1] for row in rows)]])
    found = [f"- {row['reader']}: {finding}" for row in report["readers"] for finding in row["findings"]]
    body += "\n\nFindings:\n\n" + "\n".join(found) if found else ""
    return f"# Fuzzing\n\n{words}\n\n{body}\n\n{common.provenance(report)}\n"


COMMANDS = {"fuzz": study}
