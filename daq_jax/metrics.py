"""How well does a quantized tensor keep the change that tuning made?

A metric takes the true change `d = tuned - base` and the kept change `q = dequantized - base`, cut into `T`
tiles of `K` elements, and returns one score per tile. Higher is better. Both are float32, in weight units.
A tile cut off at an edge is filled up with zeros, where `d = q = 0`.

Any function of that signature is a metric. Ours are made of sums over elements (`Additive`), which lets the
search take the sums wherever the elements lie, without gathering each tile into a row.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from daq_jax.errors import DaqError
from daq_jax.tiles import Tiles

MultiplyAdd = Callable[[Array, Array, Array], Array]
Total = Callable[[Array], Array]  # sums over each tile, in a shape that broadcasts over the tiles


class Metric(abc.ABC):
    """Scores the kept change beside the true one: one number per tile, higher is better.

    A plain function `(d, q) -> scores` serves as well: a `Recipe` turns it into a metric. Subclasses are
    frozen, hashable dataclasses.

    Attributes:
        in_lines: whether it takes all sums over a tile by `total`; see `daq_jax.tilings.TileView.lines`.
    """

    in_lines: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, d: Float[Array, "T K"], q: Float[Array, "T K"]) -> Float[Array, " T"]:
        """One score per tile."""

    def fixed_sums(self, tiles: Tiles, total: Total) -> tuple[Array, ...]:
        """What `score_tiles` needs of the true change alone, computed once for all candidates."""
        return ()

    def score_tiles(self, tiles: Tiles, q: Array, fixed: tuple[Array, ...], total: Total) -> Array:
        """The score of each tile, in a shape that broadcasts over the tiles.

        Args:
            tiles: the pair of weights.
            q: the kept change, in the shape of the tiles.
            fixed: what `fixed_sums` returned.
            total: sums over each tile.

        Raises:
            DaqError: if the metric does not return one score per tile.
        """
        d, q = tiles.flat(tiles.change), tiles.flat(q)
        scores = jnp.asarray(self(d, q))
        if scores.shape != d.shape[:1]:
            raise DaqError(
                f"the metric {self!r} returned an array {scores.shape} for {d.shape[0]} tiles of "
                f"{d.shape[1]} elements; needed one score per tile: reduce over the last axis alone."
            )
        return tiles.per_tile(scores.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class OfFunction(Metric):
    """The metric that a plain function of the signature is."""

    function: Callable[[Array, Array], Array]

    def __call__(self, d: Float[Array, "T K"], q: Float[Array, "T K"]) -> Array:
        return self.function(d, q)


def as_metric(value: Callable[[Array, Array], Array]) -> Metric:
    """A metric, or a plain function as one."""
    return value if isinstance(value, Metric) else OfFunction(value)


class Additive(Metric):
    """A metric that is a function of sums over the elements of a tile."""

    in_lines = True

    @abc.abstractmethod
    def fixed_terms(self, d: Array) -> tuple[Array, ...]:
        """What is summed of `d` alone, element by element: the same for every candidate."""

    @abc.abstractmethod
    def terms(self, d: Array, q: Array) -> tuple[Array, ...]:
        """What is summed of `d` and `q`, element by element."""

    @abc.abstractmethod
    def score(self, *sums: Array) -> Array:
        """The score, given the sums of `fixed_terms` and then of `terms` over a tile."""

    def add_terms(
        self, sums: Sequence[Array], d: Array, q: Array, multiply_add: MultiplyAdd
    ) -> tuple[Array, ...]:
        """`sums` and the terms of more elements, one by one; `multiply_add(a, b, c)` is `a * b + c`."""
        return tuple(sum + term for sum, term in zip(sums, self.terms(d, q), strict=True))

    def fixed_sums(self, tiles: Tiles, total: Total) -> tuple[Array, ...]:
        """See `Metric`."""
        return tuple(map(total, self.fixed_terms(tiles.change)))

    def score_tiles(self, tiles: Tiles, q: Array, fixed: tuple[Array, ...], total: Total) -> Array:
        """See `Metric`."""
        return self.score(*fixed, *map(total, self.terms(tiles.change, q)))

    def __call__(self, d: Float[Array, "T K"], q: Float[Array, "T K"]) -> Float[Array, " T"]:
        """One score per tile."""
        return self.score(*(jnp.sum(x, axis=-1) for x in (*self.fixed_terms(d), *self.terms(d, q))))


class SumOfProducts(Additive):
    """An additive metric whose terms are products, which a machine may multiply and add at once."""

    @abc.abstractmethod
    def factors(self, d: Array, q: Array) -> tuple[tuple[Array, Array], ...]:
        """Two factors for each of the `terms`."""

    def terms(self, d: Array, q: Array) -> tuple[Array, ...]:
        return tuple(a * b for a, b in self.factors(d, q))

    def add_terms(
        self, sums: Sequence[Array], d: Array, q: Array, multiply_add: MultiplyAdd
    ) -> tuple[Array, ...]:
        """See `Additive`."""
        return tuple(multiply_add(a, b, sum) for (a, b), sum in zip(self.factors(d, q), sums, strict=True))


@dataclasses.dataclass(frozen=True)
class Cosine(SumOfProducts):
    """Cosine of the angle between the true and the kept change, `<d, q> / (|d| |q|)`.

    Between -1 and 1. Where nothing changed (`d = 0`) it is 1, where all of a change was lost (`q = 0`) 0.
    It does not see the size of `q`: read it beside the projection. Source: arXiv:2603.22324.
    """

    def fixed_terms(self, d: Array) -> tuple[Array, ...]:
        return (d * d,)

    def factors(self, d: Array, q: Array) -> tuple[tuple[Array, Array], ...]:
        return (d, q), (q, q)

    def score(self, *sums: Array) -> Array:
        dd, dq, qq = sums
        size = jnp.sqrt(dd) * jnp.sqrt(qq)  # the root of the product could underflow
        return jnp.where(dd > 0, dq / jnp.where(size > 0, size, 1), 1)


@dataclasses.dataclass(frozen=True)
class SignRate(Additive):
    """Share of the elements with `|d| > threshold` whose kept change has the sign of the true one.

    Between 0 and 1. A kept change of zero counts as lost. Where no element changes by more than the
    threshold it is 1. Source: arXiv:2603.22324, its threshold from the released program.
    """

    threshold: float = 1e-5  # weight units; smaller changes count as noise

    def __post_init__(self) -> None:
        if not self.threshold >= 0:  # also refuses NaN
            raise DaqError(f"`threshold` must be 0 or more; got {self.threshold}.")

    def fixed_terms(self, d: Array) -> tuple[Array, ...]:
        return ((jnp.abs(d) > self.threshold).astype(jnp.int32),)  # int32: exact in any order of summation

    def terms(self, d: Array, q: Array) -> tuple[Array, ...]:
        kept = (jnp.abs(d) > self.threshold) & (jnp.sign(d) == jnp.sign(q))
        return (kept.astype(jnp.int32),)

    def score(self, *sums: Array) -> Array:
        counted, kept = (x.astype(jnp.float32) for x in sums)
        return jnp.where(counted > 0, kept / jnp.maximum(counted, 1), 1)


@dataclasses.dataclass(frozen=True)
class NegMse(SumOfProducts):
    """Minus the mean squared error of the weights, `-mean((q - d)^2)`; it does not look at the base.

    The control against which metrics of the change are measured; the search by reconstruction error.
    """

    def fixed_terms(self, d: Array) -> tuple[Array, ...]:
        return (jnp.ones_like(d),)

    def factors(self, d: Array, q: Array) -> tuple[tuple[Array, Array], ...]:
        return ((q - d, q - d),)

    def score(self, *sums: Array) -> Array:
        count, squares = sums
        return -squares / count


@dataclasses.dataclass(frozen=True)
class NegError(SumOfProducts):
    """Minus the squared error of the change beside the change, `-|q - d|^2 / |d|^2`."""

    def fixed_terms(self, d: Array) -> tuple[Array, ...]:
        return (d * d,)

    def factors(self, d: Array, q: Array) -> tuple[tuple[Array, Array], ...]:
        return ((q - d, q - d),)

    def score(self, *sums: Array) -> Array:
        dd, ee = sums
        return -jnp.where(dd > 0, ee / jnp.where(dd > 0, dd, 1), 0)


@dataclasses.dataclass(frozen=True)
class NegBias(Additive):
    """Minus how far the projection is from 1, beyond what the noise of rounding explains.

    `max(0, |<d, e>| - 2 sqrt(sum (d e)^2)) / <d, d>` for the error `e = q - d`: two standard deviations of
    `<d, e>`, were the errors independent, are forgiven. 0 where the change is kept at its size.
    """

    def fixed_terms(self, d: Array) -> tuple[Array, ...]:
        return (d * d,)

    def terms(self, d: Array, q: Array) -> tuple[Array, ...]:
        return d * (q - d), (d * (q - d)) ** 2

    def score(self, *sums: Array) -> Array:
        dd, de, noise = sums
        excess = jnp.maximum(0, jnp.abs(de) - 2 * jnp.sqrt(noise))
        return -jnp.where(dd > 0, excess / jnp.where(dd > 0, dd, 1), 0)


cosine = Cosine()
neg_mse = NegMse()
neg_error = NegError()
neg_bias = NegBias()
