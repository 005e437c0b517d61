"""Quantized trees in Orbax checkpoints, and weights out of any Orbax checkpoint.

Orbax does the work: it writes sharded arrays from all processes to a temporary folder, and renames the folder
when all arrays are there. See `reader` for what a checkpoint holds.
"""

import collections
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from daq_jax.errors import DaqError, refuse
from daq_jax.io.disk.swap import put_back
from daq_jax.io.orbax.placement import placement
from daq_jax.io.orbax.reader import (
    METADATA_KEY,
    VERSION,
    Checkpoint,
    Components,
    absolute_path,
    array_names,
    key_record,
    nested,
)
from daq_jax.io.orbax.replacing import refuse_strangers, replace_later
from daq_jax.qtensor import QTensor
from daq_jax.records import Record, record_of
from daq_jax.rules import OPTIMIZER
from daq_jax.trees import PyTree, aligned, keyed_leaves, named_leaves, with_leaves

# Dtypes that Orbax 0.12 gives back; float8_e4m3, uint2 and uint4 it writes, too, and reads other values.
_STORABLE = re.compile(
    r"bool|u?int(8|16|32|64)|int[24]|bfloat16|float(16|32|64)|complex(64|128)|float4_e2m1fn|"
    r"float8_(e3m4|e4m3b11fnuz|e4m3fn|e4m3fnuz|e5m2|e5m2fnuz|e8m0fnu)"
)


def save(path: str | os.PathLike, tree: PyTree, *, overwrite: bool = False, wait: bool = True) -> Any:
    """Saves a tree with its QTensors, sharded arrays by all processes that hold them, through Orbax.

    A checkpoint is complete or does not exist: what a killed process leaves behind has another name.

    Args:
        path: a folder that does not exist yet, or a `gs://` address.
        tree: any pytree of arrays, QTensors, `jax.random` keys, numbers, strings and None.
        overwrite: replace the checkpoint at `path`. The new one is written beside it and then takes its
            place; the old one is removed last, and stays if anything fails before. Only where several
            processes save, or at an address such as `gs://`, is the old one removed first.
        wait: return once all is written. Otherwise return as soon as the arrays may be deleted or donated,
            while writing goes on.

    Returns:
        None, or with `wait=False` Orbax's response, whose `result()` waits for the end and raises what went
        wrong.

    Raises:
        FileExistsError: if there is something at `path` and `overwrite` is False.
        DaqError: before anything is written, naming every leaf that cannot be; or if `overwrite` would
            remove files that are of no Orbax checkpoint.

    >>> import tempfile
    >>> from daq_jax import quantize
    >>> path = f"{tempfile.mkdtemp()}/quantized"
    >>> weight = jnp.arange(64.0).reshape(8, 8)
    >>> save(path, {"kernel": quantize(weight, weight + 1)})
    >>> load(path)["kernel"].codes.dtype
    dtype(float8_e4m3fn)
    """
    where = absolute_path(path)
    # Of several processes another may have begun already; there Orbax looks, once all have come.
    if not overwrite and jax.process_count() == 1 and epath.Path(where).exists():
        raise FileExistsError(f"{where}: it is there already; pass overwrite=True to replace it.")
    records, arrays = _take_apart(tree)
    metadata: Any = {METADATA_KEY: {"version": VERSION, "leaves": records}}
    state = nested(arrays) or {"_": 0}  # Orbax refuses a tree without arrays
    local = "://" not in where
    if overwrite and local:
        put_back(Path(where))
        refuse_strangers(Path(where))
    if overwrite and local and jax.process_count() == 1 and Path(where).exists():
        real = Path(where).resolve()  # the place that a link leads to, which stays a link
        response = replace_later(real, lambda new: ocp.save_async(new, state, custom_metadata=metadata))
    else:
        response = ocp.save_async(where, state, overwrite=overwrite, custom_metadata=metadata)
    return response if not wait else response.result()


def load(
    path: str | os.PathLike,
    template: PyTree = None,
    *,
    sharding: Any = None,
) -> PyTree:
    """Loads what `save` saved, bit for bit, onto any devices; every process reads only what it needs.

    Args:
        path: path of the checkpoint.
        template: a tree to load into, with an array, a `jax.ShapeDtypeStruct` or a QTensor for each leaf;
            gives the containers and, where it has them, the shardings. Shapes must agree; dtypes come from
            the checkpoint. Without a template, dicts and lists come back as such, a tuple as a list, and
            every other container as a dict.
        sharding: where leaves go: one `jax.sharding.Sharding` (a leaf that it does not fit is replicated over
            its devices), a tree of them with the paths of the leaves, or a function of a leaf's path
            and shape. The sharding of a QTensor is that of its codes; its scales follow their tiles.
            Without a sharding and without a template, leaves go where JAX puts new arrays, with several
            processes on all devices.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        DaqError: if what is there is not a checkpoint, is cut off or lacks a part, was not written by
            `save` or by a newer one, or does not fit the template; naming what was found.
    """
    checkpoint = Checkpoint.open(path)
    if not checkpoint.is_ours:
        raise DaqError(
            f"{checkpoint.path}: this Orbax checkpoint was not written by `daq_jax.save`. For the plain "
            f"weights in it call `daq_jax.load_weights`."
        )
    return _load(checkpoint, checkpoint.records, template, sharding)


def load_weights(
    path: str | os.PathLike,
    template: PyTree = None,
    *,
    sharding: Any = None,
    only: str = "",
) -> PyTree:
    """Loads weights, such as a base or a tuned model, from any Orbax checkpoint, one of `save` included.

    Args:
        path: path of the checkpoint: one that stands alone, a step of a training run, an item of a step, or
            the root of a run, of which the last step is read.
        template: a tree to load into, as in `load`, such as `nnx.state(model)`; leaves that it lacks are not
            read. Its leaves may stand deeper in the checkpoint, all below the same components, and end in
            `/value` there.
        sharding: where leaves go, as in `load`.
        only: regular expression, found in the paths of the leaves that are read, such as `"^params/"`. Where
            it is empty, the state of an optimizer is left out.

    Raises:
        FileNotFoundError, DaqError: as in `load`.
    """
    checkpoint = Checkpoint.open(path)
    records = {p: r for p, r in checkpoint.records.items() if re.search(only, p)}
    if not records:
        raise DaqError(
            f"{checkpoint.path}: no leaf's path matches {only!r}; see {list(checkpoint.records)[:5]}."
        )
    wanted = {} if template is None else named_leaves(template)
    if not only and not any(re.search(OPTIMIZER, path) for path in wanted):
        records = {p: r for p, r in records.items() if not re.search(OPTIMIZER, p)} or records
    if template is None:
        return _load(checkpoint, records, template, sharding)
    try:
        names = aligned(records, wanted)
    except DaqError as error:
        raise DaqError(f"{checkpoint.path}: {error} `only` says which, such as only='^params/'.") from error
    return _load(checkpoint, {p: records[n] for p, n in names.items()}, template, sharding, names)


def _load(
    checkpoint: Checkpoint,
    records: Mapping[str, Record],
    template: PyTree,
    sharding: Any,
    names: Mapping[str, str] | None = None,
) -> PyTree:
    """Loads leaves; `names` has the path in the checkpoint of each, where it is another one."""
    names = names or dict(zip(records, records, strict=True))
    abstract = {path: checkpoint.abstract(names[path]) for path in records}
    into = None if template is None else named_leaves(template)
    if into is not None:
        _refuse_misfits(checkpoint.path, abstract, into)
    place = placement(sharding, into or {})
    places = {names[path]: place(path, getattr(x, "shape", ())) for path, x in abstract.items()}
    read = checkpoint.read(places)
    leaves = {path: read[names[path]] for path in records}
    if into is not None:
        return with_leaves(template, [leaves[path] for path in into])
    return _rebuilt([(records[path]["keys"], x) for path, x in leaves.items()])


def _refuse_misfits(where: str, found: Mapping[str, Any], into: Mapping[str, Any]) -> None:
    found = {path: x for path, x in found.items() if x is not None}
    problems = [f"{p!r} is in the template but not in the checkpoint" for p in into if p not in found]
    problems += [f"{p!r} is in the checkpoint but not in the template" for p in found if p not in into]
    for path in [p for p in into if p in found]:
        have, want = found[path], into[path]
        if getattr(have, "shape", ()) != getattr(want, "shape", ()):
            problems.append(f"{path!r} is {have.shape} in the checkpoint but {want.shape} in the template")
        elif isinstance(want, QTensor) and _static(have) != _static(want):
            problems.append(
                f"{path!r} is {_static(have)} in the checkpoint but {_static(want)} in the template"
            )
    if problems:
        refuse(
            f"{where}: the template does not fit", problems, "Load without a template to see what is there."
        )


def _static(x: Any) -> Any:
    if not isinstance(x, QTensor):
        return "no QTensor"
    return x.format.name, x.tiling, str(x.dtype), x.matrix, "no zeros" if x.zero is None else "with zeros"


def _rebuilt(leaves: Sequence[tuple[Sequence[Any], Any]]) -> PyTree:
    """The tree whose leaves have these keys: dicts, and lists where every key is an index."""
    if len(leaves) == 1 and not leaves[0][0]:
        return leaves[0][1]
    groups: dict[Any, list[Any]] = {}
    for keys, leaf in leaves:
        groups.setdefault(tuple(keys[0]), []).append((keys[1:], leaf))
    parts = {key: _rebuilt(group) for (_, key), group in groups.items()}
    indexed = bool(groups) and all(kind == "index" for kind, _ in groups)
    return [parts[i] for i in sorted(parts)] if indexed else parts


def _take_apart(tree: PyTree) -> tuple[dict[str, Record], dict[Components, Any]]:
    """Records of all leaves by path, and all arrays by components."""
    records: dict[str, Record] = {}
    arrays: dict[Components, Any] = {}
    problems: dict[str, str] = {}
    for path, (keys, leaf) in keyed_leaves(tree).items():
        try:
            record, named = record_of(leaf)
        except DaqError as error:
            problems[path] = str(error)
            continue
        records[path] = {**record, "keys": [key_record(k) for k in keys], "arrays": list(named)}
        arrays |= {components: named[name] for components, name in array_names(records[path]).items()}
        wrong = [x.dtype.name for x in named.values() if not _STORABLE.fullmatch(x.dtype.name)]
        if wrong:
            problems[path] = f"Orbax does not keep the values of {wrong[0]}; cast it"
    names = collections.Counter(".".join(components) for components in arrays)
    problems |= {n: "two arrays would have this name in Orbax; rename one" for n, k in names.items() if k > 1}
    if problems:
        lines = [f"{path!r}: {why}." for path, why in problems.items()]
        refuse(f"{len(problems)} of the leaves cannot be saved", lines)
    return records, arrays
