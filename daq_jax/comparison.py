"""What was kept: a quantized tree beside the change that tuning made.

Everything is counted from the stored codes. `d = tuned - base` is the true change and
`q = code * scale - base` the kept one, both float32. Figures are ratios of sums over elements, so pooling the
sums of several leaves gives the figures of all of them together.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from daq_jax.arithmetic import divide, multiply, total
from daq_jax.qtensor import QTensor
from daq_jax.scales import absmax_scale
from daq_jax.sharding import run_sharded, sharding_of
from daq_jax.trees import is_qtensor, named_leaves

SMALLEST_CHANGE = 1e-5  # weight units; smaller changes are left out of the sign figures
BIN_EDGES = (1e-5, 1e-4, 1e-3)  # of |d|, weight units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of one leaf or of many: sums over elements, and the ratios that follow from them.

    Ratios are NaN where their denominator is zero: all those of `d` where nothing changed.

    Attributes:
        elements: number of elements.
        counted: of them, those with `|d| > 1e-5`.
        same_sign: of the counted, those whose q has the sign of d.
        opposite_sign: of the counted, those whose q has the other sign.
        erased: of the counted, those with `q = 0`.
        zero: elements with `q = 0`.
        dd, qq, dq, ee: sums of `d^2`, `q^2`, `d q` and `(q - d)^2`.
        counts: `[4]` elements with |d| below 1e-5, 1e-4, 1e-3, and above.
        base_on_grid: base elements that lie on the grid of the base's scale.
    """

    elements: Any
    counted: Any
    same_sign: Any
    opposite_sign: Any
    erased: Any
    zero: Any
    dd: Any
    qq: Any
    dq: Any
    ee: Any
    counts: Any
    base_on_grid: Any

    @property
    def sign_rate(self) -> Any:
        """Share of the counted elements whose q has the sign of d. With `flipped` and `lost` it makes 1."""
        return _ratio(self.same_sign, self.counted)

    @property
    def flipped(self) -> Any:
        """Share of the counted elements whose q has the opposite sign."""
        return _ratio(self.opposite_sign, self.counted)

    @property
    def lost(self) -> Any:
        """Share of the counted elements with `q = 0`."""
        return _ratio(self.erased, self.counted)

    @property
    def unchanged(self) -> Any:
        """Share of all elements with `q = 0`."""
        return _ratio(self.zero, self.elements)

    @property
    def cosine(self) -> Any:
        """`<d, q> / (|d| |q|)`; it does not see the size of q. NaN where q = 0, too."""
        return _ratio(self.dq, _sqrt(self.dd) * _sqrt(self.qq))

    @property
    def projection(self) -> Any:
        """`<d, q> / <d, d>`: 1 keeps the change at its size, 0 erases it, 4 is a four-fold overshoot."""
        return _ratio(self.dq, self.dd)

    @property
    def norm_ratio(self) -> Any:
        """`|q| / |d|`."""
        return _ratio(_sqrt(self.qq), _sqrt(self.dd))

    @property
    def mse(self) -> Any:
        """Mean squared error of the weights, in weight units squared."""
        return _ratio(self.ee, self.elements)

    @property
    def snr_db(self) -> Any:
        """Change over error, `10 log10(<d, d> / <q - d, q - d>)`, in decibels; infinite without error."""
        xp = _numpy_of(self.dd)
        clean = (self.ee == 0) & (self.dd > 0)
        return xp.where(clean, xp.inf, 10 * _log10(_ratio(self.dd, self.ee)))[()]

    @property
    def on_grid(self) -> Any:
        """Share of base elements within half a unit in the last place of a code times the base's scale."""
        return _ratio(self.base_on_grid, self.elements)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name, None where a figure is not a finite number: ready for JSON."""
        figures = {name: _plain(getattr(self, name)) for name in FIGURES}
        return figures | {"counts": [int(n) for n in np.asarray(self.counts)]}


FIGURES = (
    "elements",
    "sign_rate",
    "flipped",
    "lost",
    "unchanged",
    "cosine",
    "projection",
    "norm_ratio",
    "mse",
    "snr_db",
    "on_grid",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        leaves: figures of each quantized leaf, by path.
        total: figures of all of them together, from pooled sums.
    """

    leaves: dict[str, Figures]
    total: Figures

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {"total": self.total.to_dict(), "leaves": {p: f.to_dict() for p, f in self.leaves.items()}}


def _numpy_of(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _sqrt(x: Any) -> Any:
    return _numpy_of(x).sqrt(x)


def _log10(x: Any) -> Any:
    xp = _numpy_of(x)
    return xp.log10(xp.where(x > 0, x, xp.nan))


def _ratio(a: Any, b: Any) -> Any:
    xp = _numpy_of(b)
    return xp.where(b > 0, a / xp.where(b > 0, b, 1), xp.nan)[()]


def _plain(x: Any) -> int | float | None:
    value = np.asarray(x).item()
    return value if np.isfinite(value) else None


def compare(base: Any, tuned: Any, quantized: Any) -> Comparison:
    """Compares a quantized tree with the change that tuning made.

    Sums are taken in short runs and hold to 1e-5 relative on leaves of 64M elements and more. Eagerly the
    figures are float64 and exact counts; under `jax.jit` they are float32 arrays.

    Args:
        base: tree of weights before tuning.
        tuned: tree of weights after tuning.
        quantized: what `quantize` returned; other leaves than QTensors are passed over.

    Raises:
        ValueError: naming every quantized leaf that has no partner of its shape in `base` or `tuned`.

    >>> base = {"kernel": jnp.zeros((2, 2))}
    >>> tuned = {"kernel": jnp.ones((2, 2))}
    >>> from daq_jax.trees import quantize
    >>> float(compare(base, tuned, quantize(base, tuned)).total.projection)
    1.0
    """
    before, after = named_leaves(base), named_leaves(tuned)
    found = {path: q for path, q in named_leaves(quantized).items() if is_qtensor(q)}
    _refuse_strangers(before, after, found)
    leaves = {path: _figures(_sums(before[path], after[path], q), q) for path, q in found.items()}
    pooled = jax.tree.map(lambda *x: sum(x), *leaves.values()) if leaves else _none()
    return Comparison(leaves, pooled)


def _refuse_strangers(before: dict[str, Any], after: dict[str, Any], found: dict[str, QTensor]) -> None:
    problems = []
    for path, q in found.items():
        for word, leaves in (("base", before), ("tuned", after)):
            if path not in leaves:
                problems.append(f"{path!r} is quantized but not in {word}")
            elif tuple(np.shape(leaves[path])) != q.shape:
                problems.append(f"{path!r} is {q.shape} but in {word} it is {tuple(np.shape(leaves[path]))}")
    if problems:
        raise ValueError(
            "the three trees do not belong together:"
            + "".join(f"\n  {p}" for p in problems)
            + "\nPass the trees that were given to `quantize`, and its result."
        )


def _none() -> Figures:
    zeros = {field.name: np.float64(0) for field in dataclasses.fields(Figures)}
    return Figures(**zeros | {"elements": 0, "counts": np.zeros(4, np.int64)})


def _figures(sums: dict[str, Array], q: QTensor) -> Figures:
    """On the host in float64 and whole numbers; under a trace in float32, which pools without overflow."""
    if any(isinstance(x, Tracer) for x in sums.values()):
        return Figures(elements=jnp.float32(q.size), **{k: x.astype(jnp.float32) for k, x in sums.items()})
    host = {k: np.asarray(x) for k, x in sums.items()}
    wide = {
        k: x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)[()]
        for k, x in host.items()
    }
    return Figures(elements=q.size, **wide)


@jax.jit
def _sums(base: Any, tuned: Any, q: QTensor) -> dict[str, Array]:
    sharding = sharding_of(q.codes)
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    return run_sharded(_sums_of_leaf, everywhere)(base, tuned, q)


def _sums_of_leaf(base: Any, tuned: Any, q: QTensor) -> dict[str, Array]:
    on_grid = _on_grid(base, q)
    base, tuned = (
        jnp.asarray(x.dequantize() if is_qtensor(x) else x).astype(jnp.float32) for x in (base, tuned)
    )
    weight = q.view.join(q.values())
    change, kept, error = tuned - base, weight - base, weight - tuned
    counted = jnp.abs(change) > SMALLEST_CHANGE
    same = jnp.sign(change) == jnp.sign(kept)
    edges = (0.0, *BIN_EDGES, float("inf"))
    size = jnp.abs(change)
    bins = [(size >= low) & (size < high) for low, high in itertools.pairwise(edges)]
    return {
        "counted": _count(counted),
        "same_sign": _count(counted & same),
        "opposite_sign": _count(counted & ~same & (kept != 0)),
        "erased": _count(counted & (kept == 0)),
        "zero": _count(kept == 0),
        "dd": _total(change * change),
        "qq": _total(kept * kept),
        "dq": _total(change * kept),
        "ee": _total(error * error),
        "counts": jnp.stack([_count(b) for b in bins]),
        "base_on_grid": _count(on_grid),
    }


def _total(x: Array) -> Array:
    return total(x, tuple(range(x.ndim))).reshape(())


def _count(x: Array) -> Array:
    whole = x.size < 2**31  # beyond that int32 would overflow, and float32 sums hold to 1e-7
    return _total(x.astype(jnp.int32 if whole else jnp.float32))


def _on_grid(base: Any, q: QTensor) -> Array:
    """Whether each base element lies on the grid of the base's stored scale, else of its AbsMax scale."""
    owner = base if is_qtensor(base) else q
    view, fmt = owner.view, owner.format
    weight = jnp.asarray(base.dequantize() if is_qtensor(base) else base)
    tiles = view.cut(weight).astype(jnp.float32)
    if is_qtensor(base):
        scale = view.spread(base.scale)
    else:
        scale = absmax_scale(tiles, view.tile_axes, largest=fmt.largest)
    zero = view.spread(base.zero) if is_qtensor(base) and base.zero is not None else 0.0
    nearest = multiply(fmt.round(divide(tiles, scale) + zero) - zero, scale)
    _, exponent = jnp.frexp(tiles)  # |tiles| in [2^(exponent - 1), 2^exponent)
    half_unit = jnp.ldexp(jnp.float32(1), exponent - 2 - jnp.finfo(weight.dtype).nmant)
    return view.join(jnp.abs(tiles - nearest) <= half_unit)
