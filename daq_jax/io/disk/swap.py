"""A folder put in the place of another, so that one of the two is there at every moment.

On Linux the two exchange their names in one step (`renameat2`). Where the file system cannot, the old folder
is renamed first, to a name beside its own; a stop in between leaves both folders whole, under other names.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from daq_jax.io.disk.atomic import sync_folder

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def new_beside(path: Path) -> Path:
    """Where a folder is made that will be put in the place of `path`; Orbax takes no hidden name."""
    return path.with_name(f"{path.name}.daq-new")


def old_beside(path: Path) -> Path:
    """Where the folder that was at `path` stands for a moment if names cannot be exchanged."""
    return path.with_name(f"{path.name}.daq-old")


def put_in_place(new: Path, path: Path) -> None:
    """Gives `new` the name `path`, once all its bytes are on the disk; removes what had the name, last."""
    sync_tree(new)
    old = old_beside(path)
    if not path.exists():
        os.rename(new, path)
    elif not _exchanged(new, path):
        remove_tree(old)
        os.rename(path, old)
        sync_folder(path.parent)
        os.rename(new, path)
    sync_folder(path.parent)
    for left in (new, old):  # where the old one is now, or where a stopped process left it
        remove_tree(left)


def put_back(path: Path) -> None:
    """Gives the folder that was at `path` its name again if a process was stopped between two renames."""
    old = old_beside(path)
    if not path.exists() and old.exists() and new_beside(path).exists():
        os.rename(old, path)
        sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Removes a folder that a stopped process of ours left; of a link, the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync_tree(folder: Path) -> None:
    """Waits until the disk has all files below a folder, and their names."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # which takes files too


def _exchanged(a: Path, b: Path) -> bool:
    """Exchanges two names in one step; returns whether that was possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(b))
