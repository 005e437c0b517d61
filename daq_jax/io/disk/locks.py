"""One writer for each result: a lock with the name of its owner, and a rule for locks that are left behind.

The lock of a process is a file that says who the owner is, and on which the owner holds a `flock` for as long
as it lives. A lock is stale if nobody holds it and its owner ran on this machine, or if it cannot be read; a
stale lock is removed. A lock from another machine on which no `flock` is seen may belong to a process that is
alive, as not every file system passes a `flock` on: it is stale only if the user says so.

Processes that share a job have locks side by side, one for each share.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from daq_jax.errors import DaqError
from daq_jax.io.disk.atomic import make_folder

Share = tuple[int, int]  # (I, N): the I-th of N processes that share a job


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: name of its machine.
        boot: id of the machine's last start, which names the machine better than `host`; "" if there is none.
        pid: id of the process.
        since: when the lock was taken, in words.
    """

    host: str
    boot: str
    pid: int
    since: str

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z"))

    @property
    def ran_here(self) -> bool:
        """Whether the owner ran on this machine, or on one of its name that was started anew since."""
        return self.host == socket.gethostname() or (bool(self.boot) and self.boot == _boot())

    @property
    def is_alive(self) -> bool:
        """Whether a process of its id runs here; True of an owner on another machine, where none can look."""
        if not self.ran_here:
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # the latter of a number that no process has
            return False
        except PermissionError:
            return True
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def one_writer(stem: Path, out: Path, share: Share, *, take_over: bool) -> Iterator[None]:
    """Keeps other processes from a result while this one is at work on it.

    Args:
        stem: path of the locks without their endings.
        out: path of the result, for messages.
        share: (I, N) of this process; processes with other I of the same N work side by side.
        take_over: whether the user said that a lock left by another machine is stale.

    Raises:
        DaqError: naming the owner, if another process is at work.
    """
    make_folder(stem.parent)
    path = stem.with_name(f"{stem.name}{_ending(share)}")
    with _guard(stem.parent):
        for other in sorted(p for p in stem.parent.iterdir() if p.name.startswith(stem.name)):
            found = re.fullmatch(r"(?:\.(\d+)-of-(\d+))?\.lock", other.name.removeprefix(stem.name))
            if found and (other == path or int(found[2] or 1) != share[1]):
                _refuse_unless_stale(other, out, take_over)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _held(file)
        os.write(file, json.dumps(dataclasses.asdict(Owner.here())).encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that is gone, which says more by itself
            path.unlink()
        os.close(file)


def _ending(share: Share) -> str:
    return ".lock" if share[1] == 1 else f".{share[0]}-of-{share[1]}.lock"


def _refuse_unless_stale(path: Path, out: Path, take_over: bool) -> None:
    """Removes the lock at `path` if it is stale."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # its owner has just ended
        return
    try:
        owner, gone = _owner(os.read(file, 4096)), _held(file)
        if gone is None:
            gone = owner is None or not owner.is_alive
        if not gone or not (owner is None or owner.ran_here or take_over):
            way_out = f"if it is gone, remove {path}" if gone else "wait for it to end"
            who = owner or "a process that does not say its name"
            raise DaqError(f"{out}: another process is at work on it ({who}); {way_out}.")
        path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _owner(data: bytes) -> Owner | None:
    try:
        owner = Owner(**json.loads(data))
    except (ValueError, TypeError, RecursionError):  # its owner was stopped before it wrote its name
        return None
    kinds = [type(value) for value in dataclasses.astuple(owner)]
    return owner if kinds == [str, str, int, str] else None


def _held(file: int) -> bool | None:
    """Locks an open file; returns whether nobody else holds it, and None where files cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Lets one process at a time look at the locks of a folder, where the file system can lock a folder."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
