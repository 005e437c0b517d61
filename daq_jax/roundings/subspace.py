"""Unbiased rounding with little error in the directions in which the change acts."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from daq_jax.errors import check_whole_numbers
from daq_jax.numerics.linalg import exact, leading_directions
from daq_jax.roundings.gains import Per, UnbiasedGain, round_towards
from daq_jax.roundings.rounding import Rounding
from daq_jax.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class UnbiasedSubspace(Rounding):
    """`UnbiasedGain`, and then little error in the directions in which the change acts.

    A small error that lines up with the leading singular directions of the change does far more harm than an
    equally large error at random. With `U` and `V` these directions and the gains fixed, each turn rounds
    `base + g d + U C V'`, takes the error `e` against the tuned weights, and subtracts `U' e V` from `C`; the
    projection of the error on the directions shrinks from turn to turn. The directions come from a randomized
    range finder (Halko, Martinsson and Tropp, arXiv:0909.4061), as orthonormal bases; no full SVD is taken.

    Sees the whole matrix: on a sharded weight its products are collectives. A search scores the gain alone.
    Its products are in full float32: with factors in bfloat16, the error in those directions doubles.

    Deterministic.

    Attributes:
        rank: number of directions, at most a quarter of the matrix's shorter side.
        per: the elements that share a gain; see `UnbiasedGain`.
        turns: number of corrections.
    """

    multiplies = True

    rank: int = 128
    per: Per = "column"
    turns: int = 12

    def __post_init__(self) -> None:
        UnbiasedGain(self.per)  # checks `per`
        check_whole_numbers(self, rank=self.rank, turns=self.turns)

    def scored_as(self) -> UnbiasedGain:
        """The rounding that a search scores, tile by tile."""
        return UnbiasedGain(self.per)

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        gain = self.scored_as().gains(tiles, scale)
        change = tiles.as_matrix(tiles.change)
        rank = min(self.rank, max(1, min(change.shape[-2:]) // 4))
        left, right = leading_directions(change, rank, exact)
        moved = jnp.any(tiles.change != 0, tiles.axes, keepdims=True)  # a tile without change is left alone

        def values(core: Array) -> Array:
            correction = tiles.from_matrix(exact(exact(left, core), right.mT))
            return round_towards(tiles, scale, gain, jnp.where(moved, correction, 0.0))

        def turn(_: Array | int, core: Array) -> Array:
            error = tiles.kept(values(core), scale) - tiles.change
            return core - exact(exact(left.mT, tiles.as_matrix(error)), right)

        # Zeros of a product, and so inside `shard_map` as device-varying as the loop makes them.
        core = jnp.zeros_like(exact(left[:, :1].mT, right[:, :1]))
        return values(lax.fori_loop(0, self.turns, turn, core))
