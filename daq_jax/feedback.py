"""Error feedback: later rows of a matrix make up for the rounding errors of earlier ones.

A weight acts as `x W`. If the error of a row is known before the next rows are rounded, they can be rounded
so that what `x` sees of it cancels, in the directions of `x` that matter most. Adaptive rounding with linear
feedback does this with the second moments of calibration inputs (GPTQ, arXiv:2210.17323; LDLQ,
arXiv:2307.13304). Here there is no data, but there is a fine-tune: a gradient step is a sum of inputs times
errors, so the left singular directions of the change are those of the inputs, and `d d'` stands for `x' x`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.arithmetic import divide, multiply
from daq_jax.tiles import Tiles
from daq_jax.unbiased import Per, UnbiasedGain, check_whole_number, leading_directions, target_of

_MOST_BLOCKS = 64  # of rows, each a step of a loop
_SMALLEST_BLOCK = 8  # rows
_LEAST_WEIGHT = 0.03  # of ordinary error beside the error in a direction, however much the direction matters


@dataclasses.dataclass(frozen=True)
class UnbiasedFeedback:
    """`UnbiasedGain`, and then each block of rows makes up for the errors of those before it.

    Minimizes `tr(e' H e)` for the error `e` `[R, C]` against the tuned weights, `H = U U' d d' U U' + m I`:
    `U` are the `rank` leading left singular directions of the change `d`, `m` is `damping` times the mean of
    the other eigenvalues of `d d'`. One pass over the rows, in up to 64 blocks: with `s = U' e` of the rows
    done, the next block aims at `base + g d - K s`, where `K` is what is best if the rows left could take any
    value. Where a change has no leading directions, as a random one has not, little is done.

    Works on whole matrices. On a weight sharded over its outputs only the search for `U` communicates; over
    its inputs, every block does. A search scores the gain alone. Products may run in bfloat16 or TF32: errors
    are taken after rounding, so that an inexact correction is made up for like any other error.

    Deterministic. Rounds once more than `UnbiasedGain`.

    Attributes:
        rank: number of directions, at most half of the matrix's rows.
        per: what shares a gain; see `UnbiasedGain`.
        damping: weight of ordinary error beside error in the leading directions; smaller corrects more and
            adds more ordinary error.
    """

    rank: int = 128
    per: Per = "row"
    damping: float = 10.0

    def __post_init__(self) -> None:
        UnbiasedGain(self.per)  # checks `per`
        check_whole_number("rank", self.rank)
        if not (isinstance(self.damping, float | int) and 0 < self.damping < math.inf):
            raise ValueError(f"`damping` must be a number above 0; got {self.damping!r}.")

    @property
    def scored_as(self) -> UnbiasedGain:
        """The rounding that a search scores, tile by tile."""
        return UnbiasedGain(self.per)

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """Code values; see `roundings`."""
        gain = self.scored_as.gains(tiles, scale)
        blocks = _Blocks.of(tiles)
        target, tuned, change = map(blocks.whole, (target_of(tiles, gain), tiles.stored_tuned, tiles.change))
        directions, _ = leading_directions(change, min(self.rank, max(1, blocks.rows // 2)))
        responses = _responses(change, directions, blocks, self.damping)
        moved = jnp.any(tiles.change != 0, tiles.axes, keepdims=True)  # a tile without change is left alone
        scales, moves = blocks.by_row_of_tiles(scale), blocks.by_row_of_tiles(moved)

        def step(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
            values, s = done
            correction = jnp.where(blocks.spread(moves, i), responses[:, i] @ s, 0)
            here = blocks.spread(scales, i)
            rounded = tiles.format.round(divide(blocks.take(target, i) - correction, here))
            error = multiply(rounded, here) - blocks.take(tuned, i).astype(jnp.float32)
            return blocks.put(values, rounded, i), s + blocks.take(directions, i).mT @ error

        # Zeros of a product, and so inside `shard_map` as device-varying as the loop makes them.
        s = jnp.zeros_like(directions[:, :1].mT @ target[:, :1])
        values, _ = lax.fori_loop(0, blocks.number, step, (jnp.zeros_like(target), s))
        return blocks.tiles(values)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The rows of a matrix in blocks that are rounded one after another.

    Attributes:
        cut: the cut weight.
        rows: rows of the matrix, before filling up the last block.
        size: rows of a block.
    """

    cut: Tiles
    rows: int
    size: int

    @classmethod
    def of(cls, tiles: Tiles) -> "_Blocks":
        rows = tiles.shape[tiles.grid[0]] * tiles.shape[tiles.axes[0]]
        size = max(_SMALLEST_BLOCK, 1 << max(0, math.ceil(math.log2(rows / _MOST_BLOCKS))))
        return cls(tiles, rows, size)

    @property
    def number(self) -> int:
        return -(-self.rows // self.size)

    def whole(self, x: Array) -> Array:
        """An array of the tiles' shape as `[B, R, C]`, the last block filled up with zeros."""
        missing = self.number * self.size - self.rows
        x = self.cut.as_matrix(x)
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing else x

    def tiles(self, x: Array) -> Array:
        """The inverse of `whole`."""
        return self.cut.from_matrix(x[:, : self.rows])

    def take(self, x: Array, i: Array) -> Array:
        """Block `i` of the rows of `[B, R, n]`."""
        return lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)

    def put(self, x: Array, block: Array, i: Array) -> Array:
        """`[B, R, n]` with another block `i`."""
        return lax.dynamic_update_slice_in_dim(x, block, i * self.size, axis=1)

    def by_row_of_tiles(self, x: Array) -> Array:
        """What has the shape of a scale as `[B, R / r, C]`."""
        like = [1 if a == self.cut.axes[0] else n for a, n in enumerate(self.cut.shape)]
        return dataclasses.replace(self.cut, stored_tuned=jnp.zeros(like)).as_matrix(
            jnp.broadcast_to(x, like)
        )

    def spread(self, x: Array, i: Array) -> Array:
        """Block `i` of what is given by row of tiles, `[B, size, C]`."""
        height = self.cut.shape[self.cut.axes[0]]
        row = (i * self.size + jnp.arange(self.size)) // height
        return jnp.take(x, row, axis=1, mode="clip")


def _responses(
    change: Float[Array, "B R C"], directions: Float[Array, "B R k"], blocks: _Blocks, damping: float
) -> Float[Array, "B n b k"]:
    """The matrix `K` of each block: what its `b` rows do about the error `s` in each direction so far.

    With `U` the directions, `U_i` the rows of block `i` and `G_i` the sum of `U_j' U_j` over `j >= i`, the
    best that the rows left can do for a given `s` gives `K_i = U_i (m (U' d d' U)^-1 + G_i)^-1`.
    """
    seen = directions.mT @ change
    with jax.default_matmul_precision("highest"):  # small matrices, whose inverses are taken
        gram, total = seen @ seen.mT, jnp.sum(change * change, (1, 2))
        captured = jnp.trace(gram, axis1=1, axis2=2)
        k, unit = gram.shape[-1], jnp.maximum(captured, jnp.finfo(jnp.float32).tiny)
        identity = jnp.eye(k, dtype=jnp.float32)
        root = jnp.linalg.cholesky(gram / unit[:, None, None] + 1e-6 * identity)[:, None]
        rest = jnp.maximum(total - captured, 0) / (blocks.rows - k) / unit
        mean = jnp.maximum(damping * rest, 1e-5)[:, None, None, None]  # turns off directions with no change
        parts = directions.reshape(len(directions), blocks.number, blocks.size, k)
        left = jnp.cumsum((parts.mT @ parts)[:, ::-1], 1)[:, ::-1] + _LEAST_WEIGHT * identity
        factor = jnp.linalg.cholesky(mean * identity + root.mT @ left @ root)
        half = jnp.broadcast_to(root.mT, factor.shape)
        half = lax.linalg.triangular_solve(factor, half, left_side=True, lower=True)
        return parts @ (half.mT @ half)
