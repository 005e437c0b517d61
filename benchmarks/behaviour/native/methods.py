"""The columns of the study: every method as a recipe on a grid.

To add one, write a function of the layout and put it into `METHODS`. `OTHERS` are those that the default is
held against.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import daq_jax as daq
from benchmarks.behaviour.native.layouts import INT4_OF_8, FromLargest, HalfStepMore, Layout
from daq_jax.formats import Format, dither, weights_of
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.linalg import leading_directions
from daq_jax.roundings.rounding import Rounding
from daq_jax.scales import usable
from daq_jax.searches.search import Search
from daq_jax.searches.trials import Trials
from daq_jax.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class AtBaseScale(Search):
    """The scale that the base was stored with; a tuned weight beyond the largest code clips."""

    @property
    def is_tile_local(self) -> bool:
        """See `Search`."""
        return True

    @property
    def reads_metric(self) -> bool:
        """See `Search`."""
        return False

    def __call__(self, trials: Trials) -> Array:
        """One scale per tile."""
        return trials.scales(usable(trials.base))


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
        arrays = tiles.base, tiles.tuned, jnp.broadcast_to(scale, tiles.shape)
        base, tuned, scales = map(tiles.as_matrix, arrays)
        change = tuned - base
        rank = min(self.rank, max(1, change.shape[1] // 2))
        directions, _ = leading_directions(change, rank)
        one = jax.vmap(lambda *of: _round(*of, tiles.format, self.damping))
        return tiles.from_matrix(one(tuned, change, scales, directions))


def _round(
    tuned: Float[Array, "R C"], d: Array, scale: Array, u: Float[Array, "R k"], number: Format, damping: float
) -> Array:
    """Code values of one matrix."""
    rows, columns = d.shape
    blocks = math.gcd(64, max(1, rows // 8))
    size, thresholds = rows // blocks, _lattice(rows, columns)
    responses = _responses(d, u, damping, blocks)
    moved = jnp.any(d != 0)

    def step(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        values, error = done

        def take(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, i * size, size)

        aim = take(tuned) - jnp.where(moved, responses[i] @ error, 0)
        value = dither(number, divide(aim, take(scale)), take(thresholds))
        error += take(u).T @ (weights_of(value, take(scale)) - take(tuned))
        return lax.dynamic_update_slice_in_dim(values, value, i * size, 0), error

    start = jnp.zeros_like(d), jnp.zeros((u.shape[1], columns))
    return lax.fori_loop(0, blocks, step, start)[0]


def _responses(d: Array, u: Array, damping: float, blocks: int) -> Float[Array, "n b k"]:
    """How each row block answers the error so far in each direction."""
    (rows, k), seen = u.shape, u.T @ d
    with jax.default_matmul_precision("highest"):
        gram = seen @ seen.T
        captured = jnp.trace(gram)
        unit = jnp.maximum(captured, 1e-37)
        root = jnp.linalg.cholesky(gram / unit + 1e-6 * jnp.eye(k))
        rest = jnp.maximum(jnp.sum(d * d) - captured, 0) / (rows - k) / unit
        mean = jnp.maximum(damping * rest, 1e-5)
        parts = u.reshape(blocks, rows // blocks, k)
        left = jnp.cumsum((parts.mT @ parts)[::-1], 0)[::-1] + 0.03 * jnp.eye(k)

        def one(gram: Array) -> Array:
            return root @ jnp.linalg.solve(mean * jnp.eye(k) + root.T @ gram @ root, root.T)

        return parts @ lax.map(one, left)


def _lattice(rows: int, columns: int) -> Float[Array, "R C"]:
    """Numbers in [0, 1) by place; neighbours differ widely (2^32 over the plastic number)."""
    row, column = (np.arange(n, dtype=np.uint32) for n in (rows, columns))
    place = row[:, None] * np.uint32(3242174889) + column * np.uint32(2447445414)
    return jnp.asarray((place >> 8).astype(np.float32) * np.float32(2.0**-24))


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
    return lambda layout: layout.of(daq.Recipe(search=AtBaseScale(), rounding=rounding))


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
