"""What has been done to a folder so far: enough to go on after a kill, and not to mix two pieces of work.

While work goes on, OUT holds a folder `.daq`: `work.json` with the fingerprint of inputs, recipe and version,
and for each finished file of the result a record of its own, written once the file has its name. At the end
the records go into `daq_report.json`, the index and then the config are written, and `.daq` goes away.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import INDEX
from daq_jax.io.hf.tensor_files import read_json, write_text

REPORT = "daq_report.json"
_JOURNAL = ".daq"
_WORK = "work.json"


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
    """A word that changes when an input file or a setting does.

    Args:
        files: each counts with its name, size, time of change and first bytes.
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


class Journal:
    """The record of the work on one folder.

    Args:
        out: the folder.
        key: fingerprint of the work.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out = out
        self.key = key
        self._folder = out / _JOURNAL

    def begin(self, *, overwrite: bool) -> bool:
        """Makes the folder ready, or finds it as the same work left it.

        Returns:
            Whether the work is already complete.

        Raises:
            DaqError: if the folder holds something else, and `overwrite` is not set.
        """
        found = self._key_found()
        if overwrite:
            self._clear()
        elif found != self.key and self.out.exists() and any(self.out.iterdir()):
            what = "other files" if found is None else "a result of other inputs, settings or versions"
            raise DaqError(f"{self.out}: holds {what}; pass an empty folder, or --overwrite to replace them.")
        elif found == self.key and not self._folder.exists():
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / _WORK, json.dumps({"fingerprint": self.key}))
        return False

    def _key_found(self) -> str | None:
        for path in (self._folder / _WORK, self.out / REPORT):
            if path.is_file():
                key = read_json(path, "the record of earlier work").get("fingerprint")
                return key if isinstance(key, str) else ""
        return None

    def _clear(self) -> None:
        """Removes what a checkpoint folder holds; files that are none of its kind stay."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("config.json", INDEX, REPORT):  # first those that make it look complete
            (self.out / name).unlink(missing_ok=True)
        for path in [*self.out.glob("*.safetensors"), *self.out.glob(".*.partial")]:
            path.unlink()

    def record(self, file: str) -> dict[str, Any] | None:
        """What was noted of a finished file; None if it is not finished."""
        path = self._folder / f"{file}.json"
        if not (path.is_file() and (self.out / file).is_file()):
            return None
        return read_json(path, "the record of a finished file")

    def finish(self, file: str, record: Mapping[str, Any]) -> None:
        """Notes that a file is finished."""
        write_text(self._folder / f"{file}.json", json.dumps(record))

    @contextlib.contextmanager
    def alone(self, what: str, *, wait: bool) -> Iterator[bool]:
        """Keeps other processes out of a piece of the work; the system lets go of it if this one dies.

        Yields:
            Whether the work is still there to do: false if another process has completed it all.

        Raises:
            DaqError: if another process is at it and `wait` is not set.
        """
        try:
            lock = os.open(self._folder / f"{what}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield self._folder.exists()
        except BlockingIOError:
            raise DaqError(f"{self.out}: another process is at work on {what}; wait for it to end.") from None
        finally:
            os.close(lock)

    def close(self, write: Callable[[], None]) -> None:
        """Completes the folder by `write`, whose last act makes it look complete, and forgets the records."""
        write()
        shutil.rmtree(self._folder)
