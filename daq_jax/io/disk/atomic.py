"""Files that appear whole or not at all, also if the machine loses power.

Bytes go to a temporary name in the folder of the file. They are on the disk (`fsync`) before `os.replace`
gives the file its name, and the folder is on the disk before anything is written that relies on the name.
Permissions are those that the umask gives.
"""

import contextlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

_CHUNK = 2**22  # bytes copied at a time


class Checksum(NamedTuple):
    """Bytes of a file, and crc32 of its content."""

    nbytes: int
    crc32: int


def temporary_of(path: Path) -> Path:
    """Where the bytes of a file stand until it is whole."""
    return path.with_name(f".{path.name}.partial")


def open_temporary(path: Path) -> int:
    """Opens the temporary file of `path`, empty, for reading and writing; returns its descriptor.

    What a stopped process left under the name is removed, a link too: nothing is written through it.
    """
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def publish(file: int, path: Path) -> None:
    """Gives the temporary file of `path` its name, once all its bytes are on the disk."""
    os.fsync(file)
    os.replace(temporary_of(path), path)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file."""
    file = open_temporary(path)
    try:
        _put(file, data)
        publish(file, path)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """Writes a small file as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def copy_file(source: Path, path: Path) -> Checksum:
    """Copies the content of a file; its permissions are not copied."""
    nbytes, crc32 = 0, 0
    file = open_temporary(path)
    try:
        with source.open("rb") as content:
            while data := content.read(_CHUNK):
                _put(file, data)
                nbytes, crc32 = nbytes + len(data), zlib.crc32(data, crc32)
        publish(file, path)
    finally:
        os.close(file)
    return Checksum(nbytes, crc32)


def checksum(path: Path) -> Checksum:
    """What `copy_file` returns of a file that is there."""
    nbytes, crc32 = 0, 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            nbytes, crc32 = nbytes + len(data), zlib.crc32(data, crc32)
    return Checksum(nbytes, crc32)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, so that they outlast a loss of power."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster
        path.mkdir()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the disk knows the names in a folder."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _put(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
