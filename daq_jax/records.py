"""What a file must say of a leaf beside its arrays, as JSON: pure functions, there and back.

A record is a dict with the `kind` of a leaf: "qtensor" with its static fields, "array", "key" (of
`jax.random`), "empty" (an array without elements) or "value" (a number, a string or None).

Exported programs are files too: `jax.export` writes the types of a program's arguments and results, and
learns here how to write a QTensor's.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from daq_jax.errors import DaqError
from daq_jax.formats import FORMATS
from daq_jax.qtensor import QTensor
from daq_jax.tilings import Block, Channel, Group, PerTensor, matrix_problem

Record = dict[str, Any]

TILINGS: dict[str, type] = {t.__name__: t for t in (Block, Channel, Group, PerTensor)}
QTENSOR_ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static"))
_QTENSOR_STATIC = tuple(f.name for f in dataclasses.fields(QTensor) if f.metadata.get("static"))
WHOLE = ""  # name of the one array of a leaf that is not a QTensor


def record_of(leaf: Any) -> tuple[Record, dict[str, Any]]:
    """A leaf as its record and its arrays by name.

    Raises:
        DaqError: saying what cannot be written.
    """
    if isinstance(leaf, QTensor):
        arrays = {name: getattr(leaf, name) for name in QTENSOR_ARRAYS}
        arrays = {name: x for name, x in arrays.items() if x is not None}
        if any(isinstance(x, Tracer) or not hasattr(x, "dtype") for x in arrays.values()):
            raise DaqError("it is a QTensor without arrays; call this outside jit")
        _refuse_deleted(*arrays.values())
        return static_record(leaf), arrays
    if isinstance(leaf, Tracer):
        raise DaqError("it is traced; call this outside jit")
    if isinstance(leaf, np.ma.MaskedArray):
        raise DaqError("it is a masked array, whose mask would be lost; fill it first, x.filled(value)")
    _refuse_deleted(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return {"kind": "key", "impl": str(jax.random.key_impl(leaf))}, {WHOLE: jax.random.key_data(leaf)}
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        if leaf.size == 0:
            return {"kind": "empty", "shape": list(leaf.shape), "dtype": str(leaf.dtype)}, {}
        return {"kind": "array"}, {WHOLE: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf}
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return {"kind": "value", "value": leaf}, {}
    raise DaqError(f"it is a {type(leaf).__name__}; a leaf must be an array, a QTensor, a number or a string")


def _refuse_deleted(*arrays: Any) -> None:
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in arrays):
        raise DaqError(
            "its array is deleted, as donated ones are; save it before, or pass one that still exists"
        )


def static_record(q: QTensor) -> Record:
    """The static fields of a QTensor.

    Raises:
        DaqError: if its format or tiling has no name.
    """
    if FORMATS.get(q.format.name) != q.format:
        raise DaqError(f"its format {q.format!r} is none of daq_jax's own, which alone have names in files")
    if type(q.tiling) not in TILINGS.values():
        raise DaqError(f"its tiling {q.tiling!r} is none of daq_jax's own, which alone have names in files")
    return {
        "kind": "qtensor",
        "format": q.format.name,
        "tiling": {"name": type(q.tiling).__name__, **dataclasses.asdict(q.tiling)},  # pyright: ignore
        "dtype": str(q.dtype),
        "matrix": [list(axes) for axes in q.matrix],
    }


def leaf_of(record: Record, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `record_of`; `arrays` may also hold what stands for an array, such as shapes.

    Raises:
        DaqError: if the record speaks of what this version of daq_jax does not have, says what makes no
            sense, or does not fit the arrays.
    """
    try:
        return _leaf_of(record, arrays)
    except DaqError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise DaqError(f"what is written of it makes no sense ({why}); save it again") from error


def _leaf_of(record: Record, arrays: Mapping[str, Any]) -> Any:
    kind = record["kind"]
    if kind == "qtensor":
        q = qtensor_of(record, arrays)
        _refuse_misfit(q)
        return q
    if kind == "array":
        return arrays[WHOLE]
    if kind == "key":
        return jax.random.wrap_key_data(arrays[WHOLE], impl=record["impl"])
    if kind == "empty":
        if 0 not in record["shape"]:
            raise DaqError(f"it is said to be empty and of shape {record['shape']}; save it again")
        empty = np.zeros(record["shape"], jnp.dtype(record["dtype"]))
        return empty if jax.dtypes.canonicalize_dtype(empty.dtype) != empty.dtype else jnp.asarray(empty)
    if kind == "value":
        if not isinstance(record["value"], (bool, int, float, str, type(None))):
            raise DaqError(f"it is said to be {record['value']!r}, which is no number and no string")
        return record["value"]
    raise DaqError(f"it is a {kind!r}, of which this version of daq_jax knows nothing; upgrade daq_jax")


def _refuse_misfit(q: QTensor) -> None:
    """Raises DaqError if the arrays of a QTensor are not what its static fields say."""
    problem = matrix_problem(q.codes.shape, q.matrix)
    if problem:
        raise DaqError(f"its matrix axes are {q.matrix}: {problem}; save it again")
    needed = [("codes", q.codes, q.codes.shape, q.format.dtype), ("scale", q.scale, q.view.grid, jnp.float32)]
    needed += [] if q.zero is None else [("zero", q.zero, q.view.grid, jnp.float32)]
    for name, found, shape, dtype in needed:
        if tuple(found.shape) != tuple(shape) or found.dtype != dtype:
            raise DaqError(
                f"its {name} is {found.dtype} {tuple(found.shape)}; {q.format.name} codes under {q.tiling} "
                f"need {np.dtype(dtype)} {tuple(shape)}; save it again"
            )


def qtensor_of(record: Record, arrays: Mapping[str, Any]) -> QTensor:
    """The QTensor of these static fields and arrays; see `leaf_of`."""
    tiling = dict(record["tiling"])
    name = tiling.pop("name")
    if record["format"] not in FORMATS or name not in TILINGS:
        raise DaqError(
            f"format {record['format']!r} or tiling {name!r} is unknown to this version; upgrade daq_jax"
        )
    dtype = np.dtype(jnp.dtype(record["dtype"]))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise DaqError(f"its dtype is {dtype}; needed one of floats")
    rows, columns = (tuple(axes) for axes in record["matrix"])
    return QTensor(
        **arrays,
        format=FORMATS[record["format"]],
        tiling=TILINGS[name](**tiling),
        dtype=dtype,
        matrix=(rows, columns),
    )


def _to_bytes(fields: tuple[Any, ...]) -> bytes:
    """The static fields of a QTensor, as a pytree has them, for `jax.export`."""
    static = dict(zip(_QTENSOR_STATIC, fields, strict=True))
    return json.dumps(static_record(QTensor(**dict.fromkeys(QTENSOR_ARRAYS), **static))).encode()


def _from_bytes(data: bytes | bytearray) -> tuple[Any, ...]:
    q = qtensor_of(json.loads(bytes(data)), dict.fromkeys(QTENSOR_ARRAYS))
    return tuple(getattr(q, name) for name in _QTENSOR_STATIC)


jax.export.register_pytree_node_serialization(
    QTensor, serialized_name="daq_jax.QTensor", serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
)
