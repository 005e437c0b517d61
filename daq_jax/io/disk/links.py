"""Links: which of them lead out of a folder, and are neither read nor written through."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from daq_jax.errors import DaqError


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path below a folder is in that folder once all links are followed.

    The files of a snapshot in a Hugging Face cache are links to `../../blobs`; these count as inside. The
    folder may itself be reached through a link. What does not exist is where it would be made.
    """
    root, there = folder.resolve(), path.resolve()
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    return any(home == there or home in there.parents for home in (root, *blobs))


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises DaqError if one of the named files of a folder is a link that leads out of it."""
    out = [folder / name for name in names if not stays_inside(folder / name, folder)]
    if out:
        raise DaqError(
            f"{out[0]}: is a link to {out[0].resolve()}, which is not in the folder; copy the file to its "
            "place, or pass the folder that it is in."
        )


def listed_below(folder: Path, names: Iterable[str]) -> list[Path]:
    """The paths of files that a list in a file names, without names that lead out of the folder."""
    plain = [name for name in names if isinstance(name, str) and _is_plain(name)]
    return [folder / name for name in plain if stays_inside((folder / name).parent, folder)]


def _is_plain(name: str) -> bool:
    parts = PurePath(name).parts
    return (
        bool(parts) and not PurePath(name).is_absolute() and ".." not in parts and not re.search("\0", name)
    )
