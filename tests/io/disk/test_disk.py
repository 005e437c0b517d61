"""Files that are whole or not there, locks with owners, links that lead out, folders that change places."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from daq_jax.io.disk import atomic, locks, swap
from daq_jax.io.disk.links import listed_below, stays_inside


def test_a_file_is_whole_or_not_there_and_follows_the_umask(tmp_path, monkeypatch):
    before = os.umask(0o002)
    try:
        atomic.write_text(tmp_path / "a.json", "one")
        (tmp_path / "source").write_bytes(b"two")
        assert atomic.copy_file(tmp_path / "source", tmp_path / "b") == atomic.checksum(tmp_path / "b")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b")} == {0o664}

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(tmp_path / "a.json", "another")
    assert (tmp_path / "a.json").read_text() == "one"


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.partial").symlink_to(tmp_path / "mine")
    (tmp_path / "a").symlink_to(tmp_path / "mine")
    atomic.write_text(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, n=name, f=real: (order.append(n), f(*x))[1])
    atomic.write_text(tmp_path / "a", "x")
    assert order == ["fsync", "replace", "fsync"]


def test_links_of_a_hub_cache_stay_inside_and_others_do_not(tmp_path):
    snapshot, blobs = tmp_path / "models--a/snapshots/12ab", tmp_path / "models--a/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").touch()
    (tmp_path / "secret").touch()
    for name, to in {
        "ok": "../../blobs/x",
        "out": tmp_path / "secret",
        "up": "../..",
        "lost": "nowhere",
    }.items():
        (snapshot / name).symlink_to(to)
    inside = {
        name: stays_inside(snapshot / name, snapshot) for name in ("ok", "out", "up", "lost", "up/secret")
    }
    assert inside == {"ok": True, "out": False, "up": False, "lost": True, "up/secret": False}
    names = ["fine", "../secret", str(tmp_path / "secret"), "up/secret", "", "sub/../../x"]
    assert listed_below(snapshot, names) == [snapshot / "fine"]


HOLD = """
import pathlib, sys
from daq_jax.io.disk.locks import one_writer
out = pathlib.Path(sys.argv[1])
with one_writer(out / ".daq", out, (1, int(sys.argv[2])), take_over=False):
    print("held", flush=True)
    input()
"""


def holder(out: pathlib.Path, n: int = 1) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLD, str(out), str(n)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def take(out: pathlib.Path, share: locks.Share = (1, 1), *, take_over: bool = False) -> None:
    with locks.one_writer(out / ".daq", out, share, take_over=take_over):
        pass


def test_a_lock_names_its_owner_and_falls_with_it(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(
        ValueError, match=rf"another process is at work on it \(process {process.pid} on .+ since"
    ):
        take(tmp_path, take_over=True)  # nobody takes the lock of a process that lives
    process.send_signal(signal.SIGKILL)
    process.communicate()
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shares_of_one_job_work_side_by_side_and_others_do_not(tmp_path):
    process = holder(tmp_path, 3)
    take(tmp_path, (2, 3))
    for other in [(1, 3), (2, 4), (1, 1)]:
        with pytest.raises(ValueError, match="another process is at work"):
            take(tmp_path, other)
    process.communicate("\n")
    take(tmp_path)


def test_a_lock_of_another_machine_falls_only_if_the_user_says_so(tmp_path):
    owner = dataclasses.replace(locks.Owner.here(), host="elsewhere", boot="another")
    (tmp_path / ".daq.lock").write_text(json.dumps(dataclasses.asdict(owner)))
    with pytest.raises(ValueError, match=r"on elsewhere since .*; if it is gone, remove .*\.daq\.lock"):
        take(tmp_path)
    take(tmp_path, take_over=True)


OWNER = '{"host": %s, "boot": "b", "pid": %s, "since": "2026"}'
UNREADABLE = ["", "{", "[]", '{"pid": 1}', "[" * 4000, OWNER % ('"h"', '"7"'), OWNER % ("[]", "7")]


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("words", [*UNREADABLE, OWNER % (json.dumps(socket.gethostname()), 10**30)])
def test_a_lock_without_a_name_is_stale(words, locked, tmp_path, monkeypatch):
    if not locked:  # a file system that does not know locks
        monkeypatch.setattr(locks, "_held", lambda file: None)
    (tmp_path / ".daq.lock").write_text(words)
    take(tmp_path)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(swap, "_exchanged", lambda *_: False)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "word").write_text(name)
    swap.put_in_place(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old/word").read_text() == "new"
