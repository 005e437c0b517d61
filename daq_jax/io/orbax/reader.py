"""An Orbax checkpoint, open for reading: what is in it, and some of its leaves at a time.

A quantized tree is an ordinary Orbax checkpoint: nested dicts of arrays, named by the components of each
leaf's path, with a dict of `codes` and `scale` where a QTensor stood. What is static stands in its custom
metadata, under "daq_jax", with a version.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, Sharding
from orbax.checkpoint import v1 as ocp

from daq_jax.errors import DaqError
from daq_jax.io.disk.orbax_places import locate
from daq_jax.qtensor import QTensor
from daq_jax.records import WHOLE, Record, leaf_of
from daq_jax.tilings import scale_sharding
from daq_jax.trees import PyTree, keyed_leaves, path_component

METADATA_KEY = "daq_jax"  # of our part of the custom metadata
VERSION = 1  # of that part; goes up when an older reader would misread
Components = tuple[str, ...]  # of the path of an array in the Orbax tree


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An Orbax checkpoint. What is in it is known without its arrays; leaves are read some at a time.

    Attributes:
        path: absolute path of the folder that Orbax opens.
        item: name of the item in it; see `Place`.
        is_ours: whether `save` wrote it.
        records: record of each leaf by its path; see `daq_jax.records`. A record also has the "keys" that
            lead to the leaf and the names of its "arrays".
        tree: the checkpoint's own tree, with shape and dtype of each array.
    """

    path: str
    item: str | None
    is_ours: bool
    records: Mapping[str, Record]
    tree: Any

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Checkpoint":
        """Reads what is in a checkpoint; see `locate` for which one a path names.

        Raises:
            FileNotFoundError, DaqError: as in `load`.
        """
        _refuse_nothing(absolute_path(path))
        where, item = locate(absolute_path(path))
        try:
            found: Any = ocp.metadata(where, item)
        except ocp.errors.InvalidLayoutError as error:
            raise DaqError(
                f"{where}: not an Orbax checkpoint, or one whose saving was cut off. Orbax says: "
                f"{_reason(error)}"
            ) from error
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
            raise _damaged(where, error) from error
        ours = (found.custom_metadata or {}).get(METADATA_KEY)
        if ours is None:
            return cls(where, item, False, _records_of_arrays(found.metadata), found.metadata)
        checkpoint = cls(where, item, True, _checked_records(where, ours), found.metadata)
        missing = [
            p for p, r in checkpoint.records.items() if not set(array_names(r)) <= set(checkpoint.arrays)
        ]
        if missing:
            raise _damaged(where, ValueError(f"no arrays for {', '.join(missing[:5])}"))
        return checkpoint

    @functools.cached_property
    def arrays(self) -> dict[Components, Any]:
        """Shape and dtype of each array, by the components of its path."""
        return _by_components(self.tree)

    def abstract(self, path: str) -> Any:
        """A leaf with shapes and dtypes in place of arrays."""
        record = self.records[path]
        shapes = {
            name: _shape_of(self.arrays[components]) for components, name in array_names(record).items()
        }
        if record["kind"] == "key":  # whose shape is not that of its data
            return jax.eval_shape(lambda x: self._leaf(path, x), shapes)
        return self._leaf(path, shapes)

    def read(self, places: Mapping[str, Sharding]) -> dict[str, Any]:
        """Leaves by path, read onto the given shardings; for a QTensor, the sharding of its codes."""
        wanted: dict[Components, Any] = {}
        for path, sharding in places.items():
            wanted |= self._wanted(path, sharding)
        arrays = self._read(wanted) if wanted else {}
        return {
            path: self._leaf(
                path,
                {name: arrays[components] for components, name in array_names(self.records[path]).items()},
            )
            for path in places
        }

    def _read(self, wanted: Mapping[Components, Any]) -> dict[Components, Any]:
        # Orbax reads no array whose place in the tree is taken by an ellipsis.
        tree = jax.tree_util.tree_map_with_path(lambda keys, _: wanted.get(_components(keys), ...), self.tree)
        try:
            return _by_components(ocp.load(self.path, tree, checkpointable_name=self.item))
        except Exception as error:
            raise _damaged(self.path, error) from error

    def _leaf(self, path: str, arrays: Mapping[str, Any]) -> Any:
        try:
            return leaf_of(self.records[path], arrays)
        except DaqError as error:
            raise DaqError(f"{self.path}: {path!r}: {error}.") from error

    def _wanted(self, path: str, sharding: Sharding) -> dict[Components, Any]:
        """What is to be read of a leaf: shape, dtype and sharding of each array, by its components."""
        whole = self.abstract(path)
        wanted: dict[Components, Any] = {}
        for components, name in array_names(self.records[path]).items():
            found, place = self.arrays[components], sharding
            if isinstance(whole, QTensor) and name != "codes" and isinstance(sharding, NamedSharding):
                place = scale_sharding(sharding, whole.view)
            if not hasattr(found, "shape") or jax.dtypes.canonicalize_dtype(found.dtype) != found.dtype:
                wanted[components] = found  # a scalar, or 64 bits where JAX has 32: as Orbax gives them
            else:
                wanted[components] = jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=place)
        return wanted


def key_record(key: Any) -> list[Any]:
    """One key of a JAX key path as JSON: whether it is an index, and its value."""
    if hasattr(key, "idx"):
        return ["index", key.idx]
    key = getattr(key, "key", path_component(key))
    return ["key", key if isinstance(key, (int, str)) else str(key)]


def array_names(record: Record) -> dict[Components, str]:
    """The name of each of a leaf's arrays by its components in the Orbax tree."""
    components = tuple(str(key) for _, key in record["keys"])
    return {(*components, name) if name or not components else components: name for name in record["arrays"]}


def nested(arrays: Mapping[Components, Any]) -> dict[str, Any]:
    """Arrays by name as the tree that Orbax saves: nested dicts, one level for each component."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        node = tree
        for component in name[:-1]:
            node = node.setdefault(component, {})
        node[name[-1]] = array
    return tree


def _checked_records(where: str, ours: Any) -> dict[str, Record]:
    """The records in our part of the metadata, whose form is sound; what each says is for `leaf_of` to judge.

    Raises:
        DaqError: if the version is a later one, or naming the first leaf whose record has another form.
    """
    version = ours.get("version") if isinstance(ours, dict) else None
    if type(version) is not int or version < 1:
        raise _damaged(where, ValueError(f"its metadata names {version!r} as its version"))
    if version > VERSION:
        raise DaqError(
            f"{where}: written in version {version} of daq_jax's checkpoints, and this daq_jax "
            f"reads up to version {VERSION}; upgrade daq_jax."
        )
    records = ours.get("leaves")
    if not isinstance(records, dict):
        raise _damaged(where, ValueError("its metadata lists no leaves"))
    bad = [path for path, record in records.items() if not _is_record(record)]
    keys = [] if bad else [tuple(map(tuple, record["keys"])) for record in records.values()]
    above = {found[:n] for found in keys for n in range(len(found))}
    bad += [path for path, found in zip(records, keys, strict=False) if found in above]
    if bad or len(set(keys)) < len(keys):
        raise _damaged(
            where, ValueError(f"what its metadata says of {bad[:5] or 'its leaves'} makes no sense")
        )
    return records


def _is_record(record: Any) -> bool:
    """Whether a record has a kind, keys and names of arrays."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and isinstance(record.get("keys"), list)
        and all(_is_key(key) for key in record["keys"])
        and isinstance(record.get("arrays"), list)
        and all(isinstance(name, str) for name in record["arrays"])
    )


def _is_key(key: Any) -> bool:
    return (
        isinstance(key, list)
        and len(key) == 2
        and (
            type(key[1]) is int if key[0] == "index" else key[0] == "key" and type(key[1]) in (bool, int, str)
        )
    )


def _records_of_arrays(tree: PyTree) -> dict[str, Record]:
    """Records for a checkpoint that `save` did not write: every leaf is as Orbax has it."""
    return {
        path: {"kind": "array", "keys": [key_record(k) for k in keys], "arrays": [WHOLE]}
        for path, (keys, leaf) in keyed_leaves(tree).items()
        if leaf is not None
    }


def _components(keys: Sequence[Any]) -> Components:
    return tuple(map(path_component, keys)) or (WHOLE,)


def _by_components(tree: PyTree) -> dict[Components, Any]:
    return {_components(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def _shape_of(found: Any) -> Any:
    return jax.ShapeDtypeStruct(found.shape, found.dtype) if hasattr(found, "shape") else found


def absolute_path(path: str | os.PathLike) -> str:
    """A path as Orbax wants it."""
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def _refuse_nothing(where: str) -> None:
    path = epath.Path(where)
    remains = [p.name for p in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*")]
    if not path.exists():
        also = f" A save to it was cut off and left {remains[0]!r}: save again." if remains else ""
        raise FileNotFoundError(f"{where}: there is no such checkpoint.{also}")


def _damaged(where: str, error: Exception) -> DaqError:
    return DaqError(
        f"{where}: this checkpoint is damaged, some of it cannot be read ({_reason(error)}). Save it again."
    )


def _reason(error: Exception) -> str:
    """The first line of an error of Orbax or TensorStore."""
    return str(error).strip().partition("\n")[0].partition(" See full")[0][:300]
