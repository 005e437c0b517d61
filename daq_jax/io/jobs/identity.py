"""What the content of a file is, so that a later call, or the end of a job, can tell whether it changed.

A file is known by its size and its content alone: a copy, a new time of change or other permissions make no
other input. Files of up to 1 GiB are read whole. Of larger files the first MiB is read, where the header is,
and from there on a window of 4 KiB in every 4 MiB and at the end. A write to a large file that touches none
of the windows is not seen, unless it is made while a job reads the file: at its end a job also compares what
the system says of a file (`Stamp`), and refuses a large file that was written to meanwhile.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_WHOLE = 2**30  # bytes up to which a file is read whole
_HEAD = 2**20  # bytes at the start of a larger file that are read, some at a time in all files
_WINDOW = 2**12  # bytes
_STEP = 2**22  # bytes from one window to the next


class Stamp(NamedTuple):
    """What the system says of a file; every write changes it, and so do some things that are no writes.

    Attributes:
        place: device and number of the file.
        nbytes: size of the file.
        written_ns: time of the last write, which programs can set.
        changed_ns: time of the last change of any kind, which they cannot.
    """

    place: tuple[int, int]
    nbytes: int
    written_ns: int
    changed_ns: int


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file, or of what a link leads to; None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return Stamp((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def identity_of(path: Path) -> dict[str, Any]:
    """The content of a file as plain JSON.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start, length in _windows(size):
            file.seek(start)
            digest.update(file.read(length))
    return {"bytes": size, "content": digest.hexdigest()}


def _windows(size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is read of a file."""
    if size <= _WHOLE:
        yield from ((start, _HEAD) for start in range(0, size, _HEAD))
        return
    yield 0, _HEAD
    yield from ((start, _WINDOW) for start in range(_STEP, size - _WINDOW, _STEP))
    yield size - _WINDOW, _WINDOW


class Inputs:
    """The files that a job reads, as they are when this is made.

    Args:
        files: path of each file by the name that messages give it.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._stamps = {name: stamp_of(path) for name, path in files.items()}  # before the content is read
        self.identities = {name: self._now(name) for name in files}

    def changed(self) -> tuple[list[str], list[str]]:
        """Names of the files that have changed, and of those that were written to and are too large to tell.

        Only files whose stamp has changed are read.
        """
        touched = [n for n, before in self._stamps.items() if stamp_of(self._files[n]) != before]
        changed = [n for n in touched if self._now(n) != self.identities[n]]
        return changed, [n for n in touched if n not in changed and self._may_have_changed(n)]

    def _now(self, name: str) -> dict[str, Any] | None:
        try:
            return identity_of(self._files[name])
        except FileNotFoundError:
            return None

    def _may_have_changed(self, name: str) -> bool:
        """Whether a file was written to where only windows of it are read."""
        before, now = self._stamps[name], stamp_of(self._files[name])
        return before is not None and before.nbytes > _WHOLE and (now is None or before[:3] != now[:3])
