"""What error feedback works on: a plan of matrices, made before their first rows are rounded, and a rule.

Rows are rounded in row blocks, from the first to the last. A `Rule` says how rows are rounded once the errors
of the row blocks before them are known. The plain loop of `row_blocks` and the kernel of `feedback_gpu` both
run any rule over any plan.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from daq_jax.formats import Format

STRIP = 128  # columns whose sums are taken together
_LATTICE = np.array([3242174889, 2447445414], np.uint32)  # 2^32 over the plastic number, and over its square


class Plan(NamedTuple):
    """What is known of matrices before their first rows are rounded: `R` rows in `n` row blocks of `b` rows.

    Attributes:
        elements: arrays `[B, R, C]` with one number for each weight; the rule says which.
        tiles: arrays `[B, t, C]` with one number for each of `t` rows of tiles; the rule says which.
        strips: arrays `[B, 1, C]`, sums over strips of 128 outputs; the rule says which.
        responses: `[B, n, b, k]` float32, `K`: how the rows of a block answer the error `s` so far.
        directions: `[B, R, k]` float32, `U`: orthonormal leading left singular directions of the change.
    """

    elements: tuple[Array, ...]
    tiles: tuple[Array, ...]
    strips: tuple[Array, ...]
    responses: Array
    directions: Array


class Rows(NamedTuple):
    """Rows of a plan that are rounded at once, `[b, C]`; in the plain loop with a batch axis in front.

    Attributes:
        elements: those of the plan in these rows, float32.
        tiles: those of the plan; broadcast over the rows.
        thresholds: `[b, C]` float32 in [0, 1), for a dither.
    """

    elements: tuple[Array, ...]
    tiles: tuple[Array, ...]
    thresholds: Array

    @classmethod
    def of(
        cls, plan: Plan, take: Callable[[Any], Array], take_tiles: Callable[[Any], Array], thresholds: Array
    ) -> "Rows":
        """The rows that `take` picks from arrays `[B, R, C]`, and `take_tiles` from arrays `[B, t, C]`."""
        elements = tuple(take(x).astype(jnp.float32) for x in plan.elements)
        return cls(elements, tuple(map(take_tiles, plan.tiles)), thresholds)


class Rule(abc.ABC):
    """How rows are rounded, given the response to the errors of earlier rows: a frozen, hashable value.

    A state travels from rows to rows: any pytree of arrays `[1, C]`, none unless overridden. What a row block
    makes of it before its first row holds for all rows of that block.
    """

    def start(self, strips: tuple[Array, ...]) -> Any:
        """The state before the first row, given the plan's sums over strips."""
        return ()

    def before_block(self, state: Any) -> Any:
        """What holds for all rows of the next row block."""
        return ()

    @abc.abstractmethod
    def round(self, number: Format, rows: Rows, response: Array, block: Any) -> Float[Array, "..."]:
        """Values of the codes of rows.

        Args:
            number: the format of the codes.
            rows: what is known of them.
            response: float32, weight units: what they add up to where nothing is in the way, `K s`, is to be
                subtracted.
            block: what `before_block` returned.
        """

    @abc.abstractmethod
    def error(self, rows: Rows, values: Array) -> Float[Array, "..."]:
        """Dequantized weights of these code values less what the rows should be, weight units."""

    def after(self, state: Any, rows: Rows, error: Array, block: Any, total: Callable[[Array], Array]) -> Any:
        """The state once these rows are done; `total` sums over a strip."""
        return state


def lattice(rows: Array, columns: Array) -> Array:
    """Numbers in [0, 1) for positions in a matrix, uint32 arrays that broadcast: neighbours differ widely."""
    place = rows * _LATTICE[0] + columns * _LATTICE[1]
    return (place >> 8).astype(jnp.float32) * 2.0**-24


def over_strips(x: Float[Array, "B b C"]) -> Float[Array, "B 1 C"]:
    """Sums over all rows and 128 columns at a time, spread over these again."""
    columns = jnp.sum(x, 1, keepdims=True)
    width = STRIP if columns.shape[-1] % STRIP == 0 else columns.shape[-1]
    strips = columns.reshape(*columns.shape[:-1], -1, width)
    return jnp.broadcast_to(jnp.sum(strips, -1, keepdims=True), strips.shape).reshape(columns.shape)
