"""Error feedback as one kernel for NVIDIA GPUs: a strip of a matrix is walked from the first row to the last.

`feedback_plan` says what is computed. Outputs have nothing to do with one another but for the sums over their
strip of 128. So one program takes a strip, keeps `s = U' e` on the chip, and reads every weight once. XLA
starts some fifteen kernels for each of the blocks that wait for one another.

Written in Pallas for Triton, whose products of float32 run in TF32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from daq_jax.formats import Format
from daq_jax.gpu_codes import INSTRUCTION
from daq_jax.numerics.kernel_choice import pallas_call
from daq_jax.numerics.linalg import rough
from daq_jax.roundings.feedback_plan import STRIP, Plan, Rows, Rule, lattice

_MOST_ROWS = 32  # of a block that are in registers at a time
_LEAST_ROWS = 16  # a product in Triton takes no fewer
_WARPS = 8
_STAGES = 1  # of a pipeline for the loads of a product
_RANKS = (16, 32, 64, 128)  # numbers of directions: a product in Triton needs powers of two from 16


def applies(number: Format, plan: Plan, height: int) -> bool:
    """Whether `codes` is for this format and plan, with tiles of `height` rows."""
    *_, size, rank = plan.responses.shape
    return (
        number in INSTRUCTION
        and plan.elements[0].shape[-1] % STRIP == 0
        and rank in _RANKS
        and _rows_at_once(size, plan.tiles[0].shape[1], height) >= _LEAST_ROWS
    )


def _rows_at_once(size: int, rows_of_tiles: int, height: int) -> int:
    """How many rows of a block are in registers at a time: a power of two, all in one row of tiles."""
    size = min(size, _MOST_ROWS)
    return size if rows_of_tiles == 1 else min(size, height & -height)


def codes(rule: Rule, plan: Plan, number: Format, height: int) -> Float[Array, "B R C"]:
    """Codes, in the dtype of the format.

    Args:
        rule: how rows are rounded.
        plan: one that this `applies` to.
        number: the format of the codes.
        height: rows of a tile.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, rows, columns = plan.elements[0].shape
    strips = columns // STRIP

    def strip(x: Array) -> Any:
        return pl.BlockSpec((None, x.shape[1], STRIP), lambda i: (i // strips, 0, i % strips))

    def matrix(x: Array) -> Any:
        return pl.BlockSpec((None, *x.shape[1:]), lambda i: (i // strips, *(0 for _ in x.shape[1:])))

    by_strip = jax.tree.map(strip, plan)
    specs = by_strip._replace(responses=matrix(plan.responses), directions=matrix(plan.directions))
    arrays, structure = jax.tree.flatten(plan)
    kernel = functools.partial(
        _round_strip, rule=rule, structure=structure, number=number, height=height, strips=strips
    )
    return pallas_call(
        kernel,
        grid=(batch * strips,),  # one axis: `vmap` adds its own, and there can be three
        in_specs=jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
        out_specs=strip(plan.elements[0]),
        out_shape=jax.ShapeDtypeStruct((batch, rows, columns), number.dtype),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name="feedback",
    )(*arrays)


def _round_strip(*refs: Any, rule: Rule, structure: Any, number: Format, height: int, strips: int) -> None:
    """The kernel: all rows of one strip of a matrix."""
    from jax.experimental import pallas as pl

    *arrays, codes_ref = refs
    plan: Plan = jax.tree.unflatten(structure, arrays)
    blocks, size, rank = plan.responses.shape
    at_once = _rows_at_once(size, len(plan.tiles[0]), height)
    columns = (pl.program_id(0) % strips).astype(jnp.uint32) * STRIP + jnp.arange(STRIP, dtype=jnp.uint32)

    def next_block(i: Array, done: tuple[Array, Any]) -> tuple[Array, Any]:
        s, state = done
        block = rule.before_block(state)

        def next_rows(j: Array, done: tuple[Array, Any]) -> tuple[Array, Any]:
            s_so_far, state_so_far = done
            first = i * size + j * at_once
            here, tile = pl.ds(first, at_once), jnp.minimum(first // height, len(plan.tiles[0]) - 1)
            row = first.astype(jnp.uint32) + jnp.arange(at_once, dtype=jnp.uint32)
            thresholds = lattice(row[:, None], columns[None, :])
            rows = Rows.of(plan, lambda x: x[here, :], lambda x: x[pl.ds(tile, 1), :], thresholds)
            directions = plan.directions[here, :]  # asked for early, so that they are there in time
            response = rough(plan.responses[i, pl.ds(j * at_once, at_once), :], s)
            values = rule.round(number, rows, response, block)
            codes_ref[here, :] = values.astype(number.dtype)
            error = rule.error(rows, values)
            s_so_far += rough(directions.T, error)
            return s_so_far, rule.after(state_so_far, rows, error, block, jnp.sum)

        return lax.fori_loop(0, size // at_once, next_rows, done)

    start = jnp.zeros((rank, STRIP), jnp.float32), rule.start(tuple(x[0, 0] for x in plan.strips))
    lax.fori_loop(0, blocks, next_block, start)
