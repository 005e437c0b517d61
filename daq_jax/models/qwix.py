"""To and from qwix (google/qwix): the same codes and scales as a `qwix.QArray`, bit for bit.

A QArray's scale has the rank of its weight, and each of its axes has a length that divides the weight's: all
tiles are whole, and a tile never spans part of an axis and part of the next. Both classes mean
`(code - zero) * scale`. A QArray's zero point has the dtype of its codes, a QTensor's zero is any float32.
What the other class cannot hold is refused. Scales stay float32. qwix is imported when a function here is
called.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from daq_jax.errors import DaqError
from daq_jax.formats import Format, fp4_e2m1, fp8_e4m3fn, fp8_e5m2, int4, int8, nf4
from daq_jax.qtensor import QTensor
from daq_jax.rules import DEFAULT_RULES, Rule, first_match
from daq_jax.tilings import (
    DEFAULT_MATRIX,
    Block,
    Channel,
    Group,
    Matrix,
    PerTensor,
    TileView,
    Tiling,
    matrix_problem,
)
from daq_jax.trees import PyTree, is_concrete, is_qtensor, keyed_leaves

# Formats by what qwix calls them; of those with a table of levels it has only nf4.
_BY_DTYPE: tuple[Format, ...] = (fp8_e4m3fn, fp8_e5m2, int8, int4, fp4_e2m1)
_FORMATS: dict[str, Format] = {**{f.dtype: f for f in _BY_DTYPE}, "nf4": nf4}
_QTYPES = {f.name: qtype for qtype, f in _FORMATS.items()}


def to_qwix(tree: PyTree) -> PyTree:
    """A tree with a `qwix.QArray` in place of each QTensor. Needs qwix.

    A QArray has the dtype of its scale, float32 here, and so has what is computed with it; `astype` of a
    QArray would round the scale.

    Raises:
        DaqError: naming every leaf that has no such form: partial tiles at an edge, tiles cut across axes,
            a zero that the dtype of the codes lacks, or a format that qwix lacks.
    """
    import qwix

    def convert(q: QTensor) -> Any:
        if q.format.name not in _QTYPES:
            raise DaqError(f"qwix has no {q.format.name}")
        codes = q.codes.astype(jnp.uint4) if q.format == nf4 else q.codes
        zero = None if q.zero is None else _spread(q, _zero_point(q.zero, codes.dtype))
        return qwix.QArray(codes, _spread(q, q.scale), zero, _QTYPES[q.format.name])

    return _converted(tree, is_qtensor, lambda path, q: convert(q))


def from_qwix(
    tree: PyTree, *, dtype: jax.typing.DTypeLike | None = None, rules: Sequence[Rule] = DEFAULT_RULES
) -> PyTree:
    """A tree with a QTensor in place of each `qwix.QArray`. Needs qwix.

    Args:
        tree: any pytree.
        dtype: that the weights had; None takes that of each scale.
        rules: tell the matrix of each weight by its path, as in `quantize`; nothing else of them counts.

    Raises:
        DaqError: naming every leaf that a QTensor cannot hold: tiles that are not runs of inputs by runs of
            outputs, scales that part of a batch shares, zero points of other tiles than the scales', or a
            format that we lack.
    """
    import qwix

    def convert(path: str, array: Any) -> QTensor:
        rule = first_match(path, array.ndim, rules)
        matrix = (rule and rule.matrix) or DEFAULT_MATRIX
        return _qtensor(array, matrix, np.dtype(dtype or array.scale.dtype))

    return _converted(tree, lambda x: isinstance(x, qwix.QArray), convert)


def _converted(tree: PyTree, is_ours: Callable[[Any], bool], convert: Callable[[str, Any], Any]) -> PyTree:
    """A tree with some of its leaves converted, or one error that names all that cannot be."""
    found, problems = [], []
    for path, (_, leaf) in keyed_leaves(tree, is_ours).items():
        try:
            found.append(convert(path, leaf) if is_ours(leaf) else leaf)
        except DaqError as error:
            problems.append(f"{path!r}: {error}")
    if problems:
        raise DaqError(
            f"{len(problems)} of the leaves cannot be converted:" + "".join(f"\n  {p}." for p in problems)
        )
    leaves = [x for x in found if x is not None]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_ours), leaves)


def _lengths(axes: Sequence[int], tile: int, tiles: int) -> list[int]:
    """Length of a scale on each of several axes, over which together run `tiles` tiles of `tile` elements."""
    if tile * tiles != math.prod(axes):
        raise DaqError(f"{math.prod(axes)} inputs or outputs are not whole tiles of {tile}")
    lengths = []
    for n in reversed(axes):
        if max(n, tile) % min(n, tile):
            raise DaqError(f"tiles of {tile} cut across the axes {tuple(axes)}")
        lengths.append(max(n // tile, 1))
        tile = max(tile // n, 1)
    return lengths[::-1]


def _spread(q: QTensor, scale: Array) -> Array:
    """A scale in the rank and the axis order of its weight."""
    batch, rows, columns = q.view.axes
    (r, c), grid = q.view.tile, q.view.grid
    lengths = [*q.view.batch]
    lengths += _lengths([q.shape[a] for a in rows], r, grid[-2])
    lengths += _lengths([q.shape[a] for a in columns], c, grid[-1])
    order = (*batch, *rows, *columns)
    return scale.reshape(lengths).transpose(sorted(range(q.ndim), key=order.__getitem__))


def _zero_point(zero: Array, dtype: np.dtype) -> Array:
    """A zero in the dtype of the codes, as qwix wants it, where that changes no value."""
    if not is_concrete(zero):
        raise DaqError("whether qwix can hold its zero is seen from numbers alone: call this outside jit")
    held = zero.astype(dtype)
    if not jnp.array_equal(held.astype(zero.dtype), zero):
        raise DaqError(f"its zero is no {dtype}, which qwix needs for codes of that dtype")
    return held


def _qtensor(array: Any, matrix: Matrix, dtype: np.dtype) -> QTensor:
    """The QTensor of a QArray."""
    qtype = str(array.qtype) if isinstance(array.qtype, str) else np.dtype(array.qtype).name
    if qtype not in _FORMATS:
        raise DaqError(f"daq_jax has no {qtype}")
    if why := matrix_problem(array.shape, matrix):
        raise DaqError(f"it is {array.shape} and cannot be viewed as matrix={matrix}: {why}")
    whole = TileView(array.shape, matrix, PerTensor())
    batch, rows, columns = whole.axes
    lengths = list(array.scale.shape)
    for axis in batch:
        if lengths[axis] not in (1, array.shape[axis]):
            raise DaqError(f"part of its axis {axis} shares a scale, which is a batch axis here")
        lengths[axis] = array.shape[axis]
    tiling, grid = _tiling(array.shape, lengths, whole)

    def by_tile(x: Array) -> Array:
        x = _repeated(x.astype(jnp.float32), lengths)
        return x.transpose(*batch, *rows, *columns).reshape(*whole.batch, *grid)

    codes = array.qvalue.astype(jnp.uint8) if qtype == "nf4" else array.qvalue
    zero = None if array.zero_point is None else by_tile(array.zero_point)
    return QTensor(codes, by_tile(array.scale), _FORMATS[qtype], tiling, dtype, matrix, zero)


def _repeated(x: Array, lengths: Sequence[int]) -> Array:
    """Scales or zero points that several tiles share, one for each tile."""
    for axis, n in enumerate(lengths):
        if n % x.shape[axis]:
            raise DaqError(f"its zero points {x.shape} are not one for each scale, {tuple(lengths)}")
        x = jnp.repeat(x, n // x.shape[axis], axis)
    return x


def _tiling(shape: Sequence[int], scale: Sequence[int], whole: TileView) -> tuple[Tiling, tuple[int, int]]:
    """The tiling of a scale of this shape, and its number of tiles along inputs and outputs."""
    tile = []
    for axes in whole.axes[1:]:
        n = math.prod(shape[a] for a in axes) // math.prod(scale[a] for a in axes)
        if _lengths([shape[a] for a in axes], n, math.prod(scale[a] for a in axes)) != [
            scale[a] for a in axes
        ]:
            raise DaqError(
                f"a scale {tuple(scale)} of a weight {tuple(shape)} is not one for each run of {n}"
            )
        tile.append(n)
    (r, c), rows, columns = tile, whole.rows, whole.columns
    grid = (rows // r, columns // c)
    if c == 1:
        return (Channel() if r == rows else Group(r)), grid
    return (PerTensor() if grid == (1, 1) else Block(r, c)), grid
