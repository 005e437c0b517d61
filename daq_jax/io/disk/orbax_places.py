"""Where an Orbax checkpoint stands: at a path itself, in the last step of a training run, or around an item.

A training run keeps a folder for each step, `ROOT/100`, and a step a folder for each item: `items`,
`default`, `model_params`. Orbax opens steps; here a root and an item are ways to name one.
"""

import re
from typing import Any, NamedTuple

from etils import epath

_MARK = "_CHECKPOINT_METADATA"  # of a step, or of a checkpoint that stands alone
_TREE = "_METADATA"  # of an item, or of a checkpoint without items
_STEP = re.compile(r"(?:\w+_)?(\d+)")
# Items that hold a model, the likeliest first; beside them may stand the state of an optimizer or of data.
_OF_A_MODEL = ("model_params", "params", "model", "items", "state", "default", "pytree")


class Place(NamedTuple):
    """A checkpoint that Orbax opens.

    Attributes:
        folder: path of the checkpoint.
        item: name of the item in it; None where it has no items, "AUTO" where Orbax finds the one.
    """

    folder: str
    item: str | None = "AUTO"


def locate(path: str) -> Place:
    """The checkpoint that a path names: of the root of a training run, its last step.

    Args:
        path: absolute path or address. Where nothing is recognised, the place is the path itself.
    """
    here = epath.Path(path)
    if not (here / _MARK).exists():
        if (here / _TREE).exists() and (here.parent / _MARK).exists():
            return Place(str(here.parent), here.name)
        if not (here / _TREE).exists() and (steps := _steps(here)):
            here = steps[max(steps)]
    items = [name for name in _OF_A_MODEL if (here / name / _TREE).exists()]
    return Place(str(here), items[0] if items else "AUTO")


def is_orbax(path: Any) -> bool:
    """Whether a folder looks like an Orbax checkpoint, or like a training run of them."""
    here = epath.Path(path)
    return any((here / name).exists() for name in (_MARK, _TREE)) or (here.is_dir() and bool(_steps(here)))


def _steps(root: Any) -> dict[int, Any]:
    """Folders of the steps of a training run, by number; those that were not written to the end are none."""
    if not root.is_dir():
        return {}
    found = {path: _STEP.fullmatch(path.name) for path in root.iterdir()}
    return {int(match[1]): path for path, match in found.items() if match and (path / _MARK).exists()}
