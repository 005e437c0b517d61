"""Jobs stopped at their file operations: the same call must give what an undisturbed one gives.

    python -m benchmarks stops

Each job of a tiny model is stopped before every operation that changes a file, after it, and halfway through
every write. Then the same call must complete it, with the bytes of an undisturbed run; nothing that looks
complete may be there before. Some runs are stopped a second time while they go on, and some lose all that was
not synced, as by a loss of power.
"""

import logging
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, provenance, results, table, write
from tests.stopped_jobs import Job, Trial, folder_jobs, orbax_jobs
from tests.stops import out_of_order

HEADS = ("job", "operations", "places", "stopped at", "stopped twice", "power lost", "faults")


def outcome_of(job: Job, root: Path, *, every: int, twice: int) -> dict[str, Any]:
    """Stops a job at every `every`-th place, at `twice` pairs of places, and without power at as many."""
    trial = Trial(job, root)
    points, draw = list(trial.points()), random.Random(0)
    begun, faults = time.monotonic(), out_of_order(trial.own)
    single = points[::every]
    for point in single:
        faults += trial.stop(point)
    pairs = [draw.sample(points, 2) for _ in range(twice)]
    for pair in pairs:
        faults += trial.stop(*pair)
    lost = draw.sample(points, 2 * twice)
    for point in lost:
        faults += trial.stop(point, power=True)
    counts = (len(trial.operations), len(points), len(single), len(pairs), len(lost))
    seconds = round(time.monotonic() - begun, 1)
    return {"job": job.name, **dict(zip(HEADS[1:-1], counts, strict=True)), "faults": faults, "s": seconds}


def study(quick: bool = False, every: int = 4, twice: int = 20, out: Path | None = None) -> int:
    """Goes through the places at which jobs can be stopped. Returns 1 if one was not completed.

    Args:
        quick: try a few places only.
        every: of Orbax, whose jobs take longer, stop at every such place; of folders, at all.
        twice: pairs of places at which a job is stopped twice; of Orbax, a quarter of it.
        out: folder for the results; None for that of the repository.
    """
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"  # the date in model cards
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of Orbax, whose threads are stopped too
    found = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for jobs, step, pairs in ((folder_jobs, 1, twice), (orbax_jobs, every, twice // 4)):
            for job in jobs(here):
                how = {"every": 50, "twice": 1} if quick else {"every": step, "twice": pairs}
                found.append(outcome_of(job, here / "work", **how))
                print(found[-1], flush=True)
    report = environment() | {"jobs": found}
    write(results(out, quick) / "stops.json", report, markdown_of(report))
    return int(any(outcome["faults"] for outcome in found))


def markdown_of(report: dict[str, Any]) -> str:
    """The table."""
    found = report["jobs"]
    rows = [[*(one[head] for head in HEADS[:-1]), len(one["faults"])] for one in found]
    totals = [sum(row[i] for row in rows) for i in range(1, len(HEADS))]
    tried = sum(one[head] for one in found for head in HEADS[3:-1])
    words = (
        f"{tried} runs stopped at file operations and called again, {totals[-1]} faults. A fault is any "
        "exception, a result that looks complete before it is, a byte that differs from that of an "
        "undisturbed run (of Orbax, which draws file names at random: of an array that loads), a file left "
        "behind, or a rename without the syncs that a loss of power asks for. Operations are those that "
        "change files; a place is before or after one, or halfway through a write. Where power is lost, only "
        "what was synced stays."
    )
    body = table(HEADS, [*rows, ["all", *totals]])
    return f"# Stops\n\n{words}\n\n{body}\n\n{provenance(report)}\n"


COMMANDS = {"stops": study}
