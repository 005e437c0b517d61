"""The verdict of an inspection: one or two sentences for someone who has never heard of a projection.

A sentence claims no more than the bounds of its estimate allow. "Erased" is said where the whole interval of
the estimate lies below `KEPT`, and "kept" where all of it lies above.
"""

import math
from collections.abc import Mapping

from daq_jax.analysis.estimates import Estimate, Findings
from daq_jax.analysis.figures import ON_GRID, Figures
from daq_jax.analysis.names import on_one_line

# Two unrelated models differ by sqrt(|base|^2 + |tuned|^2), that is by at least the size of the base; no
# fine-tune comes near.
UNRELATED = 0.9  # |d| / |base|
# A bfloat16 base that was never on a grid has one weight in sixteen on it by chance, so AbsMax keeps 94 % of
# a small change there, and behaviour shows no loss: what the default still gains, a KL of 0.57 to 0.61 times
# that of AbsMax, is the rounding noise of any weights (`benchmarks/results/behaviour/gpu_fp8-block.md`).
KEPT = 0.9  # projection
_WEAK = ": it keeps less of a change that has no leading directions, as random noise has none"


def verdict_of(found: Findings, recipe: str, *, format_name: str = "FP8") -> str:
    """The verdict on all leaves together.

    Args:
        found: their findings.
        recipe: what to call the recipe that was tried.
        format_name: what to call its number format.
    """
    if found.unmoved.value == 1:
        everywhere = found.sampled == found.elements
        where = "" if everywhere else f" in any of the {found.sampled:,} weights that were looked at"
        return f"The two models do not differ{where}: there is no change to keep."
    if found.change.value >= UNRELATED:
        return (
            f"These two models look unrelated: the change is {found.change.value:.0%} of the weights. "
            "Is this the base that the tuned model was made from?"
        )
    grid = _grid(found, format_name)
    plain, kept = found.absmax_projection, found.projection
    if not math.isfinite(plain.bound):
        return f"{grid} The change lies in too few of the weights looked at to say what is kept of it."
    if max(kept.high, kept.value) < min(KEPT, plain.value):
        both = f"AbsMax would keep {_interval(plain)} of this fine-tune, {recipe} {_interval(kept)}"
        return f"{grid} {both}{_WEAK}."
    if plain.high < KEPT:
        lost = f"AbsMax would erase about {1 - plain.value:.0%} of this fine-tune{_span(plain)}"
        return f"{grid} {lost}; {recipe} {_keeps(kept)}."
    if plain.low < KEPT:
        return (
            f"{grid} AbsMax would keep {_interval(plain)} of this fine-tune, {recipe} {_interval(kept)}: "
            "the sample is too small to say more."
        )
    only_noise = found.on_fitted_grid.value <= ON_GRID and plain.high <= 2 - KEPT
    noise = "the default only lowers the ordinary noise of rounding somewhat"
    rest = noise if only_noise else f"{recipe} {_keeps(kept)}"
    return f"{grid} Plain AbsMax keeps the change, {_interval(plain)} of it; {rest}."


def verdict_of_result(total: Figures, worst: Mapping[str, Figures]) -> str:
    """What a quantized model kept of the change, in one or two sentences that end with what to do.

    Args:
        total: figures of all leaves together.
        worst: figures of leaves by path, that of which least is kept first; of none, if none is quantized.
    """
    if not worst:
        return "No weight is quantized: there is nothing to judge."
    kept = float(total.projection)
    if float(total.dd) == 0:
        return "The two models do not differ in these weights: there is no change to keep."
    path, least = next(iter(worst.items()))
    low = f"least in {on_one_line(path)}, {float(least.projection):.0%}"
    if kept < KEPT:
        lost = f"{1 - kept:.0%} of the change is lost ({low})"
        why = "it too loses a change that has no leading directions, as random noise has none"
        return f"{lost}. Quantize with the default recipe ({why}), and compare the predictions."
    if kept > 2 - KEPT:
        return f"The change comes out at {kept:.0%} of its size ({low}). Use a rounding that is unbiased."
    return f"The change is kept, at {kept:.0%} of its size ({low}). Compare the predictions before you ship."


def _grid(found: Findings, name: str) -> str:
    if not math.isnan(found.on_stored_grid.value):
        return f"This base is stored in {name}."
    word = "is" if found.on_fitted_grid.value > ON_GRID else "is not"
    return f"This base {word} on an {name} grid."


def _interval(x: Estimate) -> str:
    if not math.isfinite(x.bound):
        return f"about {x.value:.0%}"
    low, high = f"{max(x.low, 0):.0%}".rstrip("%"), f"{x.high:.0%}"
    return high if f"{low}%" == high else f"{low} to {high}"


def _span(x: Estimate) -> str:
    """The bounds of what is erased, where they are wide enough to be seen."""
    low, high = 1 - x.high, 1 - x.low
    return f" ({low:.0%} to {high:.0%})" if f"{low:.0%}" != f"{high:.0%}" else ""


def _keeps(x: Estimate) -> str:
    if x.low > 2 - KEPT:
        return f"would overshoot to {_interval(x)} of it"
    return f"keeps {_interval(x)} of it"
