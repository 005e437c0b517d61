"""What was kept: a quantized tree beside the change that tuning made.

Everything is counted from the stored codes. `d = tuned - base` is the true change and
`q = dequantized - base` the kept one, both float32; `dequantized` is the product of code and scale before any
cast to the dtype of the weight.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

from daq_jax.analysis import sheets
from daq_jax.analysis.figures import Figures, pool
from daq_jax.analysis.histograms import Details, details_of
from daq_jax.analysis.relation import doubt_of_leaves
from daq_jax.errors import DaqError, refuse
from daq_jax.grids.membership import lies_on_grid
from daq_jax.numerics.arithmetic import reciprocal_power
from daq_jax.numerics.reductions import sum_of_runs, total
from daq_jax.numerics.sharding import run_sharded, sharding_of
from daq_jax.qtensor import QTensor, as_array
from daq_jax.scales import absmax_scale
from daq_jax.trees import PyTree, is_concrete, is_qtensor, named_leaves, unreadable

SMALLEST_CHANGE = 1e-5  # weight units; smaller changes are left out of the sign figures
_LEAST_SQUARES = 1e-20  # sum of d^2 below which some of the squares may be below float32
BIN_EDGES = (1e-5, 1e-4, 1e-3)  # of |d|, weight units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found. Prints as a table, and shows itself as one in a notebook.

    Attributes:
        leaves: figures of each quantized leaf, by path.
        total: figures of all of them together, from pooled sums.
        details: what the pictures of `daq_jax.display.plots` need, by path; empty unless asked for. A
            comparison of folders has one entry for all leaves together, under the path "".
        doubt: a sentence if base and tuned look swapped or unrelated, told from a few weights; else "".
    """

    leaves: dict[str, Figures]
    total: Figures
    details: dict[str, Details] = dataclasses.field(default_factory=dict)
    doubt: str = dataclasses.field(default="", metadata={"static": True})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; and the doubt, if there is one."""
        leaves = {path: figures.to_dict() for path, figures in self.leaves.items()}
        return {"total": self.total.to_dict(), "leaves": leaves} | (
            {"doubt": self.doubt} if self.doubt else {}
        )

    def worst(self, n: int = 10, *, by: str = "projection") -> dict[str, Figures]:
        """The `n` leaves for which one figure is worst, the worst first; leaves where it is NaN come last.

        Args:
            n: how many.
            by: the name of a figure: of `projection` and `norm_ratio` the farthest from 1 is the worst, of
                `flipped`, `lost`, `unchanged`, `mse` and `on_grid` the highest, of all others the lowest.

        Raises:
            DaqError: if there is no such figure.
        """
        ranked = sorted(self.leaves.items(), key=lambda item: item[1].badness(by), reverse=True)
        return dict(ranked[:n])

    def sheet(self, n: int = sheets.SHOWN) -> sheets.Sheet:
        """The comparison as a table of words: the total, and the `n` leaves with the worst projection."""
        hidden = max(0, len(self.leaves) - n)
        return sheets.compared(self.total, self.worst(n), hidden=hidden, doubt=self.doubt)

    def _shown(self, how: Callable[[sheets.Sheet], str]) -> str:
        if not all(figures.is_concrete for figures in (self.total, *self.leaves.values())):
            return f"Comparison of {len(self.leaves)} leaves, traced"
        return how(self.sheet())

    def __repr__(self) -> str:
        return self._shown(sheets.text)

    def _repr_html_(self) -> str:
        return self._shown(sheets.html)


jax.export.register_pytree_node_serialization(
    Comparison,
    serialized_name="daq_jax.Comparison",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: ("",),
)


def compare(base: PyTree, tuned: PyTree, quantized: PyTree, *, details: bool = False) -> Comparison:
    """Compares a quantized tree with the change that tuning made.

    Sums are taken in short runs. Their relative error is below 1e-5 on leaves of 64M elements and more.
    Eagerly the sums are float64 and the counts exact; under `jax.jit` both are float32 arrays, and figures of
    squares mean nothing where those leave float32, at changes beyond 1e17 or below 1e-19 or so.

    Args:
        base: tree of weights before tuning; a leaf may be a QTensor, which stands for its weight.
        tuned: tree of weights after tuning; a leaf may be a QTensor, too.
        quantized: what `quantize` returned. Its QTensors are compared, its other leaves are not.
        details: also collect what the pictures of `daq_jax.display.plots` need; not under a trace.

    Returns:
        Figures of each leaf that was compared, and of all of them together.

    Raises:
        DaqError: naming every quantized leaf that has no partner of its shape in `base` or `tuned`; or if
            the trees are in another order.

    >>> base = {"kernel": jnp.zeros((2, 2))}
    >>> tuned = {"kernel": jnp.ones((2, 2))}
    >>> from daq_jax.quantization import quantize
    >>> float(compare(base, tuned, quantize(base, tuned)).total.projection)
    1.0
    """
    before, after = named_leaves(base), named_leaves(tuned)
    found = {path: q for path, q in named_leaves(quantized).items() if is_qtensor(q)}
    if not found:
        _refuse_wrong_order(base, tuned, quantized)
    _refuse_strangers(before, after, found)
    leaves = {path: compare_leaf(before[path], after[path], q) for path, q in found.items()}
    closer = {path: details_of(before[path], after[path], q) for path, q in found.items()} if details else {}
    concrete = is_concrete((base, tuned))
    doubt = doubt_of_leaves(*({path: x[path] for path in found} for x in (before, after))) if concrete else ""
    return Comparison(leaves, pool(leaves.values()), closer, doubt)


def compare_leaf(base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, quantized: QTensor) -> Figures:
    """Figures of one leaf; all three have one shape. See `compare`."""
    figures = _figures(_sums(base, tuned, quantized), quantized)
    if not figures.is_concrete or _LEAST_SQUARES < figures.dd < np.inf > max(figures.qq, figures.ee):
        return figures
    if figures.dd == 0 and not _differ(base, tuned):
        return figures
    squares, unit = jax.device_get(_squares_in_units(base, tuned, quantized))
    exact = {name: np.float64(x) / np.float64(unit) ** 2 for name, x in squares.items()}
    return dataclasses.replace(figures, **exact)


def _refuse_wrong_order(base: PyTree, tuned: PyTree, quantized: PyTree) -> None:
    """Raises DaqError where nothing is quantized because another tree was meant; rules may keep all."""
    elsewhere = any(is_qtensor(x) for x in (*named_leaves(base).values(), *named_leaves(tuned).values()))
    again = any(quantized is x for x in (base, tuned)) and not jax.tree_util.all_leaves([quantized])
    if elsewhere or again:
        raise DaqError(
            "no leaf of the third tree is quantized: call compare(base, tuned, quantized), in this order, "
            "with what `quantize` returned."
        )


def _refuse_strangers(before: dict[str, Any], after: dict[str, Any], found: dict[str, QTensor]) -> None:
    problems = []
    for path, q in found.items():
        for word, leaves in (("base", before), ("tuned", after)):
            if path not in leaves:
                problems.append(f"{path!r} is quantized but not in {word}")
            elif tuple(np.shape(leaves[path])) != q.shape:
                problems.append(f"{path!r} is {q.shape} but in {word} it is {tuple(np.shape(leaves[path]))}")
            elif why := unreadable(leaves[path]):
                problems.append(f"{path!r} is in {word} {why}")
    if problems:
        way_out = "Pass the trees that were given to `quantize`, and its result."
        refuse("the three trees do not belong together", problems, way_out)


def _figures(sums: dict[str, Array], q: QTensor) -> Figures:
    """On the host in float64 and whole numbers; under a trace in float32, which pools without overflow."""
    if any(isinstance(x, Tracer) for x in sums.values()):
        return Figures(elements=jnp.float32(q.size), **{k: x.astype(jnp.float32) for k, x in sums.items()})
    host = jax.device_get(sums)  # all at once: each alone would wait for the device
    wide = {
        k: x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)[()]
        for k, x in host.items()
    }
    return Figures(elements=q.size, **wide)


@jax.jit
def _sums(base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, q: QTensor) -> dict[str, Array]:
    sharding = sharding_of(q.codes)
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    return run_sharded(sums_of_leaf, everywhere)(base, tuned, q)


def sums_of_leaf(base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, q: QTensor) -> dict[str, Array]:
    """The sums that `Figures` holds, all but `elements`; whole numbers are int32 where they fit."""
    on_grid = _on_grid(base, q)
    change, kept, error = _differences(base, tuned, q)
    size, zero = jnp.abs(change), kept == 0
    counted = size > SMALLEST_CHANGE
    same = counted & (((change > 0) & (kept > 0)) | ((change < 0) & (kept < 0)))
    flags = (counted, same, counted & zero, zero, on_grid, *(size >= edge for edge in BIN_EDGES))
    counted, same, erased, zero, on_grid, *above = _counts(flags)
    above = [jnp.full_like(zero, size.size), *above, jnp.zeros_like(zero)]
    return {
        "counted": counted,
        "same_sign": same,
        "opposite_sign": counted - same - erased,
        "erased": erased,
        "zero": zero,
        **_squares(change, kept, error),
        "counts": jnp.stack([a - b for a, b in itertools.pairwise(above)]),
        "base_on_grid": on_grid,
    }


def _differences(base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, q: QTensor) -> tuple[Array, ...]:
    """`d`, `q` and `q - d` of each element, float32."""
    base, tuned = (jnp.asarray(as_array(x)).astype(jnp.float32) for x in (base, tuned))
    weight = q.view.join(q.values())
    return tuned - base, weight - base, weight - tuned


def _squares(change: Array, kept: Array, error: Array) -> dict[str, Array]:
    return {
        "dd": _total(change * change),
        "qq": _total(kept * kept),
        "dq": _total(change * kept),
        "ee": _total(error * error),
    }


@jax.jit
def _differ(base: ArrayLike | QTensor, tuned: ArrayLike | QTensor) -> Array:
    base, tuned = (jnp.asarray(as_array(x)).astype(jnp.float32) for x in (base, tuned))
    return jnp.any(tuned != base)


@jax.jit
def _squares_in_units(
    base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, q: QTensor
) -> tuple[dict[str, Array], Array]:
    """The sums of squares of all differences times a power of two that brings them near 1, and the power."""

    def run(
        base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, q: QTensor
    ) -> tuple[dict[str, Array], Array]:
        change, kept, error = _differences(base, tuned, q)
        unit = reciprocal_power(jnp.maximum(jnp.max(jnp.abs(change)), jnp.max(jnp.abs(kept))))
        return _squares(change * unit, kept * unit, error * unit), unit

    sharding = sharding_of(q.codes)
    return run_sharded(run, None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec()))(
        base, tuned, q
    )


def _total(x: Array) -> Array:
    return total(x, tuple(range(x.ndim))[::-1]).reshape(())  # along rows first: a third faster on a CPU


def _counts(flags: Sequence[Array]) -> list[Array]:
    """The number of True elements of each of several bool arrays of one shape.

    Four arrays are counted at a time, in the four bytes of a uint32: a run of 128 elements does not overflow
    a byte. This is three times as fast on a CPU, where XLA would otherwise compute all arrays again for each
    sum.
    """
    whole = flags[0].size < 2**31  # beyond that int32 would overflow, and float32 sums hold to 1e-7
    found = []
    for i in range(0, len(flags), 4):
        four = flags[i : i + 4]
        word = functools.reduce(jnp.bitwise_or, (f.astype(jnp.uint32) << 8 * k for k, f in enumerate(four)))
        runs = sum_of_runs(word, word.ndim - 1)
        for k in range(len(four)):
            found.append(_total((runs >> 8 * k & 255).astype(jnp.int32 if whole else jnp.float32)))
    return found


def _on_grid(base: ArrayLike | QTensor, q: QTensor) -> Array:
    """Whether each base element lies on the grid of the base's stored scale, else of its AbsMax scale."""
    owner = base if isinstance(base, QTensor) else q
    view, fmt = owner.view, owner.format
    weight, zero = jnp.asarray(as_array(base)), 0.0
    tiles = view.cut(weight).astype(jnp.float32)
    if isinstance(base, QTensor):
        scale = view.spread(base.scale)
        zero = zero if base.zero is None else view.spread(base.zero)
    else:
        scale = absmax_scale(tiles, view.tile_axes, largest=fmt.largest)
    return view.join(lies_on_grid(tiles, scale, fmt, weight.dtype, zero))
