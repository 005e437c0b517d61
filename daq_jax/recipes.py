"""A recipe: every choice that decides the codes of a weight, as one frozen value.

Equal recipes share one compiled program. Change one thing with `dataclasses.replace(recipe, ...)`.

`default` is what did best in the behaviour study (`benchmarks/results/behaviour/gpu_fp8-block.md`), at every
size of change and on both kinds of base. Its KL from the tuned model was 0.18 to 0.73 of the format's own
noise on an FP8-native base, where AbsMax had 8 to 520 and `paper_cosine` 13 to 255 times that noise, and
0.57 to 0.62 on a bf16 base, where AbsMax is that noise.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

from daq_jax.feedback import UnbiasedFeedback
from daq_jax.formats import Format, fp8_e4m3fn
from daq_jax.metrics import Metric, SignRate, cosine, neg_mse
from daq_jax.roundings import Nearest, Rounding
from daq_jax.scales import AnyScale
from daq_jax.searches import AbsMax, CoarseToFine, OffGrid, Released, Search
from daq_jax.tilings import Block, Tiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a weight is quantized. Hashable; each part may be a value of one's own.

    Attributes:
        format: number format of the codes.
        tiling: which elements share a scale.
        metric: what the search maximizes, `(d, q) -> score per tile`.
        search: which scales are tried.
        rounding: which code stands for an element.
        scales: which scales may be stored.
    """

    format: Format = fp8_e4m3fn
    tiling: Tiling = Block(128, 128)
    metric: Metric = cosine
    search: Search = AbsMax()
    rounding: Rounding = Nearest()
    scales: Callable[[Array], Array] = AnyScale()

    def __post_init__(self) -> None:
        for part, word in (("format", "round"), ("tiling", "tile")):
            value = getattr(self, part)
            if isinstance(value, type) or not hasattr(value, word):
                raise ValueError(f"Recipe: `{part}` has no `{word}` method; got {value!r}.")
        for part in ("metric", "search", "rounding", "scales"):
            value = getattr(self, part)
            if isinstance(value, type) or not callable(value):
                hint = f"; did you mean {value.__name__}()?" if isinstance(value, type) else "."
                raise ValueError(f"Recipe: `{part}` must be a callable value; got {value!r}{hint}")
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(
                f"Recipe: every part must be hashable ({error}); use frozen dataclasses."
            ) from error


_PAPER = CoarseToFine(0.8, 1.5, 5, 10)

absmax = Recipe()
mse = Recipe(metric=neg_mse, search=_PAPER)
paper_sign = Recipe(metric=SignRate(), search=_PAPER)
paper_cosine = Recipe(metric=cosine, search=_PAPER)
released_sign = Recipe(metric=SignRate(), search=Released())
released_cosine = Recipe(metric=cosine, search=Released())
default = Recipe(search=OffGrid(), rounding=UnbiasedFeedback())

RECIPES: dict[str, Recipe] = {
    "default": default,
    "absmax": absmax,
    "mse": mse,
    "paper_sign": paper_sign,
    "paper_cosine": paper_cosine,
    "released_sign": released_sign,
    "released_cosine": released_cosine,
}
