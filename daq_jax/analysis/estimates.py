"""Estimates, with bounds, of the figures of whole leaves from sums over a sample of patches.

The sum of a leaf is estimated as the sum over its patches times the leaf's size over the patches' size. The
standard error of a figure is that of the delete-one jackknife: the figure is taken again without each patch
in turn, and the spread of these values gives the error. The jackknife serves ratios of sums of any kind.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from daq_jax.analysis.figures import Figures, ratio

_SURE = 0.99865  # one-sided probability of three standard errors in a large sample

Sums = dict[str, Any]  # arrays, a number for each patch; see `inspection`


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate of a figure from a sample.

    Attributes:
        value: the estimate.
        bound: three standard errors, or the quantile of Student's t of the same probability for few patches.
            `value` is within `bound` of the figure in 99.7 % of samples; in fewer samples where a few patches
            hold most of a sum. It is 0 where every element was looked at, infinite where one patch was, and
            NaN where the sample says nothing of the error.
    """

    value: float
    bound: float

    @property
    def low(self) -> float:
        """Lower end of the interval: `value - bound`."""
        return self.value - self.bound

    @property
    def high(self) -> float:
        """Upper end of the interval: `value + bound`."""
        return self.value + self.bound


@dataclasses.dataclass(frozen=True)
class Findings:
    """What `inspect` found in one leaf, or in all leaves together.

    Attributes:
        elements: number of elements of the leaf, or of all leaves.
        sampled: number of elements that were looked at.
        patches: number of patches that were looked at.
        change: `|d| / |base|`, the size of the change.
        unmoved: share of the elements with `d = 0`.
        below_half_step: of the elements with `d != 0`, the share with |d| below half a step of the format at
            the tile's AbsMax scale.
        on_grid: share of the base on the grid of its AbsMax scale; see `Figures.on_grid`.
        on_fitted_grid: share of the base on the grid of the scale that fits each tile best.
        on_stored_grid: share of the base on the grid of the scales it is stored with; NaN for a base that is
            stored without scales.
        absmax_projection: `Figures.projection` that AbsMax would give.
        absmax_sign_rate: `Figures.sign_rate` that AbsMax would give.
        absmax_cosine: `Figures.cosine` that AbsMax would give.
        projection: `Figures.projection` that the recipe would give.
        sign_rate: `Figures.sign_rate` that the recipe would give.
        cosine: `Figures.cosine` that the recipe would give.
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
        """Whether the recipe works on whole matrices, so that patches do not show all that it does."""
        return bool(np.isfinite(self.cosine.value) and np.isnan(self.cosine.bound))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: for each figure its value and its bound, None where it is not a finite number."""
        return jax.tree.map(lambda x: x if np.isfinite(x) else None, dataclasses.asdict(self))


ESTIMATES = tuple(field.name for field in dataclasses.fields(Findings) if field.type is Estimate)


def findings_of(sums: Sequence[Sums], sizes: Sequence[int], of: int, *, patchwise: bool = False) -> Findings:
    """Findings from the sums over the patches of some leaves.

    Args:
        sums: for each leaf, its sums by name, arrays `[patches]`.
        sizes: number of elements of each leaf, sampled or not.
        of: number of elements that the findings are about: the sum of `sizes`, or more if leaves were left
            out.
        patchwise: whether the recipe works on whole matrices but was tried on patches. Its cosine and sign
            rate on patches are not those of the matrix, and get no bound. Its projection on patches differs
            more from that of its part that works tile by tile than its projection on the matrix does. So the
            difference on patches is added to the bound.
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
    """The bound of a figure.

    Args:
        others: `[patches]`, the figure without each patch in turn.
        unseen: share of the elements that were not looked at.
    """
    n = len(others)
    if not unseen:
        return 0.0
    if n == 1 or np.isnan(others).any():  # all of a sum lies in one patch
        return np.inf
    deviation = np.sqrt((n - 1) / n * np.sum(np.square(others - np.mean(others))))
    return float(stdtrit(n - 1, _SURE) * np.sqrt(unseen) * deviation)


def _figures(sums: Sums) -> dict[str, NDArray]:
    """Every figure to estimate, by name, from arrays of sums; taken element by element."""
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
