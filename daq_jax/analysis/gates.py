"""Gates: bounds on figures that a quantized model must keep for a pipeline to go on.

Of most figures a bound is the least value; of an error, and of the shares of the change that are lost or
turned around, it is the greatest. A bound on `worst.projection` holds for each leaf, one on `projection` for
all of them together.
"""

import math
from collections.abc import Mapping

from daq_jax.analysis.comparison import Comparison
from daq_jax.analysis.figures import FIGURES
from daq_jax.analysis.verdicts import verdict_of_result
from daq_jax.errors import DaqError

_LESS_IS_BETTER = ("mse", "lost", "flipped")
_WORST = "worst."


def floors_of(words: str) -> dict[str, float]:
    """Bounds by figure, from text such as `projection=0.95,worst.cosine=0.3`; none from empty text.

    Raises:
        DaqError: if a part is not a figure and a number.

    >>> floors_of("projection=0.95,worst.cosine=0.3")
    {'projection': 0.95, 'worst.cosine': 0.3}
    """
    floors = {}
    for part in filter(None, words.split(",")):
        name, _, number = part.partition("=")
        try:
            floors[name] = float(number)
        except ValueError:
            floors[name] = math.nan
        if name.removeprefix(_WORST) not in FIGURES or math.isnan(floors[name]):
            known = ", ".join(FIGURES)
            raise DaqError(
                f"a floor is figure=number, or {_WORST}figure=number for the worst leaf, with a figure out "
                f"of {known}; got {part!r}."
            )
    return floors


def refuse_low(found: Comparison, floors: Mapping[str, float]) -> str:
    """Raises a DaqError that names every figure that misses its bound, as one that is NaN does.

    The error ends with the verdict on the whole, which says what to do. Of figures of which less is better
    the bound is the greatest value. The worst leaf is looked for among those that tuning changed.

    Returns:
        What each figure is and was to be, in words.
    """
    said, missed = [], []
    for name, bound in floors.items():
        figure = name.removeprefix(_WORST)
        less = figure in _LESS_IS_BETTER
        value, where = _worst(found, figure, less) if name != figure else (getattr(found.total, figure), "")
        words = f"{name} is {value:.4g}{where}, needed {'at most' if less else 'at least'} {bound:g}"
        said.append(words)
        if not (value <= bound if less else value >= bound):
            missed.append(words)
    if missed:
        verdict = verdict_of_result(found.total, found.worst(1))
        raise DaqError(f"the gate is not met: {'; '.join(missed)}. {verdict}")
    return f"the gate is met: {'; '.join(said)}."


def _worst(found: Comparison, figure: str, less: bool) -> tuple[float, str]:
    """The worst value of a figure, NaN before all others, and where it is."""
    leaves = {name: float(getattr(x, figure)) for name, x in found.leaves.items() if float(x.dd) > 0}
    if not leaves:
        return math.nan, ""
    name = max(leaves, key=lambda n: (math.isnan(leaves[n]), leaves[n] if less else -leaves[n]))
    return leaves[name], f" in {name!r}"
