"""What the work of a folder takes of memory: the process with JAX, its programs, and the largest matrix."""

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from daq_jax.io.hf.bands import elements_compared
from daq_jax.io.hf.codings import Coding
from daq_jax.io.hf.folders import Tensor
from daq_jax.io.hf.packing import Plain
from daq_jax.recipe import Recipe
from daq_jax.roundings.nearest import Nearest
from daq_jax.roundings.rounding import as_rounding
from daq_jax.searches.search import as_search
from daq_jax.tilings import Tiling

RUNTIME = 700 * 10**6  # bytes of the interpreter, JAX, its compiled programs, and the figures of a band
# The same on a CPU without programs, where `give_back` can (`python -m benchmarks folders peaks`).
# What the libraries of an accelerator take of the host's memory was not measured apart.
_RUNTIME_CPU = 310 * 10**6
# Bytes that compiling a program takes beyond what other work does, and that it leaves with the process.
_BY_TILE = {False: (0, 22 * 10**6), True: (0, 36 * 10**6)}  # by whether scales are scored
_BY_MATRIX = 295 * 10**6, 62 * 10**6
_NOT_GIVEN_BACK = {True: 120 * 10**6, False: 600 * 10**6}  # bytes more in all, by whether codes go by tile
_DECODING = 14 * 10**6  # bytes of each program that dequantizes a tensor, kept or to be audited
# Bytes for each element, on a CPU by XLA's own account: copies of both inputs, and beside them the result and
# what is computed of one part at a time; by whether scales are scored.
_BESIDE_COPIES = {False: 2.2, True: 6.5}
_DEQUANTIZED = 2  # bytes for each element more, where one of the inputs is codes
_HELD = 45 * 10**6  # bytes that compiling and comparing leave with the process, at most
_FIGURES = 33  # bytes for each element of a band that is compared; 25 by XLA's own account
_CUT = 7  # bytes more, where a band is one of several: both inputs and codes are copied, the next's meanwhile
_RESULT = 1.3  # bytes for each element: a code, and a scale for as few as 16
_PACKING = 3  # bytes for each element of codes that are packed, before and after
_CODED = 3  # bytes for each element of a weight that is read from codes


class Room(NamedTuple):
    """The memory that a job may take.

    Attributes:
        memory: bytes that the process may take.
        programs: how many programs are compiled, as far as shapes tell.
    """

    memory: int
    programs: int

    @classmethod
    def of(cls, memory: int, quantized: Iterable[Tensor]) -> "Room":
        """The room of a job that quantizes these tensors."""
        return cls(memory, max(1, len({tensor.shape for tensor in quantized})))


class Work(NamedTuple):
    """What a recipe asks of memory.

    Attributes:
        bytes_each: bytes that quantizing takes for each element, two inputs of 16 bits included.
        by_tile: whether codes depend on one tile at a time, so that a band of a matrix is coded by itself.
        program_bytes: bytes that compiling takes beyond other work, and bytes of each compiled program.
    """

    bytes_each: int
    by_tile: bool
    program_bytes: tuple[int, int]


class Need(NamedTuple):
    """What a band takes of memory on its way, in bytes.

    Attributes:
        read: the weights that are read.
        work: beside them, the most of what compiling, quantizing and comparing take in turn, the result
            included.
        write: the result, while the next band is quantized.
    """

    read: float = 0
    work: float = 0
    write: float = 0


def work_of(recipe: Recipe) -> Work:
    """What a recipe asks of memory; the one place that asks its rounding and its search."""
    rounding = as_rounding(recipe.rounding)
    # Other roundings of single tiles draw numbers by the place in the weight, or align their sets of tiles.
    search = as_search(recipe.search)
    by_tile = rounding == Nearest() and search.is_tile_local
    first, each = _BY_TILE[search.reads_metric] if by_tile else _BY_MATRIX
    return Work(rounding.bytes_per_element, by_tile, (first, each))


def need_of(
    shape: Sequence[int], rows: int, sources: Sequence[Tensor], recipe: Recipe, coding: Coding
) -> Need:
    """What a band of a weight takes that is quantized.

    Args:
        shape: of the weight, `[..., out, in]`.
        rows: of the band, along the first axis.
        sources: the weight, and its base if there is one.
        recipe: how it is quantized.
        coding: how it is stored.
    """
    found = tuple(map(_Source.of, sources))
    return _need_of(tuple(shape), rows, found, recipe, coding.tiling, isinstance(coding.packing, Plain))


class _Source(NamedTuple):
    width: int  # bytes of an element, as it is quantized
    tiling: Tiling | None  # of codes
    made: bool  # turned, or summed with an adapter

    @classmethod
    def of(cls, tensor: Tensor) -> "_Source":
        width = tensor.dtype.itemsize if tensor.dtype and not tensor.coding else 2
        return cls(width, tensor.coding.tiling if tensor.coding else None, tensor.copied is not None)

    @property
    def read_each(self) -> int:
        return _CODED if self.tiling else self.width * (3 if self.made else 1)


@functools.lru_cache(4096)  # a large folder has many tensors and few shapes
def _need_of(
    shape: tuple[int, ...],
    rows: int,
    sources: tuple[_Source, ...],
    recipe: Recipe,
    tiling: Tiling,
    plain: bool,
) -> Need:
    elements = rows * math.prod(shape[1:])
    read = elements * sum(source.read_each for source in sources)
    work = max(elements * _work_each(sources, recipe), _compiling(recipe))
    write = elements * (_RESULT if plain else _PACKING)
    if jax.default_backend() != "cpu" or len(sources) == 1:  # nothing is compared, or on the accelerator
        return Need(read, work, write)
    tilings = [tiling, *(x.tiling for x in sources if x.tiling)]
    compared = elements_compared((rows, *shape[1:]), tilings)
    figures = (_FIGURES + _CUT * (compared < elements)) * compared
    return Need(read, max(work + min(figures, _HELD), elements * _RESULT + figures), write)


def _compiling(recipe: Recipe) -> int:
    """Bytes that compiling takes and gives back before the program runs."""
    first, _ = work_of(recipe).program_bytes
    return first if jax.default_backend() == "cpu" and can_give_back() else 0


def _work_each(sources: Sequence[_Source], recipe: Recipe) -> float:
    work, widths = work_of(recipe), [source.width for source in sources]
    if jax.default_backend() == "cpu" and work.by_tile:
        copies = sum(widths) * 2 / len(widths)  # a weight without a base is its own
        beside = _BESIDE_COPIES[as_search(recipe.search).reads_metric]
        return copies + beside + _DEQUANTIZED * any(x.tiling for x in sources)
    return float(work.bytes_each - 4 + 2 * (max(widths) - 2))


def peak_of(needs: Iterable[Need]) -> float:
    """Most bytes that bands take in turn: while one is quantized, the next is read and the last written."""
    steps = [Need(), *needs, Need(), Need()]
    found = zip(steps, steps[1:], steps[2:], strict=False)
    return float(max(before.write + now.read + now.work + after.read for before, now, after in found))


def runtime_of(recipe: Recipe, programs: int, decoding: int = 0, *, gives_back: bool | None = None) -> int:
    """Bytes of the interpreter and of JAX with compiled programs.

    Args:
        recipe: how the programs quantize.
        programs: how many programs quantize.
        decoding: how many programs only dequantize.
        gives_back: whether what compiling took is given back before other work; None for `can_give_back()`.
    """
    work = work_of(recipe)
    _, each = work.program_bytes
    if jax.default_backend() != "cpu":
        return RUNTIME + (programs + decoding - 1) * each
    if gives_back is None:
        gives_back = can_give_back()
    kept = 0 if gives_back else _NOT_GIVEN_BACK[work.by_tile]
    return _RUNTIME_CPU + programs * each + decoding * _DECODING + kept


def can_give_back() -> bool:
    """Whether `give_back` can: on Linux with glibc, and not on macOS, Windows and Alpine."""
    return _malloc_trim() is not None


def give_back() -> bool:
    """Returns free memory to the system, as what a compiler took; the C library would keep it for later.

    Returns:
        `can_give_back()`; if False, nothing was done.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    return trim is not None


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows None names no library
        return None
