"""Figures of what was kept of a change: sums over elements, and the ratios that follow from them.

`d = tuned - base` is the true change and `q = dequantized - base` the kept one. The sums of several leaves
add up to the sums of all of them together; see `pool`. Sums may be numbers. They may be arrays of one shape
too: the figures are then taken element by element.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from daq_jax.errors import DaqError

ON_GRID = 0.5  # `Figures.on_grid` above which a base counts as lying on the grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
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
        return ratio(self.same_sign, self.counted)

    @property
    def flipped(self) -> Any:
        """Share of the counted elements whose q has the opposite sign."""
        return ratio(self.opposite_sign, self.counted)

    @property
    def lost(self) -> Any:
        """Share of the counted elements with `q = 0`."""
        return ratio(self.erased, self.counted)

    @property
    def unchanged(self) -> Any:
        """Share of all elements with `q = 0`."""
        return ratio(self.zero, self.elements)

    @property
    def cosine(self) -> Any:
        """`<d, q> / (|d| |q|)`; it does not see the size of q. NaN where q = 0, too."""
        return ratio(self.dq, _sqrt(self.dd) * _sqrt(self.qq))

    @property
    def projection(self) -> Any:
        """`<d, q> / <d, d>`: 1 keeps the change at its size, 0 erases it, 4 is a four-fold overshoot."""
        return ratio(self.dq, self.dd)

    @property
    def norm_ratio(self) -> Any:
        """`|q| / |d|`."""
        return ratio(_sqrt(self.qq), _sqrt(self.dd))

    @property
    def mse(self) -> Any:
        """Mean squared error of the weights, in weight units squared."""
        return ratio(self.ee, self.elements)

    @property
    def snr_db(self) -> Any:
        """Change over error, `10 log10(<d, d> / <q - d, q - d>)`, in decibels; infinite without error."""
        xp = _numpy_of(self.dd)
        clean = (self.ee == 0) & (self.dd > 0)
        return xp.where(clean, xp.inf, 10 * _log10(ratio(self.dd, self.ee)))[()]

    @property
    def on_grid(self) -> Any:
        """Share of base elements within half a unit in the last place of a code times the base's scale."""
        return ratio(self.base_on_grid, self.elements)

    @property
    def is_concrete(self) -> bool:
        """Whether each sum is a number: none is traced, abstract, or an array of several leaves' sums."""
        known = (int, float, np.generic, np.ndarray, jax.Array)
        return all(isinstance(x, known) and not isinstance(x, Tracer) for x in jax.tree.leaves(self)) and (
            np.ndim(self.dd) == 0
        )

    def badness(self, figure: str) -> float:
        """How badly one figure speaks of the leaf, to sort by: higher is worse.

        Minus infinity where the figure has no meaning; infinity where it has none because nothing was kept.

        Raises:
            DaqError: if there is no such figure.
        """
        if figure not in FIGURES:
            raise DaqError(f"there is no figure {figure!r}; there are {', '.join(FIGURES)}.")
        value = float(np.asarray(getattr(self, figure)))
        if np.isnan(value):
            return np.inf if figure == "cosine" and self.dd > 0 else -np.inf
        if figure in ("projection", "norm_ratio"):
            return abs(value - 1)
        return value if figure in ("flipped", "lost", "unchanged", "mse", "on_grid") else -value

    def __repr__(self) -> str:
        if not self.is_concrete:
            return "Figures(traced)"
        shown = {name: _plain(getattr(self, name)) for name in FIGURES}
        return f"Figures({', '.join(f'{k}={v:.4g}' for k, v in shown.items() if v is not None)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name, None where a figure is not a finite number: ready for JSON.

        Under a trace, such as inside `jax.jit`, the values are traced arrays, NaN where a figure has no
        meaning.
        """
        figures = {name: _plain(getattr(self, name)) for name in FIGURES}
        traced = isinstance(self.counts, Tracer)
        return figures | {"counts": self.counts if traced else np.asarray(self.counts, int).tolist()}

    def plain_sums(self) -> dict[str, Any]:
        """The sums behind the figures as plain numbers, ready for JSON; `from_sums` is the exact inverse."""
        return {f.name: np.asarray(getattr(self, f.name)).tolist() for f in dataclasses.fields(self)}

    @classmethod
    def from_sums(cls, sums: Mapping[str, Any]) -> "Figures":
        """The figures with these sums, as `plain_sums` gives them."""
        arrays = {name: np.asarray(x) for name, x in sums.items()}
        return cls(**{name: x[()] if x.ndim == 0 else x for name, x in arrays.items()})


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


def pool(figures: Iterable[Figures]) -> Figures:
    """Figures of several leaves together; of no leaf, figures whose sums are all 0."""
    figures = list(figures)
    return jax.tree.map(lambda *x: sum(x), *figures) if figures else _none()


def _none() -> Figures:
    zeros = {field.name: np.float64(0) for field in dataclasses.fields(Figures)}
    return Figures(**zeros | {"elements": 0, "counts": np.zeros(4, np.int64)})


def _numpy_of(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _sqrt(x: Any) -> Any:
    return _numpy_of(x).sqrt(x)


def _log10(x: Any) -> Any:
    xp = _numpy_of(x)
    return xp.log10(xp.where(x > 0, x, xp.nan))


def ratio(a: Any, b: Any) -> Any:
    """`a / b`, NaN where `b` is not above zero."""
    xp = _numpy_of(b)
    return xp.where(b > 0, a / xp.where(b > 0, b, 1), xp.nan)[()]


def _plain(x: Any) -> Any:
    if isinstance(x, Tracer):
        return x
    value = np.asarray(x).item()
    return value if np.isfinite(value) else None


jax.export.register_pytree_node_serialization(
    Figures,
    serialized_name="daq_jax.Figures",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)
