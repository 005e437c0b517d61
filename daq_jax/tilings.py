"""Which elements of a weight share one scale, and the view of the weight in which they stand together.

A tiling says how large a tile is, `(r, c)`, for a matrix of `R` inputs and `C` outputs. Everything else is
the same for all of them: a `TileView` splits each matrix axis into (tiles, elements of a tile) where it lies,
so that nothing is transposed for the common layouts, and later code reduces over the two element axes.

| tiling | tile | scale |
|---|---|---|
| `Block(r, c)` | `r` inputs by `c` outputs | `[..., ceil(R / r), ceil(C / c)]` |
| `Channel()` | all inputs of one output | `[..., 1, C]` |
| `PerTensor()` | the whole matrix | `[..., 1, 1]` |
| `Group(n)` | `n` inputs of one output | `[..., ceil(R / n), C]` |
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from daq_jax.errors import check_whole_numbers

Matrix = tuple[tuple[int, ...], tuple[int, ...]]  # (input axes, output axes) of a weight
DEFAULT_MATRIX: Matrix = ((-2,), (-1,))  # as Flax stores a kernel; all other axes are a batch


@runtime_checkable
class Tiling(Protocol):
    """Which elements of a matrix share a scale: a frozen, hashable value with this one method."""

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a whole tile of a `[rows, columns]` matrix, at most those of the matrix.

        Tiles start at the first row and the first column; tiles cut off at the far edges are tiles too.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Block(Tiling):
    """One scale for each block of `r` inputs by `c` outputs; blocks cut off at an edge are blocks too."""

    r: int = 128
    c: int = 128

    def __post_init__(self) -> None:
        check_whole_numbers(self, r=self.r, c=self.c)

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a tile in a `[rows, columns]` matrix."""
        return min(self.r, rows), min(self.c, columns)


@dataclasses.dataclass(frozen=True)
class Channel(Tiling):
    """One scale for each output."""

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a tile in a `[rows, columns]` matrix."""
        return rows, 1


@dataclasses.dataclass(frozen=True)
class PerTensor(Tiling):
    """One scale for the whole matrix; each matrix of a batch has its own."""

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a tile in a `[rows, columns]` matrix."""
        return rows, columns


@dataclasses.dataclass(frozen=True)
class Group(Tiling):
    """One scale for each run of `n` inputs of one output."""

    n: int

    def __post_init__(self) -> None:
        check_whole_numbers(self, n=self.n)

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a tile in a `[rows, columns]` matrix."""
        return min(self.n, rows), 1


def matrix_problem(shape: Sequence[int], matrix: Matrix) -> str | None:
    """Why `matrix` cannot be the matrix view of a weight of this shape, or None if it can."""
    axes = [*matrix[0], *matrix[1]]
    if not matrix[0] or not matrix[1]:
        return "it needs at least one input axis and one output axis"
    if any(not -len(shape) <= a < len(shape) for a in axes):
        return f"the weight has only {len(shape)} axes"
    if len({a % len(shape) for a in axes}) < len(axes):
        return "an axis is named twice"
    return None


def _is_run(axes: Sequence[int]) -> bool:
    return all(b == a + 1 for a, b in itertools.pairwise(axes))


@dataclasses.dataclass(frozen=True)
class TileView:
    """How a weight of one shape is cut into tiles and joined again. The only place that pads.

    A cut weight keeps its axis order; each batch axis stays, and the input axes become two, (grid rows, rows
    of a tile), and the output axes two, (grid columns, columns of a tile). An HF weight `[out, in]` is cut to
    `[C / c, c, R / r, r]`, a Flax kernel `[in, out]` to `[R / r, r, C / c, c]`. Input or output axes that do
    not lie side by side are moved to the end first. Padding is zero.

    Attributes:
        shape: the weight's shape.
        matrix: its input axes and its output axes.
        tiling: the tiling.
    """

    shape: tuple[int, ...]
    matrix: Matrix
    tiling: Tiling

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Batch, input and output axes, none negative."""
        n = len(self.shape)
        rows, columns = (tuple(a % n for a in axes) for axes in self.matrix)
        return tuple(a for a in range(n) if a not in rows + columns), rows, columns

    @property
    def _order(self) -> tuple[int, ...]:
        """Axis order in which the input axes, and the output axes, stand side by side."""
        batch, rows, columns = self.axes
        in_place = _is_run(rows) and _is_run(columns)
        return tuple(range(len(self.shape))) if in_place else batch + rows + columns

    @property
    def rows(self) -> int:
        """R, the number of inputs."""
        return math.prod(self.shape[a] for a in self.axes[1])

    @property
    def columns(self) -> int:
        """C, the number of outputs."""
        return math.prod(self.shape[a] for a in self.axes[2])

    @property
    def tile(self) -> tuple[int, int]:
        """(r, c), the size of a whole tile."""
        return self.tiling.tile(self.rows, self.columns)

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the batch axes, in the weight's order."""
        return tuple(self.shape[a] for a in self.axes[0])

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the scale: batch, rows of tiles, columns of tiles."""
        r, c = self.tile
        return (*self.batch, -(-self.rows // r), -(-self.columns // c))

    @property
    def _roles(self) -> tuple[str, ...]:
        """'b', 'r' or 'c' for each axis once input and output axes are merged."""
        _, rows, columns = self.axes
        roles = ["r" if a in rows else "c" if a in columns else "b" for a in self._order]
        return tuple(x for i, x in enumerate(roles) if x == "b" or i == 0 or roles[i - 1] != x)

    @property
    def tile_axes(self) -> tuple[int, int]:
        """Positions of a tile's rows and columns in a cut weight."""
        start = {role: i for i, role in enumerate(self._split_roles)}
        return start["r"], start["c"]

    @property
    def grid_axes(self) -> tuple[int, int]:
        """Positions of the rows and of the columns of tiles in a cut weight."""
        r, c = self.tile_axes
        return r - 1, c - 1

    @property
    def _split_roles(self) -> tuple[str, ...]:
        split = {"b": ("b",), "r": ("R", "r"), "c": ("C", "c")}  # capitals: axes of the grid
        return tuple(x for role in self._roles for x in split[role])

    def _merged_shape(self) -> list[int]:
        batch, sizes = iter(self.batch), {"r": self.rows, "c": self.columns}
        return [next(batch) if role == "b" else sizes[role] for role in self._roles]

    def _padded_shape(self) -> list[int]:
        whole = dict(zip("rc", (g * t for g, t in zip(self.grid[-2:], self.tile, strict=True)), strict=True))
        return [whole.get(role, n) for role, n in zip(self._roles, self._merged_shape(), strict=True)]

    def _cut_shape(self) -> list[int]:
        batch = iter(self.batch)
        sizes = dict(zip("RCrc", (*self.grid[-2:], *self.tile), strict=True))
        return [next(batch) if role == "b" else sizes[role] for role in self._split_roles]

    def cut(self, x: Array) -> Array:
        """A weight, or anything of its shape, cut into tiles."""
        x = x.transpose(self._order).reshape(self._merged_shape())
        missing = [(0, whole - n) for whole, n in zip(self._padded_shape(), x.shape, strict=True)]
        return (jnp.pad(x, missing) if any(m for _, m in missing) else x).reshape(self._cut_shape())

    def join(self, tiles: Array) -> Array:
        """The inverse of `cut`."""
        x = tiles.reshape(self._padded_shape())[tuple(slice(n) for n in self._merged_shape())]
        x = x.reshape([self.shape[a] for a in self._order])
        return x.transpose([self._order.index(a) for a in range(len(self.shape))])

    @property
    def lines(self) -> "TileView":
        """The same weight in tiles one element wide along its last axis; `self` if that one is whole.

        A TPU lays the last axis out in runs of 128. To split it into (tiles, elements of a tile) is to write
        the whole weight anew. So there a tile's scale is repeated along that axis, by `in_lines`: one number
        for each line. Tiles of one row stay as they are: theirs would be as many as weights.
        """
        r, c = self.tile
        narrow = {"r": Block(1, c), "c": Block(r, 1)}.get(self._roles[-1])
        if narrow is None or math.prod(narrow.tile(self.rows, self.columns)) == 1:
            return self
        return dataclasses.replace(self, tiling=narrow)

    def in_lines(self, scale: Array) -> Array:
        """A scale for each tile, `[batch..., R / r, C / c]`, as one for each tile of `lines`."""
        grid = self.lines.grid
        for axis in (-2, -1):
            if self.grid[axis] != grid[axis]:
                scale = jnp.repeat(scale, self.tile[axis], axis=axis)
                scale = lax.slice_in_dim(scale, 0, grid[axis], axis=axis)
        return scale

    def from_lines(self, scale: Array) -> Array:
        """The inverse of `in_lines`."""
        for axis in (-2, -1):
            if self.grid[axis] != self.lines.grid[axis]:
                scale = lax.slice_in_dim(scale, 0, None, self.tile[axis], axis=axis)
        return scale

    @property
    def lines_of_a_tile(self) -> int:
        """How many tiles of `lines`, side by side, are one of these; fewer at an edge."""
        return max(t // s for t, s in zip(self.tile, self.lines.tile, strict=True))

    def spread(self, scale: Array) -> Array:
        """A scale `[batch..., R / r, C / c]` in a shape that broadcasts over the cut weight."""
        grid_roles = [role for role in self._split_roles if role not in "rc"]
        batch = iter(range(len(self.batch)))
        at = {"R": len(self.batch), "C": len(self.batch) + 1}
        scale = scale.transpose([next(batch) if role == "b" else at[role] for role in grid_roles])
        return jnp.expand_dims(scale, self.tile_axes)

    def gather(self, spread: Array) -> Array:
        """The inverse of `spread`."""
        kept = jnp.squeeze(spread, self.tile_axes)
        grid_roles = [role for role in self._split_roles if role not in "rc"]
        batch = [i for i, role in enumerate(grid_roles) if role == "b"]
        return kept.transpose([*batch, grid_roles.index("R"), grid_roles.index("C")])


def keeps_tiles_whole(weight: NamedSharding, scale: NamedSharding, view: TileView) -> bool:
    """Whether every tile is on one device, given the sharding of the weight and of its scales."""
    batch, rows, columns = view.axes
    spec = tuple(weight.spec) + (None,) * (len(view.shape) - len(weight.spec))
    grid = tuple(scale.spec)[len(batch) :]
    return all(
        (spec[axes[0]] is None or spec[axes[0]] == names) and not any(spec[a] for a in axes[1:])
        for axes, names in zip((rows, columns), grid, strict=True)
    )


def _names(names: Any) -> tuple[str, ...]:
    """The mesh axes that one axis of an array is sharded over."""
    return () if names is None else names if isinstance(names, tuple) else (names,)


def scale_sharding(weight: NamedSharding | None, view: TileView) -> NamedSharding | None:
    """The sharding of a weight's scales: that of their tiles, or replicated where a tile crosses devices."""
    if weight is None:
        return None
    spec = tuple(weight.spec) + (None,) * (len(view.shape) - len(weight.spec))
    sizes = dict(weight.mesh.shape)
    batch, rows, columns = view.axes

    def parts(names: Any) -> int:
        return math.prod(sizes[name] for name in _names(names))

    def of(axes: tuple[int, ...], grid: int, tile: int, length: int) -> Any:
        names = spec[axes[0]]  # the leading axis of several is the one whose shards are whole runs
        if any(spec[a] for a in axes[1:]) or grid % parts(names) or (length // parts(names)) % tile:
            return None
        return names

    r, c = view.tile
    new = [spec[a] for a in batch]
    new += [of(rows, view.grid[-2], r, view.rows), of(columns, view.grid[-1], c, view.columns)]
    return NamedSharding(weight.mesh, PartitionSpec(*new))


def over_outputs(weight: NamedSharding | None, view: TileView) -> NamedSharding | None:
    """A sharding under which every device has whole columns; None where a weight has them, or cannot.

    The mesh axes of the inputs are moved to the first output axis. What works down the rows of a matrix,
    block after block, would send something between devices for every block.
    """
    if weight is None:
        return None
    spec = list(weight.spec) + [None] * (len(view.shape) - len(weight.spec))
    _, rows, columns = view.axes
    first = columns[0]
    names = [name for a in (first, *rows) for name in _names(spec[a])]
    parts = math.prod(weight.mesh.shape[name] for name in names)
    if not any(spec[a] for a in rows) or view.shape[first] % parts:
        return None
    spec = [None if a in rows else tuple(names) if a == first else x for a, x in enumerate(spec)]
    return NamedSharding(weight.mesh, PartitionSpec(*spec))
