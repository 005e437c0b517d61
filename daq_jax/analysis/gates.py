"""Gates: bounds on figures that a quantized model must keep for a pipeline to go on.

Of most figures a bound is the least value; of an error, and of the shares of the change that are lost or
turned around, it is the greatest.
"""

import math
from collections.abc import Mapping

from daq_jax.analysis.figures import FIGURES, Figures
from daq_jax.errors import DaqError

_LESS_IS_BETTER = ("mse", "lost", "flipped")


def floors_of(words: str) -> dict[str, float]:
    """Bounds by figure, from text such as `projection=0.95,cosine=0.3`; none from empty text.

    Raises:
        DaqError: if a part is not a figure and a number.

    >>> floors_of("projection=0.95,cosine=0.3")
    {'projection': 0.95, 'cosine': 0.3}
    """
    floors = {}
    for part in filter(None, words.split(",")):
        name, _, number = part.partition("=")
        try:
            floors[name] = float(number)
        except ValueError:
            floors[name] = math.nan
        if name not in FIGURES or math.isnan(floors[name]):
            known = ", ".join(FIGURES)
            raise DaqError(f"a floor is figure=number, with a figure out of {known}; got {part!r}.")
    return floors


def refuse_low(total: Figures, floors: Mapping[str, float]) -> None:
    """Raises a DaqError that names every figure that misses its bound, as one that is NaN does.

    Of figures of which less is better the bound is the greatest value.
    """
    found = {name: float(getattr(total, name)) for name in floors}
    missed = [
        f"{name} is {x:.4g}, needed {'at most ' if name in _LESS_IS_BETTER else ''}{floors[name]:g}"
        for name, x in found.items()
        if not (x <= floors[name] if name in _LESS_IS_BETTER else x >= floors[name])
    ]
    if missed:
        raise DaqError(f"the gate is not met: {'; '.join(missed)}.")
