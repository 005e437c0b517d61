"""Jobs stopped before, at and after single file operations: the same call gives what an undisturbed one does.

`python -m benchmarks stops` goes through all operations.
"""

import gc
import os
import random

import pytest

from tests.stopped_jobs import FOLDER_JOBS, ORBAX_JOBS, Job, Trial, folder_jobs, orbax_jobs
from tests.stops import Disk, Killed, out_of_order


@pytest.fixture(autouse=True)
def one_date(monkeypatch):
    """Model cards of two days have other bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    here = tmp_path_factory.mktemp("inputs")
    return {job.name: job for job in (*folder_jobs(here), *orbax_jobs(here))}


def test_the_disk_is_what_it_says(tmp_path):
    """Before, halfway, after: what is on the disk, and what of it a loss of power leaves."""

    def write() -> None:
        file = os.open(tmp_path / "a", os.O_CREAT | os.O_WRONLY)
        os.write(file, b"1234")
        os.fsync(file)
        os.rename(tmp_path / "a", tmp_path / "b")

    found = []
    for point in ((0, "before"), (1, "before"), (1, "halfway"), (1, "after"), (3, "before"), (3, "after")):
        disk = Disk(tmp_path, *point)
        with pytest.raises(Killed), disk.watched():
            write()
        found.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
        assert disk.durable.synced == {}  # the folder was not synced
        for path in tmp_path.iterdir():
            path.unlink()
    assert found == [{}, {"a": b""}, {"a": b"12"}, {"a": b"1234"}, {"a": b"1234"}, {"b": b"1234"}]


@pytest.mark.parametrize("name", [FOLDER_JOBS[0], FOLDER_JOBS[1], ORBAX_JOBS[1], ORBAX_JOBS[2]])
def test_what_is_renamed_is_on_the_disk_before_and_its_folder_after(name, jobs, tmp_path):
    trial = Trial(jobs[name], tmp_path / "work")
    assert {"rename", "exchange"} & {step.kind for step in trial.own}
    assert out_of_order(trial.own) == []


def test_an_order_that_loses_files_is_seen(jobs, tmp_path):
    trial = Trial(jobs["adapter"], tmp_path / "work")
    renames = [step for step in trial.operations if step.kind == "rename"]
    assert len(renames) > 5
    for rename in renames:
        of_file = [step for step in trial.operations if (step.kind, step.path) != ("sync", rename.path)]
        assert f"{rename.path} is renamed before it is synced" in out_of_order(of_file)
    assert len(out_of_order([step for step in trial.operations if step.kind != "sync"])) > 10


@pytest.mark.parametrize(
    ("name", "every", "twice"),
    [
        ("adapter", 25, 1),
        *(pytest.param(name, 6, 3, marks=pytest.mark.slow) for name in FOLDER_JOBS),
        *(pytest.param(name, 40, 1, marks=pytest.mark.slow) for name in ORBAX_JOBS),
    ],
)
@pytest.mark.filterwarnings("ignore:Exception ignored")  # Orbax's threads and loops are killed too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_stopped_anywhere_a_job_is_completed_by_the_same_call(name, every, twice, jobs, tmp_path):
    """Also where the second run is stopped too, and where all that was not synced is lost."""
    trial = Trial(jobs[name], tmp_path / "work")
    points, draw = list(trial.points()), random.Random(0)
    assert len(points) > 2 * len(trial.operations) > 80
    found = [words for point in points[draw.randrange(every) :: every] for words in trial.stop(point)]
    for power in (False, True):
        for _ in range(twice):
            found += trial.stop(*draw.sample(points, 2), power=power)
    gc.collect()  # what was killed complains here
    assert found == []
