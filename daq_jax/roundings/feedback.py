"""Error feedback: later rows of a matrix make up for the rounding errors of earlier rows.

A weight acts as `x W`. Once the error of a row is known, the next rows can be rounded so that the effect of
that error on `x W` cancels, in the directions of `x` that matter most. Adaptive rounding with linear feedback
does this with the second moments of calibration inputs (GPTQ, arXiv:2210.17323; LDLQ, arXiv:2307.13304). Here
there is no data, but there is a fine-tune. A gradient step is a sum of products of inputs and output
gradients, so the left singular directions of the change are directions of the inputs, and `d d'` stands for
the second moments `x' x`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.cpu_parts import in_parts
from daq_jax.errors import DaqError, check_whole_numbers
from daq_jax.formats import weights_of
from daq_jax.numerics.arithmetic import divide, power_below
from daq_jax.numerics.kernel_choice import kernel_or_plain, may_take_kernels
from daq_jax.numerics.linalg import factor, inverse_factor, leading_directions
from daq_jax.roundings import feedback_gpu
from daq_jax.roundings.feedback_rows import Plan, Rows, Size, lattice, over_strips
from daq_jax.roundings.gains import Per, UnbiasedGain, target_of
from daq_jax.roundings.rounding import Rounding
from daq_jax.tiles import Tiles

_MOST_BLOCKS = 64  # of rows, each a step of a loop
_SMALLEST_BLOCK = 8  # rows
_LEAST_WEIGHT = 0.03  # of ordinary error beside the error in a direction, however much the direction matters
_AS_STORED = 1.5  # times the square of a step of bfloat16: what rounding such weights to nearest may cost


@dataclasses.dataclass(frozen=True)
class UnbiasedFeedback(Rounding):
    """`UnbiasedGain`, and then each row block makes up for the errors of the row blocks before it.

    Minimizes `tr(e' H e)` for the error `e` `[R, C]` against the tuned weights, with
    `H = U U' d d' U U' + m I`: `U` are the `rank` leading left singular directions of the change `d`, and `m`
    is `damping` times the mean of the other eigenvalues of `d d'`. There is one pass over the rows, in up to
    64 row blocks. With `s = U' e` of the rows done, the next block aims at `base + g d - K s`, where `K` is
    the best response if the rows left could take any value. A change without leading directions, such as
    random noise, is hardly corrected. Each strip of 128 outputs is held to the size of its change: where the
    change kept so far is clearly too large or too small, the gains of the next block are smaller or larger.

    A gain keeps the largest changes at full size and drops the others. That is wrong where changes are single
    steps of bfloat16, whose sizes only tell how the weights were stored. A tile of bfloat16 numbers that
    nearest rounding moves by less than their steps, as on the grid of its base, is therefore rounded by a
    dither in place of a gain: thresholds between neighbouring codes, spread evenly over the matrix, for the
    weights that changed.

    Sees the whole matrix. On a weight sharded over its outputs, in whole strips, only the search for `U`
    communicates; on a weight sharded over its inputs, every row block does. A search scores the gain alone.
    Products may run in bfloat16 or TF32: errors are taken after rounding, so the error of a correction is
    corrected like any other error.

    Deterministic. Rounds once more than `UnbiasedGain`.

    Attributes:
        rank: number of directions, at most half of the matrix's rows.
        per: the elements that share a gain; see `UnbiasedGain`.
        damping: weight of error in general against error in the leading directions. A smaller value corrects
            more and adds more error elsewhere. 10 is the choice of docs/design/behaviour.md.
    """

    multiplies = True
    bytes_per_element = 38  # 33 by XLA's own account

    rank: int = 128
    per: Per = "row"
    damping: float = 10.0

    def __post_init__(self) -> None:
        UnbiasedGain(self.per)  # checks `per`
        check_whole_numbers(self, rank=self.rank)
        if not (isinstance(self.damping, float | int) and 0 < self.damping < math.inf):
            raise DaqError(f"`damping` must be a number above 0; got {self.damping!r}.")

    def scored_as(self) -> UnbiasedGain:
        """The rounding that a search scores, tile by tile."""
        return UnbiasedGain(self.per)

    def __call__(self, tiles: Tiles, scale: Array) -> Array:
        """The value of each element's code; see `Rounding`."""
        moved = jnp.any(tiles.change != 0, tiles.axes, keepdims=True)  # a tile without change is left alone
        as_stored = _in_parts_on_cpu(_as_stored, tiles, scale, step=1)
        rounding = self.scored_as()
        gain = _in_parts_on_cpu(rounding.gains, tiles, scale, step=rounding.alignment(tiles))
        dithered = moved & as_stored
        gain = jnp.where(dithered, 1, gain)
        tiles, gain = lax.optimization_barrier((tiles, gain))
        blocks = _Blocks.of(tiles)
        target, base, tuned, change = map(
            blocks.whole, (target_of(tiles, gain), tiles.stored_base, tiles.stored_tuned, tiles.change)
        )
        directions, _ = leading_directions(change, min(self.rank, max(1, blocks.rows // 2)))
        responses = _responses(change, directions, blocks, self.damping)
        scales, moves, dithers = map(blocks.by_row_of_tiles, (scale, moved, dithered))
        left = over_strips(change * change)
        plan = Plan(target, base, tuned, scales, moves, dithers, responses, directions, left)
        if not (
            tiles.machine.one_device
            and may_take_kernels()
            and feedback_gpu.applies(tiles.format, plan, blocks.height)
        ):
            return blocks.tiles(_round(plan, blocks))

        def plain(*plan: Array) -> list[Array]:
            return [tiles.format.encode(_round(Plan(*plan), blocks))]

        def kernel(*plan: Array) -> list[Array]:
            return [feedback_gpu.codes(Plan(*plan), tiles.format, blocks.height)]

        (codes,) = kernel_or_plain(kernel, plain, *plan)
        return tiles.format.decode(blocks.tiles(codes))


def _round(plan: Plan, blocks: "_Blocks") -> Float[Array, "B R C"]:
    """Code values: a loop over the blocks."""

    def step(i: Array, done: tuple[Array, Array, Size]) -> tuple[Array, Array, Size]:
        values, s, size = done
        take, take_tiles = functools.partial(blocks.take, i=i), functools.partial(blocks.spread, i=i)
        rows = Rows.of(plan, take, take_tiles, blocks.thresholds(i))
        more = size.correction()
        rounded = rows.rounded(rows.aim(more, plan.responses[:, i] @ s), blocks.cut.format)
        error = rows.error(rounded)
        s = s + blocks.take(plan.directions, i).mT @ error
        return blocks.put(values, rounded, i), s, size.after(rows.change, error, more, over_strips)

    # Zeros of a product, and so inside `shard_map` as device-varying as the loop makes them.
    s = jnp.zeros_like(plan.directions[:, :1].mT @ plan.target[:, :1])
    start = (jnp.zeros_like(plan.target), s, Size.before(plan.left))
    return lax.fori_loop(0, blocks.number, step, start)[0]


def _as_stored(tiles: Tiles, scale: Array) -> Array:
    """Whether a tile holds bfloat16 numbers, in any dtype, that nearest rounding moves by under a step."""
    bits = lax.bitcast_convert_type(tiles.tuned, jnp.int32)  # a cast and back may be optimized away
    step = power_below(tiles.tuned) * 2.0**-7
    error = weights_of(tiles.format.round(divide(tiles.tuned, scale)), scale) - tiles.tuned
    excess = jnp.sum(error * error - _AS_STORED * step * step, tiles.axes, keepdims=True)
    return jnp.all(bits & 0xFFFF == 0, tiles.axes, keepdims=True) & (excess < 0)


def _in_parts_on_cpu(
    function: Callable[[Tiles, Array], Array], tiles: Tiles, scale: Array, *, step: int
) -> Array:
    """`function(tiles, scale)`; on a CPU part by part: at once it takes more float32 copies of the weight."""
    if not tiles.machine.one_device:
        return function(tiles, scale)
    on_cpu = functools.partial(in_parts, function, step=step)
    return lax.platform_dependent(tiles, scale, cpu=on_cpu, default=function)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The rows of a matrix in row blocks, which are rounded one after another.

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

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.cut.shape[self.cut.axes[0]]

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

    def thresholds(self, i: Array) -> Array:
        """`[1, size, C]` in [0, 1) for block `i`: a lattice on which neighbours differ widely."""
        columns = self.cut.shape[self.cut.grid[1]] * self.cut.shape[self.cut.axes[1]]
        row = i.astype(jnp.uint32) * self.size + jnp.arange(self.size, dtype=jnp.uint32)
        return lattice(row[:, None], jnp.arange(columns, dtype=jnp.uint32)[None])[None]

    def by_row_of_tiles(self, x: Array) -> Array:
        """What has the shape of a scale as `[B, R / r, C]`."""
        like = [1 if a == self.cut.axes[0] else n for a, n in enumerate(self.cut.shape)]
        return dataclasses.replace(self.cut, stored_tuned=jnp.zeros(like)).as_matrix(
            jnp.broadcast_to(x, like)
        )

    def spread(self, x: Array, i: Array) -> Array:
        """Block `i` of what is given by row of tiles, `[B, size, C]`."""
        row = (i * self.size + jnp.arange(self.size)) // self.height
        return jnp.take(x, row, axis=1, mode="clip")


def _responses(
    change: Float[Array, "B R C"], directions: Float[Array, "B R k"], blocks: _Blocks, damping: float
) -> Float[Array, "B n b k"]:
    """The matrix `K` of each row block: how its `b` rows answer the error `s` in each direction so far.

    With `U` the directions, `U_i` the rows of block `i` and `G_i` the sum of `U_j' U_j` over `j >= i`, the
    least loss that the rows left can reach for a given `s` gives `K_i = U_i (m (U' d d' U)^-1 + G_i)^-1`.
    """
    seen = directions.mT @ change
    with jax.default_matmul_precision("highest"):  # small matrices, whose inverses are taken
        gram, total = seen @ seen.mT, jnp.sum(change * change, (1, 2))
        captured = jnp.trace(gram, axis1=1, axis2=2)
        k, unit = gram.shape[-1], jnp.maximum(captured, jnp.finfo(jnp.float32).tiny)
        identity = jnp.eye(k, dtype=jnp.float32)
        root = factor(gram / unit[:, None, None] + 1e-6 * identity[None])[:, None]
        rest = jnp.maximum(total - captured, 0) / (blocks.rows - k) / unit
        mean = jnp.maximum(damping * rest, 1e-5)[:, None, None, None]  # turns off directions with no change
        parts = directions.reshape(len(directions), blocks.number, blocks.size, k)
        left = jnp.cumsum((parts.mT @ parts)[:, ::-1], 1)[:, ::-1] + _LEAST_WEIGHT * identity[None, None]
        half = inverse_factor(mean * identity[None, None] + root.mT @ left @ root) @ root.mT
        return parts @ (half.mT @ half)
