"""File operations of a job, each of which can be its last: what a kill or a loss of power leaves on the disk.

A `Disk` numbers the operations that change files below a folder, and ends the job at one of them by an
exception that nothing catches. From then on it lets no operation through, whatever `finally` still asks for,
as a killed process does no more. It also follows what of each file and folder was synced: all that is sure to
be there after a loss of power.
"""

import contextlib
import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

from daq_jax.io.disk import swap

When = Literal["before", "halfway", "after"]


class Killed(BaseException):
    """Stands for the signal that ends a process."""


@dataclasses.dataclass
class File:
    """What the disk is sure to hold of a file."""

    synced: bytes = b""


@dataclasses.dataclass
class Folder:
    """Names that the disk is sure to hold of a folder."""

    synced: dict[str, "File | Folder"] = dataclasses.field(default_factory=dict)

    def write(self, path: pathlib.Path) -> None:
        """Makes a folder of what was synced."""
        path.mkdir(parents=True)
        for name, node in self.synced.items():
            if isinstance(node, Folder):
                node.write(path / name)
            else:
                (path / name).write_bytes(node.synced)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation, with paths relative to the folder that is watched."""

    kind: str
    path: str
    to: str = ""


class Disk:
    """The operations on files below a folder.

    Args:
        root: the folder.
        at: number of the operation at which the job ends, from 0 on; None to let it go on.
        when: whether it ends before the operation, after it, or, of a write, after half of the bytes.
    """

    def __init__(self, root: pathlib.Path, at: int | None = None, when: When = "after") -> None:
        self.root, self.at, self.when = os.path.realpath(root), at, when
        self.done: list[Operation] = []
        self.dead = False
        self._files: dict[int, str] = {}  # path by descriptor, of those that are open
        self._nodes: dict[int, File | Folder] = {}  # by inode
        self._turn = threading.RLock()
        self.durable = self._all_of(self.root)

    @contextlib.contextmanager
    def watched(self) -> Iterator["Disk"]:
        """Numbers the operations of the block; ends it by `Killed` if it is to end."""
        with contextlib.ExitStack() as patched:
            for name in ("open", "close", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "truncate"):
                patched.enter_context(mock.patch.object(os, name, self._on_files(name, getattr(os, name))))
            for name in ("unlink", "remove", "mkdir", "rmdir", "replace", "rename", "link", "symlink"):
                patched.enter_context(mock.patch.object(os, name, self._on_names(name, getattr(os, name))))
            exchange = self._on_names("exchange", swap._exchanged)
            patched.enter_context(mock.patch.object(swap, "_exchanged", exchange))
            try:
                yield self
            finally:
                for file in list(self._files):  # as the system does for a process that is gone
                    os.close(file)

    def _all_of(self, path: str) -> Folder:
        """A folder as it is, all of it synced."""
        folder = self._nodes.setdefault(os.stat(path).st_ino, Folder())
        assert isinstance(folder, Folder)
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                folder.synced[entry.name] = self._all_of(entry.path)
            else:
                file = self._nodes[entry.inode()] = File(pathlib.Path(entry.path).read_bytes())
                folder.synced[entry.name] = file
        return folder

    def _relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """A path relative to the watched folder; None if it is not below it."""
        if isinstance(path, int):
            full = self._files.get(path, "")
        else:
            at = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            full = os.path.join(at, os.fsdecode(path))
            full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        inside = full == self.root or full.startswith(f"{self.root}{os.sep}")
        return os.path.relpath(full, self.root) if inside else None

    def _step(self, operation: Operation, act: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        with self._turn:
            if self.dead:
                raise Killed
            last = len(self.done) == self.at
            if last and self.when != "after":
                self.dead = True
                if self.when == "halfway" and half is not None:
                    half()
                raise Killed
            try:
                result = act()
            finally:  # an operation that fails is one too: an unlink of what is not there
                self.done.append(operation)
                self.dead = last
            self._follow(operation)
            if last:
                raise Killed
            return result

    def _follow(self, operation: Operation) -> None:
        """Notes what the disk is sure to hold after an operation."""
        path = os.path.join(self.root, operation.path)
        if operation.kind in ("create", "mkdir"):
            self._nodes[os.stat(path).st_ino] = File() if operation.kind == "create" else Folder()
        elif operation.kind == "sync" and os.path.exists(path):
            node = self._node(path)
            if isinstance(node, Folder):
                node.synced = {entry.name: self._node(entry.path) for entry in os.scandir(path)}
            else:
                node.synced = pathlib.Path(path).read_bytes()

    def _node(self, path: str) -> File | Folder:
        """What is known of a file or folder; of one that was made past Python, nothing was synced."""
        number, kind = os.stat(path, follow_symlinks=False).st_ino, Folder if os.path.isdir(path) else File
        if not isinstance(self._nodes.get(number), kind):  # the system gives numbers out again
            self._nodes[number] = kind()
        return self._nodes[number]

    def _on_files(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            where = self._relative(path, dir_fd)
            if where is None:
                return plain(path, flags, mode, dir_fd=dir_fd)

            def act() -> int:
                file = plain(path, flags, mode, dir_fd=dir_fd)
                self._files[file] = os.path.join(self.root, where)
                return file

            if not flags & (os.O_CREAT | os.O_TRUNC) or (
                os.path.exists(os.path.join(self.root, where)) and not flags & os.O_TRUNC
            ):
                return act()
            return self._step(Operation("create", where), act, None)

        def closed(file: int) -> None:
            self._files.pop(file, None)
            plain(file)

        def acted(file: Any, *rest: Any) -> Any:
            where = self._relative(file)
            if where is None:
                return plain(file, *rest)
            kind = {"fsync": "sync", "fdatasync": "sync", "pwrite": "write"}.get(name, name)
            half = None
            if kind == "write":
                part = memoryview(rest[0])[: len(memoryview(rest[0]).cast("B")) // 2]
                half = lambda: plain(file, part, *rest[1:])  # noqa: E731
            return self._step(Operation(kind, where), lambda: plain(file, *rest), half)

        return {"open": opened, "close": closed}.get(name, acted)

    def _on_names(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def acted(path: Any, *rest: Any, **how: Any) -> Any:
            two = name in ("replace", "rename", "link", "symlink", "exchange")
            where = self._relative(rest[0] if name == "symlink" else path, how.get("dir_fd"))
            if where is None:
                return plain(path, *rest, **how)
            kind = {"replace": "rename", "remove": "unlink"}.get(name, name)
            to = (self._relative(rest[0]) or "") if two else ""

            def act() -> Any:
                if kind in ("unlink", "rmdir"):
                    with contextlib.suppress(FileNotFoundError):
                        self._nodes.pop(os.lstat(os.path.join(self.root, where)).st_ino, None)
                return plain(path, *rest, **how)

            return self._step(Operation(kind, where, to), act, None)

        return acted


def out_of_order(done: list[Operation]) -> list[str]:
    """Where operations leave a moment at which a loss of power would lose what later ones rely on.

    A file must be synced after its last write and before it is renamed, and the folder of its new name after
    the rename and before anything is created or renamed.
    """
    unsynced: set[str] = set()
    pending: str | None = None
    found = []
    for step in done:
        folder = os.path.dirname(step.to or step.path) or "."
        if step.kind == "sync":
            unsynced.discard(step.path)
            pending = None if step.path == pending else pending
            continue
        if pending is not None and step.kind in ("create", "rename", "mkdir"):
            found.append(f"{pending} is not synced before {step}")
        if step.kind in ("create", "write", "truncate", "ftruncate"):
            unsynced.add(step.path)
        elif step.kind == "rename":
            if step.path in unsynced:
                found.append(f"{step.path} is renamed before it is synced")
            pending = folder
        elif step.kind == "unlink":
            unsynced.discard(step.path)
    return [*found, f"{pending} is not synced at the end"] if pending is not None else found
