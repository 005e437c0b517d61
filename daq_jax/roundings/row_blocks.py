"""The row blocks of a matrix, and how they are rounded one after another with error feedback."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.numerics.kernel_choice import kernel_or_plain, may_take_kernels
from daq_jax.numerics.linalg import exact, factor, inverse_factor, rough
from daq_jax.roundings import feedback_gpu
from daq_jax.roundings.feedback_plan import Plan, Rows, Rule, lattice, over_strips
from daq_jax.tiles import Tiles

_MOST_BLOCKS = 64  # each a step of a loop
_SMALLEST_BLOCK = 8  # rows
_LEAST_WEIGHT = 0.03  # of ordinary error beside the error in a direction, however much the direction matters


@dataclasses.dataclass(frozen=True)
class RowBlocks:
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
    def of(cls, tiles: Tiles) -> "RowBlocks":
        """The row blocks of a cut weight."""
        rows = tiles.shape[tiles.grid[0]] * tiles.shape[tiles.axes[0]]
        size = max(_SMALLEST_BLOCK, 1 << max(0, math.ceil(math.log2(rows / _MOST_BLOCKS))))
        return cls(tiles, rows, size)

    @property
    def number(self) -> int:
        """Number of row blocks."""
        return -(-self.rows // self.size)

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.cut.shape[self.cut.axes[0]]

    def rank(self, most: int) -> int:
        """How many directions are worth correcting: `most`, and at most half of the rows."""
        return min(most, max(1, self.rows // 2))

    def whole(self, x: Array) -> Array:
        """An array of the tiles' shape as `[B, R, C]`, the last block filled up with zeros."""
        return self.filled(self.cut.as_matrix(x))

    def filled(self, x: Array) -> Array:
        """`[B, R, C]` with the last block filled up with zeros."""
        missing = self.number * self.size - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing else x

    def tiles(self, x: Array) -> Array:
        """The inverse of `whole`."""
        return self.cut.from_matrix(x[:, : self.rows])

    def by_row_of_tiles(self, x: Array) -> Array:
        """What has the shape of a scale as `[B, R / r, C]`."""
        like = [1 if a == self.cut.axes[0] else n for a, n in enumerate(self.cut.shape)]
        return dataclasses.replace(self.cut, stored_tuned=jnp.zeros(like)).as_matrix(
            jnp.broadcast_to(x, like)
        )

    def responses(
        self, change: Float[Array, "B R C"], directions: Float[Array, "B R k"], damping: Array | float
    ) -> Float[Array, "B n b k"]:
        """The matrix `K` of each row block: how its `b` rows answer the error `s` in each direction so far.

        With `U` the directions, `U_i` the rows of block `i`, `G_i` the sum of `U_j' U_j` over `j >= i`, and
        `m` the damping times the mean of the other eigenvalues of `d d'`, the least loss that the rows left
        can reach for a given `s` gives `K_i = U_i (m (U' d d' U)^-1 + G_i)^-1`.

        Args:
            change: d.
            directions: U.
            damping: for each matrix, `[B]`, or for all.
        """
        seen = rough(directions.mT, change)
        gram, total = exact(seen, seen.mT), jnp.sum(change * change, (1, 2))
        captured = jnp.trace(gram, axis1=1, axis2=2)
        k, unit = gram.shape[-1], jnp.maximum(captured, jnp.finfo(jnp.float32).tiny)
        identity = jnp.eye(k, dtype=jnp.float32)
        root = factor(gram / unit[:, None, None] + 1e-6 * identity[None])[:, None]
        rest = jnp.maximum(total - captured, 0) / (self.rows - k) / unit
        mean = jnp.maximum(damping * rest, 1e-5)[:, None, None, None]  # turns off those without change
        parts = directions.reshape(len(directions), self.number, self.size, k)
        left = jnp.cumsum(exact(parts.mT, parts)[:, ::-1], 1)[:, ::-1] + _LEAST_WEIGHT * identity[None, None]
        inner = mean * identity[None, None] + exact(exact(root.mT, left), root)
        half = exact(inverse_factor(inner), root.mT)
        return exact(parts, exact(half.mT, half))

    def round(self, rule: Rule, plan: Plan) -> Array:
        """Values of the codes, in the shape of the tiles."""
        number = self.cut.format
        if not (
            self.cut.machine.one_device
            and may_take_kernels()
            and feedback_gpu.applies(number, plan, self.height)
        ):
            return self.tiles(self._values(rule, plan))
        arrays, structure = jax.tree.flatten(plan)

        def plain(*plan: Array) -> list[Array]:
            return [number.encode(self._values(rule, jax.tree.unflatten(structure, plan)))]

        def kernel(*plan: Array) -> list[Array]:
            return [feedback_gpu.codes(rule, jax.tree.unflatten(structure, plan), number, self.height)]

        (codes,) = kernel_or_plain(kernel, plain, *arrays)
        return number.decode(self.tiles(codes))

    def _values(self, rule: Rule, plan: Plan) -> Float[Array, "B R C"]:
        """Values of the codes: a loop over the blocks."""

        def step(i: Array | int, done: tuple) -> tuple:
            values, s, state = done
            take, take_tiles = functools.partial(self._take, i=i), functools.partial(self._spread, i=i)
            rows = Rows.of(plan, take, take_tiles, self._thresholds(i))
            block = rule.before_block(state)
            rounded = rule.round(self.cut.format, rows, rough(plan.responses[:, i], s), block)
            error = rule.error(rows, rounded)
            s = s + rough(self._take(plan.directions, i).mT, error)
            return self._put(values, rounded, i), s, rule.after(state, rows, error, block, over_strips)

        like = plan.elements[0].astype(jnp.float32)
        # Zeros of a product, and so inside `shard_map` as device-varying as the loop makes them.
        s = jnp.zeros_like(rough(plan.directions[:, :1].mT, like[:, :1]))
        start = (jnp.zeros_like(like), s, rule.start(plan.strips))
        return lax.fori_loop(0, self.number, step, start)[0]

    def _take(self, x: Array, i: Array | int) -> Array:
        """Block `i` of the rows of `[B, R, n]`."""
        return lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)

    def _put(self, x: Array, block: Array, i: Array | int) -> Array:
        """`[B, R, n]` with another block `i`."""
        return lax.dynamic_update_slice_in_dim(x, block, i * self.size, axis=1)

    def _thresholds(self, i: Array | int) -> Array:
        """`[1, size, C]` in [0, 1) for block `i`: a lattice on which neighbours differ widely."""
        columns = self.cut.shape[self.cut.grid[1]] * self.cut.shape[self.cut.axes[1]]
        row = jnp.uint32(i) * self.size + jnp.arange(self.size, dtype=jnp.uint32)
        return lattice(row[:, None], jnp.arange(columns, dtype=jnp.uint32)[None])[None]

    def _spread(self, x: Array, i: Array | int) -> Array:
        """Block `i` of what is given by row of tiles, `[B, size, C]`."""
        row = (i * self.size + jnp.arange(self.size)) // self.height
        return jnp.take(x, row, axis=1, mode="clip")
