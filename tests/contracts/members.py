"""Every strategy of daq_jax by name, as a recipe that is held to the contract; a new one joins by a line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import daq_jax as daq
from daq_jax.formats import int4_full, int8_full
from daq_jax.scales import InDtype, TwoLevel
from tests.cases import native, rng_for

SHAPE, TILE = (96, 80), (32, 40)
BLOCK = daq.Block(*TILE)
SEARCH = daq.CoarseToFine(0.8, 1.5, 3, 4)
FP6 = daq.SmallFloat("fp6_e3m2", "float6_e3m2fn", 28.0, mantissa_bits=2, min_exponent=-2)


def total_size(d: jax.Array, q: jax.Array) -> jax.Array:
    """A metric that is a plain function."""
    return -jnp.abs(jnp.sum(d * d, -1) - jnp.sum(d * q, -1))


FORMATS = {
    number.name: daq.Recipe(format=number, tiling=BLOCK)
    for number in (
        daq.fp8_e4m3fn,
        daq.fp8_e5m2,
        daq.int8,
        daq.int4,
        int8_full,
        int4_full,
        daq.fp4_e2m1,
        daq.nf4,
        daq.fp4_bnb,
        FP6,
    )
}
TILINGS = {
    type(tiling).__name__: daq.Recipe(tiling=tiling)
    for tiling in (BLOCK, daq.Channel(), daq.PerTensor(), daq.Group(32))
}
METRICS = {
    "cosine": daq.Recipe(tiling=BLOCK, metric=daq.cosine, search=SEARCH),
    "SignRate": daq.Recipe(tiling=BLOCK, metric=daq.SignRate(), search=SEARCH),
    "neg_mse": daq.Recipe(tiling=BLOCK, metric=daq.neg_mse, search=SEARCH),
    "a function": daq.Recipe(tiling=BLOCK, metric=total_size, search=SEARCH),
}
SEARCHES = {
    "Grid": daq.Recipe(tiling=BLOCK, search=daq.Grid(0.8, 1.3, 4)),
    "CoarseToFine": daq.Recipe(tiling=BLOCK, search=SEARCH),
    "WithBaseScale": daq.Recipe(tiling=BLOCK, search=daq.WithBaseScale(daq.Grid(0.9, 1.2, 3))),
    "BaseScale": daq.Recipe(tiling=BLOCK, search=daq.BaseScale()),
    "BaseScale off_grid": daq.Recipe(tiling=BLOCK, search=daq.BaseScale(off_grid=1.19)),
    "BaseScale off_grid by format": daq.Recipe(tiling=BLOCK, search=daq.BaseScale(off_grid="by format")),
    "OffGrid": daq.Recipe(tiling=BLOCK, search=daq.OffGrid()),
}
ROUNDINGS = {
    "Stochastic": daq.Recipe(tiling=BLOCK, rounding=daq.Stochastic(seed=1)),
    "UnbiasedGain row": daq.Recipe(tiling=BLOCK, rounding=daq.UnbiasedGain("row")),
    "UnbiasedGain column": daq.Recipe(tiling=BLOCK, rounding=daq.UnbiasedGain("column")),
    "UnbiasedGain tile": daq.Recipe(tiling=BLOCK, rounding=daq.UnbiasedGain("tile")),
    "UnbiasedSubspace": daq.Recipe(tiling=BLOCK, rounding=daq.UnbiasedSubspace(rank=8, turns=2)),
    "UnbiasedFeedback": daq.Recipe(tiling=BLOCK, rounding=daq.UnbiasedFeedback(rank=8)),
    "DitheredFeedback": daq.Recipe(tiling=BLOCK, rounding=daq.DitheredFeedback(rank=8)),
}
SCALES = {
    "PowerOfTwo": daq.Recipe(tiling=BLOCK, scales=daq.PowerOfTwo()),
    "PowerOfTwo floor": daq.Recipe(tiling=BLOCK, scales=daq.PowerOfTwo("floor", daq.fp8_e4m3fn)),
    "TwoLevel": daq.Recipe(tiling=BLOCK, scales=TwoLevel(2.0**-12)),
    "InDtype": daq.Recipe(tiling=BLOCK, scales=InDtype("bfloat16")),
}
RECIPES = {
    f"recipes.{name}": daq.recipes.RECIPES[name].replace(tiling=BLOCK)
    for name in ("default", "released_cosine")
}
MEMBERS: dict[str, daq.Recipe] = {
    **FORMATS,
    **TILINGS,
    **METRICS,
    **SEARCHES,
    **ROUNDINGS,
    **SCALES,
    **RECIPES,
}
# Products of whole matrices may differ in their last bit from one program to another.
BY_PRODUCTS = ("UnbiasedSubspace", "UnbiasedFeedback", "DitheredFeedback", "recipes.default")


def a_pair() -> tuple[np.ndarray, np.ndarray]:
    """Float32 pair, the base on a grid of e4m3; the first tile is zero, the second did not change."""
    base, tuned = native("contract", SHAPE, change=0.02)
    r, c = TILE
    base[:r, :c] = tuned[:r, :c] = 0
    tuned[:r, c : 2 * c] = base[:r, c : 2 * c]
    far = rng_for("contract, outlier").integers(r, SHAPE[0], 3)
    tuned[far, -1] = base[far, -1] * 1.5
    return base, tuned


@dataclasses.dataclass(frozen=True)
class TwinFormat:
    """A caller's own format: a stranger to our classes that does what one of ours does."""

    ours: daq.Format

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.ours, name)


@dataclasses.dataclass(frozen=True)
class TwinTiling:
    """A caller's own tiling."""

    ours: daq.Tiling

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        return self.ours.tile(rows, columns)


@dataclasses.dataclass(frozen=True)
class TwinCall:
    """A caller's own metric, search, rounding or scales: a callable value of the signature and no more."""

    ours: object

    def __call__(self, *args: object) -> object:
        return self.ours(*args)


@dataclasses.dataclass(frozen=True)
class TwinDraw(daq.Rounding):
    """A caller's own rounding that draws."""

    ours: daq.Rounding

    draws = True

    def draw(self, shape: tuple[int, ...], stream: jax.Array) -> jax.Array:
        return self.ours.draw(shape, stream)

    def __call__(self, tiles: daq.Tiles, scale: jax.Array) -> jax.Array:
        return self.ours(tiles, scale)


def twin(recipe: daq.Recipe) -> daq.Recipe:
    """The recipe with every part made by a caller."""
    rounding = recipe.rounding
    return daq.Recipe(
        format=TwinFormat(recipe.format),
        tiling=TwinTiling(recipe.tiling),
        metric=TwinCall(recipe.metric),
        search=TwinCall(recipe.search),
        rounding=TwinDraw(rounding) if rounding.draws else TwinCall(rounding),
        scales=TwinCall(recipe.scales),
    )
