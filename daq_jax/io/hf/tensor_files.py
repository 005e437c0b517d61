"""Safetensors files: headers read and checked before anything else, tensors read and written one by one.

A file is a little-endian u64 length `N`, `N` bytes of JSON (name -> dtype, shape, byte offsets), then the
bytes of all tensors with neither hole nor overlap. Everything here works on one tensor, or on a band of one:
the `safetensors` package has no NumPy dtype for FP8 when it reads, and writes whole files from memory.

Bytes are read by position, not mapped: mapped pages count as this process's memory until they are dropped,
and a file that shrinks under a mapping kills the process where a short read is an error.

Source: the format as https://github.com/huggingface/safetensors describes it.
"""

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from daq_jax.errors import DaqError
from daq_jax.io.disk.atomic import open_temporary, publish

# The format's own names, as the reference writer ranks them: dtypes further down come first in a file.
_RANKED = {
    "BOOL": np.dtype(np.bool_),
    "F4": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_RANK = {name: rank for rank, name in enumerate(_RANKED)}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_LARGEST_HEADER = 100_000_000  # bytes, as in the reference reader
_MOST_AXES = 32  # more than any weight has, and fewer than NumPy's own limit
_ALIGNED = 64  # bytes: where an array begins that JAX takes on a CPU without a copy
_CHUNK = 16 * 2**20  # bytes copied at a time


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, before it has bytes.

    Attributes:
        dtype: the format's own name, such as "BF16" or "F8_E4M3".
        shape: number of elements along each axis.
    """

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: np.dtype, shape: tuple[int, ...]) -> "TensorSpec":
        """The spec of an array.

        Raises:
            DaqError: if a file has no name for its dtype.
        """
        names = [name for name, known in _RANKED.items() if known is not None and known == dtype]
        if not names:
            raise DaqError(f"a safetensors file cannot hold {dtype}; cast it to a dtype that it can.")
        return cls(names[0], tuple(shape))

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype in memory; None for 4-bit and 6-bit floats, which are copied but not read."""
        return _RANKED[self.dtype]

    @functools.cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def nbytes(self) -> int:
        """Number of bytes, rounded up to whole ones."""
        known = self.numpy_dtype
        bits = _BITS[self.dtype] if known is None else 8 * known.itemsize
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is, and the position of its first byte."""

    spec: TensorSpec
    start: int


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DaqError: naming the file, if it does not hold one.
    """
    try:
        if path.stat().st_size > _LARGEST_HEADER:
            raise DaqError(f"{path}: {what} is larger than {_LARGEST_HEADER // 10**6} MB.")
        return parse_json(path.read_bytes(), f"{path}: {what}")
    except OSError as error:
        raise DaqError(f"{path}: {what} cannot be read: {error.strerror or error}.") from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice.

    Raises:
        DaqError: beginning with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise DaqError("a key stands twice in one object")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in data:  # no other way to write a lone surrogate
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DaqError(f"{where} is not valid JSON: {reason}.") from error
    if not isinstance(value, dict):
        raise DaqError(f"{where} must be a JSON object; got {type(value).__name__}.")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """All tensors of a file by name, in the order of their bytes. Reads the header alone.

    Raises:
        DaqError: naming the file, and the tensor if one is at fault: header too long or no JSON, unknown
            dtype, a shape or offsets that make no sense, a hole, an overlap, a file cut short.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise DaqError(
                    f"{path}: not a safetensors file, or cut short: it has {size} bytes and names a header "
                    f"of {length}; download it again."
                )
            header = parse_json(file.read(length), f"{path}: the header")
    except OSError as error:
        raise DaqError(f"{path}: cannot be read: {error.strerror or error}.") from error
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(f"{path}: tensor {name!r}", raw, start) for name, raw in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].spec.nbytes)))
    end = start
    for name, entry in entries.items():
        if entry.start != end:
            raise DaqError(f"{path}: tensor {name!r} begins at byte {entry.start}, needed {end}.")
        end += entry.spec.nbytes
    if end != size:
        raise DaqError(f"{path}: its header speaks of {end} bytes but it has {size}; download it again.")
    return entries


def _entry(where: str, raw: Any, start: int) -> Entry:
    raw = raw if isinstance(raw, dict) else {}
    dtype, shape, offsets = (raw.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _RANKED:
        raise DaqError(f"{where}: unknown dtype {dtype!r}; known are {', '.join(_RANKED)}.")
    if not _is_whole(shape) or len(shape) > _MOST_AXES or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise DaqError(f"{where}: its shape must be a list of whole numbers; got {_short(shape)}.")
    spec = _spec(dtype, tuple(shape))
    if not _is_whole(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
        raise DaqError(
            f"{where}: {dtype} {spec.shape} takes {spec.nbytes} bytes but its offsets are {_short(offsets)}."
        )
    return Entry(spec, start + offsets[0])


@functools.lru_cache(maxsize=4096)
def _spec(dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """One spec for all tensors of a shape: a large folder has many tensors and few shapes."""
    return TensorSpec(dtype, shape)


def _is_whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def drop_pages(file: int, start: int = 0, length: int = 0) -> None:
    """Tells the system, where it listens, that bytes of a file are not needed soon; length 0 for all."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


class TensorReader:
    """Reads tensors of one file by name. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_header(path)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, name: str, band: slice = slice(None)) -> np.ndarray:
        """A tensor, or a band of its first axis, in memory of its own.

        The pages that the system kept of it are dropped: a long walk over a large file leaves no trace.

        Raises:
            DaqError: if the dtype is one of fewer than 8 bits, or the file has become shorter.
        """
        entry = self.entries[name]
        spec, dtype = entry.spec, entry.spec.numpy_dtype
        if dtype is None:
            raise DaqError(f"{self.path}: tensor {name!r} is {spec.dtype}, which cannot be read.")
        if not spec.shape:
            return self._bytes(entry.start, spec.nbytes).view(dtype).reshape(())
        first, last, _ = band.indices(spec.shape[0])
        row = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        rows = max(last - first, 0)
        return self._bytes(entry.start + first * row, rows * row).view(dtype).reshape(rows, *spec.shape[1:])

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor of any dtype, at most 16 MiB at a time."""
        entry = self.entries[name]
        for at in range(0, entry.spec.nbytes, _CHUNK):
            yield self._bytes(entry.start + at, min(_CHUNK, entry.spec.nbytes - at))

    def _bytes(self, start: int, length: int) -> np.ndarray:
        room = np.empty(length + _ALIGNED, np.uint8)
        start_at = -room.ctypes.data % _ALIGNED
        buffer = room[start_at : start_at + length]
        view, done = buffer.data, 0
        while done < length:
            count = os.preadv(self._file, [view[done : done + 2**30]], start + done)
            if not count:
                raise DaqError(f"{self.path}: cut short while it was being read.")
            done += count
        drop_pages(self._file, start, length)
        return buffer

    def close(self) -> None:
        """Closes the file; the reader is of no use afterwards."""
        os.close(self._file)


def in_chunks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The bytes of arrays that follow each other in a tensor, cut as `TensorReader.chunks` cuts them."""
    held = np.empty(0, np.uint8)
    for part in parts:
        held = np.concatenate([held, np.ascontiguousarray(part).reshape(-1).view(np.uint8)])
        while held.size >= _CHUNK:
            yield held[:_CHUNK]
            held = held[_CHUNK:]
    if held.size:
        yield held


class TensorWriter:
    """Writes a file whose tensors are known beforehand, in any order, some bytes at a time.

    Bytes go to a temporary name beside `path`; `finish` gives the file its name once all bytes are on disk.
    Tensors are in the order of the reference writer, so the files are equal byte by byte. As a context
    manager it closes the file at the end, finished or not.

    Args:
        path: path of the finished file.
        specs: every tensor that will be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        header, self.entries = plan_file(specs)
        self._file = open_temporary(path)
        self._put(memoryview(header), 0)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, name: str, data: np.ndarray, at: int = 0) -> None:
        """Writes bytes of a tensor.

        Args:
            name: name of the tensor.
            data: any array, whose bytes are written in C order.
            at: how many bytes of the tensor come before `data`.
        """
        entry = self.entries[name]
        data = np.ascontiguousarray(data)  # a transposed view would be written in the wrong order
        assert at + data.nbytes <= entry.spec.nbytes, f"{name} has {entry.spec.nbytes} bytes"
        self._put(data.reshape(-1).view(np.uint8).data, entry.start + at)

    def _put(self, view: memoryview, start: int) -> None:
        while view:
            count = os.pwrite(self._file, view[: 2**30], start)
            view, start = view[count:], start + count

    def finish(self) -> None:
        """Waits until the disk has everything, then names the file."""
        publish(self._file, self.path)
        drop_pages(self._file)


def plan_file(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file that holds tensors of these specs, and where each tensor begins in the file."""
    ordered = sorted(specs.items(), key=lambda item: (-_RANK[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses a file
    starts, end = {}, 0
    for name, spec in ordered:
        starts[name], end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: Entry(s, first + starts[n]) for n, s in ordered}
