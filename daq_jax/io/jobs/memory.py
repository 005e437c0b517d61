"""What the work of a folder takes of memory: the process with JAX, its programs, and the largest matrix."""

from collections.abc import Iterable
from typing import NamedTuple

import jax

from daq_jax.io.hf.folders import Tensor
from daq_jax.recipe import Recipe
from daq_jax.roundings.nearest import Nearest
from daq_jax.roundings.rounding import as_rounding
from daq_jax.searches.search import as_search

RUNTIME = 700 * 10**6  # bytes of the interpreter, JAX, its compiled programs, and the figures of a band
# The same on a CPU without the programs, and `Work.program_bytes` (`python -m benchmarks folders peaks`).
# What the libraries of an accelerator take of the host's memory was not measured apart.
_RUNTIME_CPU = 380 * 10**6
_BY_TILE = {False: (0, 17 * 10**6), True: (0, 40 * 10**6)}  # by whether scales are scored
_BY_MATRIX = 450 * 10**6, 60 * 10**6
_WRITING = 2  # bytes for each element of the matrix before it, which is being written


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
        program_bytes: bytes that compiling takes at most, and bytes of each compiled program.
    """

    bytes_each: int
    by_tile: bool
    program_bytes: tuple[int, int]


def work_of(recipe: Recipe) -> Work:
    """What a recipe asks of memory; the one place that asks its rounding and its search."""
    rounding = as_rounding(recipe.rounding)
    # Other roundings of single tiles draw numbers by the place in the weight, or align their sets of tiles.
    search = as_search(recipe.search)
    by_tile = rounding == Nearest() and search.is_tile_local
    first, each = _BY_TILE[search.reads_metric] if by_tile else _BY_MATRIX
    return Work(rounding.bytes_per_element, by_tile, (first, each))


def bytes_each_of(tensor: Tensor, recipe: Recipe) -> int:
    """Bytes of memory for each element of the largest matrix: while a pair is quantized, the next is read."""
    wide = max(2, tensor.dtype.itemsize if tensor.dtype else 2)
    return work_of(recipe).bytes_each + _WRITING + 2 * wide + 2 * (wide - 2)


def runtime_of(recipe: Recipe, programs: int) -> int:
    """Bytes of the interpreter and of JAX with so many compiled programs, and of the figures of a band."""
    first, each = work_of(recipe).program_bytes
    if jax.default_backend() == "cpu":
        return _RUNTIME_CPU + first + programs * each
    return RUNTIME + (programs - 1) * each
