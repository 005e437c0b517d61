"""An Orbax checkpoint in the place of an older one, and nothing else removed."""

import re
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from daq_jax.errors import DaqError, refuse
from daq_jax.io.disk.locks import one_writer
from daq_jax.io.disk.swap import new_beside, put_in_place, remove_tree

# Files as Orbax writes them: alone or in an item's folder, with OCDBT or with Zarr arrays.
_TREE = r"_METADATA|_sharding|metadata|checkpoint|array_metadatas/process_\d+"
_OCDBT = r"manifest\.ocdbt|d/[0-9a-f]+"
_ITEM = rf"{_TREE}|{_OCDBT}|ocdbt\.process_\w+/({_OCDBT})"
_ARRAY = (".zarray", "zarr.json")  # in the folder of an array of Zarr
_CHUNK = re.compile(r"(.+?)/(\d+(\.\d+)*|c(/\d+)*)")  # of such an array
_MARKS = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "_METADATA")
_FILES = re.compile(
    rf"_CHECKPOINT_METADATA|commit_success\.txt|orbax\.checkpoint|([^/]+/)?({_ITEM})|"
    r"(.*/)?(\.zarray|\.zgroup|zarr\.json)"
)


def refuse_strangers(path: Path, ours: Collection[str] = ()) -> None:
    """Raises DaqError unless what is at `path` may be removed: nothing, or an Orbax checkpoint and no more.

    Args:
        path: path of the checkpoint.
        ours: names of further files that may be removed, relative to `path`.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise DaqError(f"{path}: is a file, which is not replaced by a checkpoint; name another path.")
    files = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_symlink() or not p.is_dir()]
    arrays = {str(Path(n).parent) for n in files if Path(n).name in _ARRAY}
    strange = sorted(n for n in files if n not in ours and not _is_of_orbax(n, arrays))
    marked = any(Path(n).name in _MARKS for n in files)
    if strange or (files and not marked):
        refuse(
            f"{path}: is to be replaced and holds files that are of no Orbax checkpoint",
            [repr(name) for name in strange or files],
            "Move them away, or name another path.",
            one_line=True,
        )


def _is_of_orbax(name: str, arrays: Collection[str]) -> bool:
    """Whether Orbax writes a file of this name, beside arrays of Zarr in these folders."""
    chunk = _CHUNK.fullmatch(name)
    return _FILES.fullmatch(name) is not None or (chunk is not None and chunk[1] in arrays)


def replace_later(path: Path, save: Callable[[str], Any]) -> Future[None]:
    """Saves a checkpoint beside the one at `path`, and puts it in its place once it is whole.

    Args:
        path: path of a checkpoint that is there.
        save: begins to save to a path that is not taken; returns what has a `result()` that waits.

    Returns:
        What waits for the end by `result()`, and raises what went wrong.
    """
    with ExitStack() as begun:
        begun.enter_context(one_writer(lock_of(path), path, (1, 1), take_over=False))
        refuse_strangers(path)
        new = new_beside(path)
        remove_tree(new)
        response = save(str(new))
        locked = begun.pop_all()
    pool = ThreadPoolExecutor(1)
    done = pool.submit(_finish, response, new, path, locked)
    pool.shutdown(wait=False)
    return done


def lock_of(path: Path) -> Path:
    """Path of the locks of a checkpoint, without their endings."""
    return path.with_name(f".{path.name}.daq")


def _finish(response: Any, new: Path, path: Path, locked: ExitStack) -> None:
    with locked:
        response.result()
        refuse_strangers(path)
        put_in_place(new, path)
