"""The ready recipes, by name.

`default` is what did best in the behaviour study (`benchmarks/results/behaviour/gpu_fp8-block.md`), at every
size of change and on both kinds of base. Its KL from the tuned model was 0.18 to 0.61 of the format's own
noise on an FP8-native base, where AbsMax had 9 to 518 and `paper_cosine` 14 to 258 times that noise, and
0.57 to 0.61 on a bf16 base, where AbsMax is that noise; with both weights stored in bfloat16, 0.30 to 0.61
and 0.57 to 0.71 (`gpu_fp8-block_bf16-stored.md` beside it).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from daq_jax.density.adjustment import LeastSquares, SignSteps
from daq_jax.density.centring import CENTRES, Centre
from daq_jax.density.code_lines import Groups, Line, Loss
from daq_jax.errors import DaqError
from daq_jax.formats import Format, fp4_bnb, nf4
from daq_jax.metrics import Metric, SignRate, cosine, neg_mse
from daq_jax.recipe import Recipe
from daq_jax.roundings.feedback import UnbiasedFeedback
from daq_jax.searches.candidates import CoarseToFine, OffGrid, Released
from daq_jax.tilings import Channel, Group, Tiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityRecipe:
    """How `quantize_density` lays a line of codes over each group of weights. Each stage can be left out.

    Attributes:
        format: number format of the codes.
        group: inputs that share a scale and a zero; None for all inputs of an output.
        centre: stage 1, see `alignment.align`; None leaves it out: the plain AbsMax scale, zero 0.
        coverage: share of the range that stage 1 keeps.
        adjust: stage 2, `LeastSquares` or `SignSteps`; None leaves it out.
        sweeps: of rounding by the output, see `output_rounding`; 0 for the nearest codes.
        loss: of the output, over each "group" by itself, or over the whole "row", where errors of groups may
            make up for one another. "row" needs Gram matrices made with `joint=True` and at least one sweep.
        damping: what is added to the diagonal of a Gram matrix, as a share of its mean: a guard against
            fitting the calibration data.
        metric: a metric of the change, `(d, q) -> score per tile`, in place of the loss of the output; needs
            a base, `SignSteps` and no sweeps.
        shift: whether a group may have a zero; False for symmetric codes, with `centre=None`.
    """

    format: Format = nf4
    group: int | None = 128
    centre: Centre | None = "quantile"
    coverage: float = 1.0
    adjust: Callable[[Groups, Loss, Line], Line] | None = LeastSquares()
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
                self.metric is not None and (self.sweeps or isinstance(self.adjust, LeastSquares)),
                "`metric` needs `sweeps=0` and an `adjust` for any loss, such as SignSteps()",
            ),
        ]
        found = [words for wrong, words in problems if wrong]
        if found:
            raise DaqError(f"DensityRecipe: {'; '.join(found)}.")

    @property
    def tiling(self) -> Tiling:
        """Which elements share a scale."""
        return Channel() if self.group is None else Group(self.group)


_PAPER = CoarseToFine(0.8, 1.5, 5, 10)

absmax = Recipe()
mse = Recipe(metric=neg_mse, search=_PAPER)
paper_sign = Recipe(metric=SignRate(), search=_PAPER)
paper_cosine = Recipe(metric=cosine, search=_PAPER)
released_sign = Recipe(metric=SignRate(), search=Released())
released_cosine = Recipe(metric=cosine, search=Released())
default = Recipe(search=OffGrid(), rounding=UnbiasedFeedback())

density = DensityRecipe()
density_paper = DensityRecipe(adjust=SignSteps(epochs=1), sweeps=0, damping=0.0)
density_released = DensityRecipe(
    format=fp4_bnb, centre="none", coverage=0.9, adjust=SignSteps(), sweeps=0, damping=0.0
)

RECIPES: dict[str, Recipe] = {
    "default": default,
    "absmax": absmax,
    "mse": mse,
    "paper_sign": paper_sign,
    "paper_cosine": paper_cosine,
    "released_sign": released_sign,
    "released_cosine": released_cosine,
}

DENSITY_RECIPES: dict[str, DensityRecipe] = {
    "density": density,
    "density_paper": density_paper,
    "density_released": density_released,
}
