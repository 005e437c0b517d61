"""Gates: least values of figures that a quantized model must reach for a pipeline to go on."""

import math
from collections.abc import Mapping

from daq_jax.analysis.figures import FIGURES, Figures
from daq_jax.errors import DaqError


def floors_of(words: str) -> dict[str, float]:
    """Least values by figure, from text such as `projection=0.95,cosine=0.3`; none from empty text.

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
    """Raises a DaqError that names every figure below its least value. A figure that is NaN is below it."""
    found = {name: float(getattr(total, name)) for name in floors}
    low = [f"{n} is {x:.4g}, needed {floors[n]:g}" for n, x in found.items() if not x >= floors[n]]
    if low:
        raise DaqError(f"the gate is not met: {'; '.join(low)}.")
