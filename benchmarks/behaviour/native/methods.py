"""The columns of the study: every method as a recipe on a grid.

To add one, write a function of the layout and put it into `METHODS`. `OTHERS` are those that the default is
held against.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float

import daq_jax as daq
from benchmarks.behaviour.native.layouts import INT4_OF_8, FromLargest, HalfStepMore, Layout
from daq_jax.formats import Format, dither, weights_of
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.linalg import leading_directions
from daq_jax.roundings.feedback_plan import Plan, Rows, Rule
from daq_jax.roundings.rounding import Rounding
from daq_jax.roundings.row_blocks import RowBlocks
from daq_jax.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class DitherAndFeedback(Rounding):
    """Evenly spread thresholds between neighbouring codes and no gain; later rows make up for earlier ones.

    The feedback of `UnbiasedFeedback`, weighted by `U' d d' U` and damped by the mean of the other
    eigenvalues of `d d'`, over 64 row blocks.
    """

    multiplies = True

    damping: float = 10.0
    rank: int = 128

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        blocks = RowBlocks.of(tiles)
        tuned, change = blocks.whole(tiles.stored_tuned), blocks.whole(tiles.change)
        directions, _ = leading_directions(change, blocks.rank(self.rank))
        responses = blocks.responses(change, directions, self.damping)
        plan = Plan((tuned,), (blocks.by_row_of_tiles(scale),), (), responses, directions)
        return blocks.round(_Dither(), plan)


@dataclasses.dataclass(frozen=True)
class _Dither(Rule):
    """A dither about the tuned weights less the response. Elements of the plan: those; tiles: the scale."""

    def round(self, number: Format, rows: Rows, response: Array, block: tuple) -> Float[Array, "..."]:
        """See `Rule`."""
        return dither(number, divide(rows.elements[0] - response, rows.tiles[0]), rows.thresholds)

    def error(self, rows: Rows, values: Array) -> Float[Array, "..."]:
        """See `Rule`."""
        return weights_of(values, rows.tiles[0]) - rows.elements[0]


def _llm_compressor(layout: Layout) -> daq.Recipe | None:
    """Round up from a mantissa of 1.75 for powers of two; absmax / 7.5 and codes from -8 for INT4."""
    if layout.format == daq.int4:
        return daq.Recipe(format=INT4_OF_8, tiling=layout.tiling, scales=HalfStepMore())
    if layout.scales != daq.PowerOfTwo():
        return None  # absmax over the largest code, which is a column already
    return layout.of(daq.Recipe()).replace(scales=FromLargest(layout.format.largest, up_from=1.75))


def _floor(layout: Layout) -> daq.Recipe | None:
    """The rule of the OCP specification."""
    if layout.scales != daq.PowerOfTwo():
        return None
    return layout.of(daq.Recipe()).replace(scales=FromLargest(layout.format.largest))


def _at_base(rounding: Rounding) -> Callable[[Layout], daq.Recipe]:
    return lambda layout: layout.of(daq.Recipe(search=daq.BaseScale(), rounding=rounding))


def _fresh(recipe: daq.Recipe) -> Callable[[Layout], daq.Recipe]:
    return lambda layout: layout.of(recipe)


PREVIOUS = daq.Recipe(search=daq.OffGrid(), rounding=daq.UnbiasedFeedback())
METHODS: dict[str, Callable[[Layout], daq.Recipe | None]] = {
    "absmax": _fresh(daq.Recipe()),
    "floor rule": _floor,
    "llm-compressor": _llm_compressor,
    "absmax at base scale": _at_base(daq.Recipe().rounding),
    "stochastic": _at_base(daq.Stochastic(seed=0)),
    "gains": _at_base(daq.UnbiasedGain("row")),
    "dither + feedback": _at_base(DitherAndFeedback()),
    "previous default": _fresh(PREVIOUS),
    "default": _fresh(daq.recipes.default),
}
ALSO_CALLED = {
    "absmax": "AbsMax of the tuned weights; ModelOpt and tinker-cookbook (powers of two: the next above; "
    "INT4: absmax / 7)",
    "floor rule": "powers of two: the next below, as the OCP specification has it",
    "llm-compressor": "powers of two: up from a mantissa of 1.75; INT4: absmax / 7.5 and codes from -8; "
    "elsewhere as absmax",
    "absmax at base scale": "rounded to nearest at the base's scale",
    "stochastic": "stochastic rounding at the base's scale",
    "gains": "`UnbiasedGain` per row at the base's scale",
    "dither + feedback": "at the base's scale, damping 10",
    "previous default": "`OffGrid` and `UnbiasedFeedback`",
    "default": "`daq.recipes.default`",
}
OTHERS = ("absmax at base scale", "stochastic", "gains", "dither + feedback", "previous default")
ON_BF16 = ("absmax", "previous default", "default")  # of a base that has no scale
OF_ZERO = ("absmax", "default")  # where nothing changed


def recipe_of(name: str, layout: Layout) -> daq.Recipe | None:
    """A method on a grid; None where it is no other than a method that is there."""
    return METHODS[name](layout)
