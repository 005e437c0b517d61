"""Figures of the whole from sums over a sample of patches, with bounds.

Sums of a leaf's patches stand for the leaf by its share of them. How far a figure may be off comes from how
much it moves as each patch in turn is left out (the delete-one jackknife), which serves ratios of any kind.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from daq_jax.analysis.figures import Figures, ratio

_SURE = 0.99865  # one-sided: three standard errors either way in a large sample

Sums = dict[str, Any]  # arrays, a number for each patch; see `inspection`


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure of the whole, from a sample: `value`, give or take `bound`.

    The bound is three standard errors, wider for few patches as Student's t is; it holds for 99.7 % of
    samples, and for fewer where a few patches of many hold most of a sum. It is 0 where everything was
    looked at, infinite where one patch was, and NaN where a sample says nothing of the error.
    """

    value: float
    bound: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.value - self.bound

    @property
    def high(self) -> float:
        """Upper end."""
        return self.value + self.bound


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in one leaf, or in all of them.

    Attributes:
        elements: number of elements the figures speak of.
        sampled: of them, those that were looked at.
        patches: in how many patches.
        change: `|d| / |base|`, the size of the change.
        unmoved: share of the elements with `d = 0`.
        below_half_step: share of the elements that moved, by less than half a step of the format at the
            tile's AbsMax scale.
        on_grid: share of the base on the grid of its AbsMax scale; see `Figures.on_grid`.
        on_fitted_grid: share of the base on the grid of the scale that fits each tile best.
        on_stored_grid: share of the base on the grid of the scales that it is stored with; NaN if without.
        absmax_projection, absmax_sign_rate, absmax_cosine: what AbsMax would keep; see `Figures`.
        projection, sign_rate, cosine: what the recipe would keep.
    """

    elements: int
    sampled: int
    patches: int
    change: Estimate
    unmoved: Estimate
    below_half_step: Estimate
    on_grid: Estimate
    on_fitted_grid: Estimate
    on_stored_grid: Estimate
    absmax_projection: Estimate
    absmax_sign_rate: Estimate
    absmax_cosine: Estimate
    projection: Estimate
    sign_rate: Estimate
    cosine: Estimate

    @property
    def is_patchwise(self) -> bool:
        """Whether the recipe works on whole matrices, of which patches do not show all."""
        return bool(np.isfinite(self.cosine.value) and np.isnan(self.cosine.bound))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: for each figure its value and its bound, None where it is not a finite number."""
        return jax.tree.map(lambda x: x if np.isfinite(x) else None, dataclasses.asdict(self))


ESTIMATES = tuple(field.name for field in dataclasses.fields(Findings) if field.type is Estimate)


def findings_of(sums: Sequence[Sums], sizes: Sequence[int], of: int, *, patchwise: bool = False) -> Findings:
    """Findings from the sums of the patches of leaves.

    Args:
        sums: of each leaf, arrays `[patches]`.
        sizes: number of elements of each leaf: its patches stand for these.
        of: number of elements the findings speak of, more than the sum of `sizes` if leaves were left out.
        patchwise: whether the recipe works on whole matrices and was tried on patches. Its cosine and sign
            rate there are not those of the matrix. Its projection there goes further from that of its part
            that works tile by tile than in the matrix, so the difference of the two is added to the bound.
    """
    sampled = sum(s["elements"].sum() for s in sums)
    weight = [
        np.full(len(s["elements"]), size / s["elements"].sum()) for s, size in zip(sums, sizes, strict=True)
    ]
    weights = np.concatenate(weight)
    each = jax.tree.map(lambda *x: (weights * np.concatenate(x).T).T, *sums)
    n = len(weights)
    whole = jax.tree.map(lambda x: x.sum(0, keepdims=True), each)
    without_one = jax.tree.map(lambda t, x: t - x, whole, each)
    unseen = max(0.0, 1 - sampled / of)
    values, others = _figures(whole), _figures(without_one)

    def estimate(name: str) -> Estimate:
        value = float(values[name][0])
        if np.isnan(value) or (patchwise and name in ("cosine", "sign_rate")):
            return Estimate(value, np.nan)
        beyond = abs(value - float(values["separable"][0])) if name == "projection" else 0.0
        return Estimate(value, _bound(others[name], unseen) + beyond)

    found = {name: estimate(name) for name in ESTIMATES}
    return Findings(elements=int(of), sampled=int(sampled), patches=n, **found)


def _bound(others: NDArray, unseen: float) -> float:
    """Bound of a figure from its values without one patch each, and the share of the whole not looked at."""
    n = len(others)
    if not unseen:
        return 0.0
    if n == 1 or np.isnan(others).any():  # all of a sum lies in one patch
        return np.inf
    deviation = np.sqrt((n - 1) / n * np.sum(np.square(others - np.mean(others))))
    return float(stdtrit(n - 1, _SURE) * np.sqrt(unseen) * deviation)


def _figures(sums: Sums) -> dict[str, NDArray]:
    """Every estimated figure from sums, element by element."""
    plain, kept, separable = (
        Figures(elements=sums["elements"], **sums[how]) for how in ("absmax", "recipe", "separable")
    )

    def share(part: str, whole: str) -> NDArray:
        return ratio(sums[part], sums[whole])

    return {
        "change": np.sqrt(ratio(plain.dd, sums["bb"])),
        "unmoved": share("unmoved", "elements"),
        "below_half_step": share("short", "moved"),
        "on_grid": plain.on_grid,
        "on_fitted_grid": share("fitted", "elements"),
        "on_stored_grid": share("stored", "with_stored"),
        **{f"absmax_{name}": getattr(plain, name) for name in ("projection", "sign_rate", "cosine")},
        **{name: getattr(kept, name) for name in ("projection", "sign_rate", "cosine")},
        "separable": separable.projection,
    }
