"""Killed, shared among processes, or asked of a folder that is not ours: what is on the disk stays right."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax.io.jobs.options import Output, Run
from daq_jax.io.jobs.quantize_folders import open_job
from tests import stores
from tests.hf_folders import in_shards, llama, tuned_from, write_folder

ABSMAX = daq.recipes.absmax


@pytest.fixture
def pair(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    base = llama()
    tuned = write_folder(tmp_path / "tuned", in_shards(tuned_from(base), 4))
    return write_folder(tmp_path / "base", [base]), tuned


def run(pair, out, recipe=ABSMAX, **options) -> dict:
    return daq.quantize_folder(*pair, out, recipe, memory_gb=2, **options)


@contextlib.contextmanager
def opened(pair, out, **output):
    """The job of `run`, whose store a test may replace."""
    console = Console(quiet=True)
    with open_job(*pair, out, ABSMAX, Output(**output), Run(memory_gb=2), console) as job:
        yield job


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def flip_last_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def run_until_third_file(pair, out, **options) -> None:
    """A process that ends once its third file is written, before it is recorded."""
    with pytest.raises(Stopped), opened(pair, out, **options) as job:
        dataclasses.replace(job, store=stores.Stopped(job.store, at=3, error=Stopped)).run()


@pytest.mark.parametrize("layout", ["fp8-block", pytest.param("int4-group", marks=pytest.mark.slow)])
def test_the_same_call_goes_on_where_it_stopped(layout, pair, tmp_path):
    run_until_third_file(pair, tmp_path / "out", format=layout)
    assert not (tmp_path / "out" / "config.json").exists()
    done = [tmp_path / "out" / f"model-0000{i}-of-00004.safetensors" for i in (1, 2)]
    before = [path.stat().st_mtime_ns for path in done]
    run(pair, tmp_path / "out", format=layout)
    run(pair, tmp_path / "whole", format=layout)
    assert [path.stat().st_mtime_ns for path in done] == before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_work_than_that_begun_is_refused(pair, tmp_path):
    run_until_third_file(pair, tmp_path / "out")
    with pytest.raises(ValueError, match="other inputs, settings or versions"):
        run(pair, tmp_path / "out", daq.Recipe(search=daq.Grid(0.9, 1.1, 2)))
    flip_last_bit(pair[0] / "model.safetensors")
    with pytest.raises(ValueError, match=r"other inputs, settings or versions \(input base/model\.safetens"):
        run(pair, tmp_path / "out")
    run(pair, tmp_path / "out", overwrite=True)
    run(pair, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_input_that_was_touched_or_copied_is_the_same_input(pair, tmp_path):
    run_until_third_file(pair, tmp_path / "out")
    for folder in pair:
        moved = shutil.move(folder, f"{folder}_moved")
        shutil.copytree(moved, folder)
        for file in folder.iterdir():
            file.chmod(0o600)
            os.utime(file)
    run(pair, tmp_path / "out")
    run(pair, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_change_while_the_job_reads_stops_it_and_what_it_did_is_of_no_use(pair, tmp_path):
    changed = pair[1] / "model-00002-of-00004.safetensors"

    def flip(unit: str) -> None:
        if unit.startswith("model-00003"):
            flip_last_bit(changed)
            os.utime(changed, ns=(0, 0))

    with opened(pair, tmp_path / "out") as job, pytest.raises(ValueError, match="tuned/model-00002-of-00004"):
        dataclasses.replace(job, store=stores.Damaged(job.store, flip)).run()
    assert not (tmp_path / "out" / "config.json").exists()
    flip_last_bit(changed)  # back to what it was; what is there may be of the other
    with pytest.raises(ValueError, match="begun with other inputs"):
        run(pair, tmp_path / "out")


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "removed"])
def test_a_finished_file_that_was_damaged_is_written_anew(how, pair, tmp_path):
    run_until_third_file(pair, tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00004.safetensors"
    if how == "flipped":
        flip_last_bit(file)
    elif how == "removed":
        file.unlink()
    else:
        os.truncate(file, 0 if how == "empty" else 1000)
    run(pair, tmp_path / "out")
    run(pair, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "config.json", "tokenizer.json"])
def test_a_complete_folder_that_was_damaged_is_not_called_complete(name, pair, tmp_path):
    (pair[1] / "tokenizer.json").write_text("{}")
    run(pair, tmp_path / "out")
    flip_last_bit(tmp_path / "out" / name)
    with pytest.raises(ValueError, match=rf"was complete and is so no more.*{name}.*--overwrite"):
        run(pair, tmp_path / "out")
    run(pair, tmp_path / "out", overwrite=True)
    run(pair, tmp_path / "out")


@pytest.mark.parametrize("report", ["{}", '{"fingerprint": 1}', '{"files": {}}', "[", '{"files": "x"}'])
def test_a_report_that_makes_no_sense_is_refused(report, pair, tmp_path):
    made = run(pair, tmp_path / "out")
    if report.startswith('{"files'):
        report = json.dumps({"fingerprint": made["fingerprint"], **json.loads(report)})
    (tmp_path / "out" / "daq_report.json").write_text(report)
    with pytest.raises(ValueError, match=r"other inputs, settings or versions|does not list its files"):
        run(pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("crc32", {"lm_head.weight": "x"}, "does not list the checksums"),
        ("crc32", [1], "does not list the checksums"),
        ("files", "\0", "embedded null"),
    ],
)
def test_a_report_whose_parts_make_no_sense_is_refused(key, value, said, pair, tmp_path):
    report = run(pair, tmp_path / "out")
    report[key] = {**report[key], value: {}} if key == "files" else value
    (tmp_path / "out" / "daq_report.json").write_text(json.dumps(report))
    with pytest.raises(daq.DaqError, match=said):
        run(pair, tmp_path / "out")


def test_a_record_that_was_altered_is_not_believed(pair, tmp_path):
    run_until_third_file(pair, tmp_path / "out")
    record = tmp_path / "out" / ".daq" / "model-00001-of-00004.safetensors.json"
    altered = json.loads(record.read_text())
    for sums in altered["figures"].values():
        sums.clear()
    record.write_text(json.dumps(altered))
    run(pair, tmp_path / "out")
    run(pair, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_one_process_at_a_time_writes_a_folder(pair, tmp_path):
    with opened(pair, tmp_path / "out") as job:

        def another(unit: str) -> None:
            with pytest.raises(ValueError, match="another process is at work on it"):
                run(pair, tmp_path / "out", daq.Recipe(search=daq.Grid(0.9, 1.1, 2)), overwrite=True)

        dataclasses.replace(job, store=stores.Damaged(job.store, another)).run()
    run(pair, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_share_says_what_is_missing(pair, tmp_path):
    console = Console(record=True, width=200)
    run(pair, tmp_path / "out", shard=(2, 3), console=console)
    assert "is not complete yet: 1 of 4 files are written" in console.export_text()


def test_overwrite_removes_what_a_job_wrote_and_refuses_what_it_did_not(pair, tmp_path):
    out = tmp_path / "out"
    (pair[1] / "tokenizer.json").write_text("{}")
    run(pair, out)
    (pair[1] / "tokenizer.json").unlink()
    (out / "mine.txt").write_text("mine")
    run(pair, out, overwrite=True)
    run(pair, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole") | {"mine.txt": b"mine"}
    (out / "mine.safetensors").write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match=r"no call of daq-jax wrote: 'mine\.safetensors'"):
        run(pair, out, overwrite=True)
    assert contents(out) == before


def test_a_folder_of_another_tool_is_not_overwritten(pair, tmp_path):
    write_folder(tmp_path / "out", [llama()])
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"no call of daq-jax wrote: 'config\.json'; 'model\.safetensors'"):
        run(pair, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_overwrite_follows_no_link_out_of_the_folder(pair, tmp_path):
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    run(pair, out)
    report = json.loads((out / "daq_report.json").read_text())
    (out / "link").symlink_to(home)
    report["files"] |= {"link/thesis.txt": {}, "../home/thesis.txt": {}, str(home / "thesis.txt"): {}}
    (out / "daq_report.json").write_text(json.dumps(report))
    run(pair, out, overwrite=True)
    assert (home / "thesis.txt").read_text() == "mine"


def test_complete_work_is_not_done_again(pair, tmp_path):
    report = run(pair, tmp_path / "out")
    with opened(pair, tmp_path / "out") as job:
        again = dataclasses.replace(job, store=stores.Stopped(job.store, at=1, error=Stopped)).run()
    assert again["crc32"] == report["crc32"]


def test_shares_give_the_bytes_of_one_process_and_the_last_completes_the_folder(pair, tmp_path):
    run(pair, tmp_path / "whole")
    for i in (3, 1):
        assert "total" not in run(pair, tmp_path / "out", shard=(i, 3))
        assert not (tmp_path / "out" / "config.json").exists()
    assert "total" in run(pair, tmp_path / "out", shard=(2, 3))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_another_process_is_writing_is_left_to_it(pair, tmp_path):
    run_until_third_file(pair, tmp_path / "out")
    lock = tmp_path / "out" / ".daq" / "model-00003-of-00004.safetensors.lock"
    words = (
        f"import fcntl; f = open({str(lock)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is at work on model-00003"):
            run(pair, tmp_path / "out")
    finally:
        other.communicate(b"\n")


def test_a_folder_that_is_not_ours_is_left_alone(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files; pass an empty folder, or --overwrite"):
        run(pair, tmp_path / "out")
    run(pair, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["base", "tuned", "base/inside", "."])
def test_out_may_have_nothing_to_do_with_the_inputs(where, pair, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="must neither be an input, nor lie in one, nor hold one"):
        run(pair, tmp_path / where, overwrite=True)
    assert contents(tmp_path) == before


def test_a_full_disk_is_noticed_before_any_work(pair, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs 0\.1 GB of disk and 0\.0 GB are free"):
        run(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_on_the_disk_is_held_to_what_was_written(pair, tmp_path):
    def damage(unit: str) -> None:
        flip_last_bit(tmp_path / "out" / unit)

    with (
        opened(pair, tmp_path / "out") as job,
        pytest.raises(OSError, match=r"model-00001-of-00004\.safetensors: tensor .* is not what was written"),
    ):
        dataclasses.replace(job, store=stores.Damaged(job.store, damage)).run()


PROCESS = "import sys; from daq_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def start(pair, out, *words: str) -> subprocess.Popen:
    command = ["quantize", *map(str, pair), str(out), "--recipe", "absmax", "--memory", "2", *words]
    return subprocess.Popen([sys.executable, "-c", PROCESS, *command], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_twenty_moments_the_folder_is_that_of_an_undisturbed_run(tmp_path):
    base = llama(layers=12)
    pair = (
        write_folder(tmp_path / "base", in_shards(base, 3)),
        write_folder(tmp_path / "tuned", in_shards(tuned_from(base), 8)),
    )
    assert start(pair, tmp_path / "compiled").wait() == 0  # what it compiles is read by the runs that follow
    begun = time.monotonic()
    assert start(pair, tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - begun
    draw, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        out, written, status = tmp_path / f"out{rounds}", {}, None
        while status is None:
            begun, process = time.monotonic(), start(pair, out)
            # Once enough was killed, one run is left in peace, so that what it finds is completed.
            limit = draw.uniform(0.3, 1.1) * seconds if kills < 20 else None
            status = wait_or_kill(process, limit)
            kills += status is None
            if status == 0:  # what was left to do took less time, and a loaded machine may have become quiet
                seconds = min(seconds, time.monotonic() - begun)
            for name, when in finished(out).items():
                assert written.setdefault(name, when) == when, f"{name} was done again"
        assert status == 0
        assert contents(out) == contents(tmp_path / "whole")
        rounds += 1


def wait_or_kill(process: subprocess.Popen, limit: float | None) -> int | None:
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None


def finished(out: pathlib.Path) -> dict[str, int]:
    """When each file with a record was written."""
    records = out.glob(".daq/*.safetensors.json")
    return {r.stem: (out / r.stem).stat().st_mtime_ns for r in records if not r.name.startswith(".")}


@pytest.mark.slow
def test_two_processes_at_once_give_the_bytes_of_one(pair, tmp_path):
    both = [start(pair, tmp_path / "out", "--shard", f"{i}/2") for i in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    assert start(pair, tmp_path / "whole").wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
