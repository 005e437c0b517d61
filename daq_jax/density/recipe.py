"""A density recipe: every choice of `quantize_density`, as one frozen value, and the ready ones.

Equal recipes share one compiled program. Change one thing with `dataclasses.replace(recipe, ...)`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from daq_jax.density.adjustment import Adjustment, LeastSquares, SignSteps
from daq_jax.density.centring import CENTRES, Centre
from daq_jax.density.groups import AffineMap, Groups, Loss
from daq_jax.errors import refuse
from daq_jax.formats import Format, fp4_bnb, nf4
from daq_jax.metrics import Metric
from daq_jax.tilings import Channel, Group, Tiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityRecipe:
    """How `quantize_density` chooses scales, zeros and codes. Hashable; each stage can be left out.

    Attributes:
        format: number format of the codes.
        group: number of inputs that share a scale and a zero; None for all inputs of an output.
        centre: stage 1: where the weights of a group are taken to be densest; see `centring.align`. None
            leaves stage 1 out and gives the AbsMax scale and a zero of 0.
        coverage: share of a group's range that stage 1 keeps, in (0, 1].
        adjust: stage 2: an `Adjustment`, such as `LeastSquares` or `SignSteps`, or a function of the same
            signature; None leaves stage 2 out.
        sweeps: sweeps of rounding by the output; see `output_rounding`. 0 gives the nearest codes.
        loss: "group" for the loss of each group's part of the output by itself. "row" for the loss of the
            whole output, where errors of several groups may make up for one another; it needs Gram matrices
            made with `joint=True` and at least one sweep.
        damping: what is added to the diagonal of a Gram matrix, as a share of the diagonal's mean. It guards
            against fitting the calibration data too closely.
        metric: a metric of the change, `(d, q) -> score per tile`, to maximize in place of the loss of the
            output. It needs a base, no sweeps, and an adjustment for any loss, such as `SignSteps`.
        shift: whether a group may have a zero other than 0. False for symmetric codes, with `centre=None`.
    """

    format: Format = nf4
    group: int | None = 128
    centre: Centre | None = "quantile"
    coverage: float = 1.0
    adjust: Callable[[Groups, Loss, AffineMap], AffineMap] | None = LeastSquares()
    sweeps: int = 4
    loss: Literal["group", "row"] = "group"
    damping: float = 0.1
    metric: Metric | None = None
    shift: bool = True

    def __post_init__(self) -> None:
        problems = [
            (self.group is not None and not self.group > 0, f"`group` must be above 0; got {self.group}"),
            (self.centre not in (None, *CENTRES), f"`centre` must be one of {CENTRES}; got {self.centre!r}"),
            (not 0 < self.coverage <= 1, f"`coverage` must be in (0, 1]; got {self.coverage}"),
            (self.sweeps < 0, f"`sweeps` must be 0 or more; got {self.sweeps}"),
            (self.loss not in ("group", "row"), f"`loss` must be 'group' or 'row'; got {self.loss!r}"),
            (self.loss == "row" and not self.sweeps, "`loss='row'` needs at least one of `sweeps`"),
            (not self.damping >= 0, f"`damping` must be 0 or more; got {self.damping}"),
            (not self.shift and self.centre is not None, "`shift=False` needs `centre=None`"),
            (
                self.metric is not None and (self.sweeps or not self._serves_any_loss),
                "`metric` needs `sweeps=0` and an `adjust` for any loss, such as SignSteps()",
            ),
        ]
        found = [words for wrong, words in problems if wrong]
        if found:
            refuse("DensityRecipe", found, one_line=True)

    @property
    def _serves_any_loss(self) -> bool:
        # A plain function has nowhere to say, and is taken at its word.
        return not isinstance(self.adjust, Adjustment) or self.adjust.any_loss

    @property
    def tiling(self) -> Tiling:
        """Which elements share a scale."""
        return Channel() if self.group is None else Group(self.group)


density = DensityRecipe()
density_paper = DensityRecipe(adjust=SignSteps(epochs=1), sweeps=0, damping=0.0)
density_released = DensityRecipe(
    format=fp4_bnb, centre="none", coverage=0.9, adjust=SignSteps(), sweeps=0, damping=0.0
)

DENSITY_RECIPES: dict[str, DensityRecipe] = {
    "density": density,
    "density_paper": density_paper,
    "density_released": density_released,
}
