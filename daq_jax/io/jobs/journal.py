"""What is known of a job so far: enough to go on after a kill, and not to mix two jobs.

While a job goes on, its journal is a folder. It holds `work.json`, which says what the job is, and a record
of each finished unit, written once the unit is on the disk. When the result is complete its report,
`daq_report.json`, holds what the job was and the records, and the journal goes away.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from daq_jax.errors import DaqError
from daq_jax.io.disk.atomic import make_folder, sync_folder, write_text
from daq_jax.io.hf.tensor_files import read_json
from daq_jax.io.jobs.values import differences

REPORT = "daq_report.json"
_WORK = "work.json"
_SUM = "record_crc32"  # of all else in a record, so that none is believed that was damaged
_NAMED = 4  # differences that a message names

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a job is to do, as plain JSON.

    Attributes:
        inputs: identity of each input file, by the name that messages give it.
        settings: all that decides the bytes of the result, beside the inputs.
        files: names of the files that the job may write, relative to the folder of its result.
        origin: what the result says of where it comes from, such as the command and the date. It decides
            nothing: of a job that goes on, it is as it was when the job was begun.
    """

    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    files: Sequence[str]
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """A digest that changes when an input file or a setting does."""
        words = json.dumps([self.inputs, self.settings], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The work as it stands in files."""
        return {"fingerprint": self.key, **dataclasses.asdict(self)}

    def unlike(self, other: Mapping[str, Any]) -> str:
        """Where another work, as it stands in a file, differs, in words."""
        parts = ("input", "inputs", self.inputs), ("setting", "settings", self.settings)
        found = [f"{word} {d}" for word, name, now in parts for d in differences(other.get(name) or {}, now)]
        more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        return "; ".join([*found[:_NAMED], *more])


@dataclasses.dataclass(frozen=True)
class Journal:
    """The records of one job.

    Attributes:
        folder: folder that holds the records while the job goes on.
        out: folder of the result, which holds the report once the result is complete.
        work: what the job is to do.
    """

    folder: Path
    out: Path
    work: Work

    @property
    def begun(self) -> dict[str, Any] | None:
        """The work of the job that was begun here and is not complete; None if there is none."""
        return _work_in(self.folder / _WORK)

    @property
    def completed(self) -> dict[str, Any] | None:
        """The report of the job whose result `out` holds; None if there is none."""
        return _work_in(self.out / REPORT)

    @property
    def origin(self) -> Mapping[str, Any]:
        """`Work.origin` of the job as it was begun, so that a job that goes on gives the same bytes."""
        found = (self.begun or {}).get("origin")
        return found if isinstance(found, dict) else self.work.origin

    def open(self) -> None:
        """Makes the folder of the records, and notes whose records they are."""
        if self.folder.is_symlink():
            raise DaqError(f"{self.folder}: is a link; the records of a job stand in a folder: remove it.")
        make_folder(self.folder)
        with self.alone("work", wait=True):  # processes that share the job begin at one time
            if (self.begun or {}).get("fingerprint") != self.work.key:
                write_text(self.folder / _WORK, json.dumps(self.work.to_dict()))

    def spoil(self) -> None:
        """Notes that the finished units are of no use, so that no later call goes on with them."""
        write_text(self.folder / _WORK, json.dumps({**self.work.to_dict(), "fingerprint": ""}))

    def report(self) -> dict[str, Any]:
        """The report of the complete result."""
        return read_json(self.out / REPORT, "the report")

    def record(self, unit: str) -> Record | None:
        """What was noted of a finished unit; None if nothing was, or nothing that can be read."""
        path = self.folder / f"{unit}.json"
        try:
            record = read_json(path, "the record of a finished unit") if path.is_file() else {}
        except DaqError:
            return None
        said = record.pop(_SUM, None)
        return record if type(said) is int and said == _sum(record) else None

    def finish(self, unit: str, record: Record) -> None:
        """Notes that a unit is finished."""
        write_text(self.folder / f"{unit}.json", json.dumps({**record, _SUM: _sum(record)}))

    def forget(self, unit: str) -> None:
        """Notes that a unit is not finished after all."""
        (self.folder / f"{unit}.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self, what: str, *, wait: bool) -> Iterator[bool]:
        """Keeps other processes out of a unit, or of another step; the system unlocks it if this one dies.

        Args:
            what: name of the unit or of the step.
            wait: whether to wait while another process is at it.

        Yields:
            Whether the job is still there to do: False if another process has completed it.

        Raises:
            DaqError: if another process is at it and `wait` is False.
        """
        try:
            lock = os.open(self.folder / f"{what}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            yield False
            return
        try:
            _lock(lock, wait, f"{self.out}: another process is at work on {what}; wait for it to end.")
            yield self.folder.exists()
        finally:
            os.close(lock)

    def close(self) -> None:
        """Forgets the records, first whose they are: half of them must not look like a job that was begun."""
        if self.folder.is_symlink():
            self.folder.unlink()
        if (self.folder / _WORK).exists():
            (self.folder / _WORK).unlink()
            sync_folder(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


def _sum(record: Record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _lock(file: int, wait: bool, otherwise: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DaqError(otherwise) from None


def _work_in(path: Path) -> dict[str, Any] | None:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = read_json(path, "the record of earlier work")
    except DaqError:  # damaged: some job's, but no longer known which
        found = {}
    return found if isinstance(found.get("fingerprint"), str) else {"fingerprint": ""}
