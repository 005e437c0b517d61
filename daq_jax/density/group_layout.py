"""A weight of any shape as groups, `[B, N, n, C]`: `B` matrices of `N` groups of `n` inputs, and `C` outputs.

Rows of zeros are added where the inputs do not fill the last group. They are also added to groups longer than
a row block of `output_rounding`, which become whole row blocks.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from daq_jax.density.output_rounding import ROW_BLOCK
from daq_jax.tilings import TileView


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """How a weight is cut into groups and joined again. `view` cuts it into tiles one output wide."""

    view: TileView

    @property
    def count(self) -> int:
        """N, the number of groups of an output."""
        return self.view.grid[-2]

    @property
    def inputs(self) -> int:
        """Inputs of a whole group, without the padding of long groups."""
        return self.view.tile[0]

    @property
    def size(self) -> int:
        """n, the number of rows of a group."""
        return self.inputs if self.inputs <= ROW_BLOCK else -(-self.inputs // ROW_BLOCK) * ROW_BLOCK

    @property
    def real(self) -> np.ndarray:
        """`[N, n, 1]`, False where a row is padding."""
        rows = np.arange(self.count * self.inputs).reshape(self.count, self.inputs) < self.view.rows
        return np.pad(rows, [(0, 0), (0, self.size - self.inputs)])[..., None]

    @property
    def _order(self) -> tuple[int, ...]:
        batch, rows, columns = self.view.axes
        return batch + rows + columns

    def cut(self, weight: Array) -> Float[Array, "B N n C"]:
        """The weight in groups, float32, with zeros in rows of padding."""
        batch = math.prod(self.view.batch)
        matrices = weight.transpose(self._order).reshape(batch, self.view.rows, self.view.columns)
        return self._pad(matrices.astype(jnp.float32), axis=1)

    def join(self, groups: Array) -> Array:
        """The inverse of `cut`, for arrays of any dtype."""
        batch, _, _, columns = groups.shape
        rows = groups[:, :, : self.inputs].reshape(batch, -1, columns)[:, : self.view.rows]
        order = self._order
        return rows.reshape([self.view.shape[a] for a in order]).transpose(np.argsort(order))

    def group_grams(self, gram: Array | None) -> Float[Array, "N n n"]:
        """The Gram matrix of each group, with zeros in rows and columns of padding.

        Args:
            gram: `[N, n, n]`, of each group without padding, `[R, R]`, of all inputs, or None for identities.
        """
        if gram is None:
            return jnp.asarray(self.real * np.eye(self.size, dtype=np.float32))
        if gram.ndim == 2:
            rows = self.row_gram(gram).reshape(self.count, self.size, self.count, self.size)
            return jnp.moveaxis(jnp.diagonal(rows, axis1=0, axis2=2), -1, 0)
        missing = self.size - self.inputs
        return jnp.pad(gram, [(0, 0), (0, missing), (0, missing)])

    def row_gram(self, gram: Float[Array, "R R"]) -> Float[Array, "Nn Nn"]:
        """The Gram matrix of all inputs, with zeros in rows and columns of padding."""
        size = self.count * self.size
        rows = self._pad(gram, axis=0).reshape(size, -1)
        return self._pad(rows, axis=1).reshape(size, size)

    def _pad(self, x: Array, axis: int) -> Array:
        """Splits an axis over the inputs into groups, filled up with zeros: two axes in place of one."""

        def filled(x: Array, axis: int, length: int) -> Array:
            return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])

        x = filled(x, axis, self.count * self.inputs)
        x = x.reshape(*x.shape[:axis], self.count, self.inputs, *x.shape[axis + 1 :])
        return filled(x, axis + 1, self.size)
