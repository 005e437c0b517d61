"""Values as plain JSON that differs where the values do: what a recipe is, by content and never by name.

Two lambdas have one name, and so have two functions of one file before and after an edit. A function is
therefore described by its code, its defaults, what it closes over and the globals it reads; an instance by
its class and its fields. What belongs to an installed package is described by its name and the version of the
package. Class variables marked `ClassVar` count as written in the source, not as they stand.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
import types
import uuid
from collections.abc import Mapping, Sequence, Set
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

UNKNOWN = "cannot be told from another by content"
_PLAIN = (str, int, float, bool, type(None))


def describe(value: Any) -> Any:
    """A value as plain JSON that is the same in every process.

    What has no content that can be read is described by a word of its own in every call, so that no two
    jobs with it count as one.
    """
    return _Describer().describe(value)


class _Describer:
    """Describes values that may refer to one another in circles."""

    def __init__(self) -> None:
        self._open: list[int] = []  # ids of the values that are being described, from the outermost on
        self._done: dict[int, tuple[Any, Any]] = {}  # value and description by id

    def describe(self, value: Any) -> Any:
        """The description of a value; of one that is being described, how far out it is."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self._open:
            return f"{len(self._open) - self._open.index(id(value))} levels up"
        if id(value) not in self._done:
            self._open.append(id(value))
            self._done[id(value)] = value, self._composed(value)
            self._open.pop()
        return self._done[id(value)][1]

    def _composed(self, value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            array = np.asarray(value)
            return f"{array.dtype} {array.shape} {_digest(np.ascontiguousarray(array).tobytes())}"
        if isinstance(value, Mapping):
            return {str(key): self.describe(x) for key, x in value.items()}
        if isinstance(value, (bytes, complex, np.dtype, Path, enum.Enum)):
            return repr(value)
        if isinstance(value, Set):
            return sorted((self.describe(x) for x in value), key=repr)
        if isinstance(value, Sequence):
            return [self.describe(x) for x in value]
        if isinstance(value, types.ModuleType):
            return _module(value)
        return self._of_code(value)

    def _of_code(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return {"partial": [self.describe(x) for x in (value.func, value.args, value.keywords)]}
        if isinstance(value, types.MethodType):
            return {"method": [self.describe(value.__func__), self.describe(value.__self__)]}
        if isinstance(value, (types.FunctionType, type)):
            if _is_installed(value):
                return _named(value)
            inner = self._class(value) if isinstance(value, type) else self._function(value)
            return _in_short(value.__qualname__, inner)
        if hasattr(value, "__wrapped__"):  # such as what jax.jit returns
            return {"wrapped": self.describe(value.__wrapped__), "by": _named(type(value))}
        if isinstance(value, types.BuiltinFunctionType | np.ufunc):
            return _named(value)
        return self._instance(value)

    def _instance(self, value: Any) -> Any:
        kind = type(value)
        if dataclasses.is_dataclass(value):
            state: Any = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            state = getattr(value, "__dict__", None)
            if not isinstance(state, dict) or kind.__reduce_ex__ is not object.__reduce_ex__:
                return f"{_named(kind)} {UNKNOWN}: {uuid.uuid4()}"
        named = kind.__qualname__ if _is_installed(kind) else self.describe(kind)
        return {"kind": named, **{str(name): self.describe(x) for name, x in state.items()}}

    def _function(self, function: types.FunctionType) -> Any:
        cells = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells[name] = self.describe(cell.cell_contents)
            except ValueError:  # not filled yet
                cells[name] = None
        names = _names_in(function.__code__) & set(function.__globals__)
        return {
            "code": _code(function.__code__),
            "defaults": self.describe([function.__defaults__, function.__kwdefaults__]),
            "closure": cells,
            "globals": {name: self.describe(function.__globals__[name]) for name in sorted(names)},
        }

    def _class(self, kind: type) -> Any:
        state = {n for n, x in vars(kind).get("__annotations__", {}).items() if "ClassVar" in str(x)}
        members = {}
        for name, x in vars(kind).items():
            inner = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
            code = isinstance(inner, types.FunctionType) and inner.__qualname__.startswith(kind.__qualname__)
            if name not in state and _counts(name) and (code or isinstance(inner, _PLAIN)):
                members[name] = self.describe(inner)
        above = [self.describe(base) for base in kind.__bases__ if base is not object]
        return {"source": _source(kind), "members": members, "above": above}


def _counts(name: str) -> bool:
    """Whether an attribute of a class can decide what its instances do; Python makes most `__names__`."""
    return not name.startswith("__") or name in ("__call__", "__post_init__")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _in_short(name: str, inner: Any) -> str:
    """Code in one word, so that a description does not grow with all that the code refers to."""
    words = json.dumps(inner, sort_keys=True)
    return f"{name} {UNKNOWN}: {uuid.uuid4()}" if UNKNOWN in words else f"{name} {_digest(words.encode())}"


def _code(code: types.CodeType) -> Any:
    constants = [_code(x) if isinstance(x, types.CodeType) else _constant(x) for x in code.co_consts]
    return [_digest(code.co_code + repr((code.co_names, code.co_varnames)).encode()), *constants]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def _names_in(code: types.CodeType) -> set[str]:
    inner = [_names_in(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*inner)


def _source(kind: type) -> str:
    try:
        return _digest(inspect.getsource(kind).encode())
    except (OSError, TypeError):  # typed in, or made by a program
        return ""


def _named(value: Any) -> str:
    module = str(getattr(value, "__module__", "") or "")
    return f"{_package(module)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


@functools.cache
def _package(module: str) -> str:
    """Name of a module, and the version of the package that it belongs to."""
    try:
        return f"{module} {metadata.version(module.partition('.')[0])}"
    except (metadata.PackageNotFoundError, ValueError):
        return module


def _module(module: types.ModuleType) -> str:
    """A module by its name and version, or by its file if it belongs to no package with a version."""
    file = getattr(module, "__file__", None)
    if file is None or _is_installed(types.SimpleNamespace(__module__=module.__name__)):
        return _package(module.__name__)
    return f"{module.__name__} {_digest(Path(file).read_bytes())}"


def _is_installed(value: Any) -> bool:
    """Whether a function or a class belongs to a package with a version, so that its name says what it is."""
    top = str(getattr(value, "__module__", "") or "").partition(".")[0]
    if top in ("daq_jax", "builtins") or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    places = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    return file is not None and any(Path(place) in Path(file).parents for place in places)


def flags() -> dict[str, Any]:
    """Versions and global settings of JAX by which codes may differ."""
    names = (
        "jax_default_dtype_bits", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64",
        "jax_numpy_dtype_promotion", "jax_threefry_partitionable",
    )  # fmt: skip
    found = {name: getattr(jax.config, name, None) for name in names}
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "ml_dtypes")}
    return describe(versions | found | {"backend": jax.default_backend()})


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two descriptions differ: a phrase for each place, by its dotted name."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [*before, *(key for key in now if key not in before)]
        below = f"{name}." if name else ""
        return [d for key in names for d in differences(before.get(key), now.get(key), f"{below}{key}")]
    if before == now:
        return []
    if UNKNOWN in str(now):
        return [f"{name} {UNKNOWN}: pass a function or a dataclass"]
    if all(isinstance(x, _PLAIN) and len(str(x)) <= 40 for x in (before, now)):
        return [f"{name} was {before} and is {now}"]
    return [f"{name} is another"]
