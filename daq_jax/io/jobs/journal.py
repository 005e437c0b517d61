"""What is known of a job so far: enough to go on after a kill, and not to mix two jobs.

While a job goes on, its journal is a folder. It holds `work.json`, the fingerprint of inputs, settings and
version, and a record of each finished unit, written once the unit is on the disk. When the result is complete
its report, `daq_report.json`, holds the fingerprint and the records, and the journal goes away.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from daq_jax.errors import DaqError
from daq_jax.io.hf.tensor_files import read_json, write_text

REPORT = "daq_report.json"
_WORK = "work.json"

Record = dict[str, Any]


def describe(value: Any) -> Any:
    """A value as plain JSON that is the same in every process: dataclasses by field, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(key): describe(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [describe(x) for x in value]
    if callable(value):
        return (
            f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        )
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def fingerprint(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """A digest that changes when an input file or a setting does.

    Args:
        files: input files, each of which counts with its name, size, time of change and first 64 KiB.
        settings: anything that `describe` knows.
    """
    digest = hashlib.sha256(json.dumps(describe(settings), sort_keys=True).encode())
    digest.update(f"{jax.__version__} {jax.default_backend()}".encode())
    for path in files:
        found = path.stat()
        with path.open("rb") as file:
            start = file.read(2**16)
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}".encode() + start)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Journal:
    """The records of one job.

    Attributes:
        folder: folder that holds the records while the job goes on.
        out: folder of the result, which holds the report once the result is complete.
        key: fingerprint of the job.
    """

    folder: Path
    out: Path
    key: str

    @property
    def begun(self) -> str | None:
        """Fingerprint of the job that was begun here and is not complete; None if there is none."""
        return _fingerprint_in(self.folder / _WORK)

    @property
    def completed(self) -> str | None:
        """Fingerprint of the job whose result `out` holds; None if there is none."""
        return _fingerprint_in(self.out / REPORT)

    def open(self) -> None:
        """Makes the folder of the records, and notes whose records they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / _WORK, json.dumps({"fingerprint": self.key}))

    def report(self) -> dict[str, Any]:
        """The report of the complete result."""
        return read_json(self.out / REPORT, "the report")

    def record(self, unit: str) -> Record | None:
        """What was noted of a finished unit; None if nothing was."""
        path = self.folder / f"{unit}.json"
        return read_json(path, "the record of a finished unit") if path.is_file() else None

    def finish(self, unit: str, record: Record) -> None:
        """Notes that a unit is finished."""
        write_text(self.folder / f"{unit}.json", json.dumps(record))

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
        """Forgets the records."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _lock(file: int, wait: bool, otherwise: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DaqError(otherwise) from None


def _fingerprint_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    key = read_json(path, "the record of earlier work").get("fingerprint")
    return key if isinstance(key, str) else ""
