"""Error feedback as one kernel for NVIDIA GPUs: a strip of a matrix is walked from the first row to the last.

`feedback` says what is computed. Outputs have nothing to do with one another but for the size of their
change, and that concerns the 128 of a strip. So one program takes a strip, keeps `s = U' e` on the chip, and
reads every weight once. XLA starts some fifteen kernels for each of the blocks that wait for one another.

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
from daq_jax.roundings.feedback_rows import STRIP, Plan, Rows, Size, lattice

_ROWS = 32  # of a block that are in registers at a time
_WARPS = 8
_STAGES = 1  # of a pipeline for the loads of a product
_RANKS = (16, 32, 64, 128)  # numbers of directions: a product in Triton needs powers of two from 16


def applies(number: Format, plan: Plan, height: int) -> bool:
    """Whether `codes` is for this format and plan, with tiles of `height` rows."""
    *_, size, rank = plan.responses.shape
    return (
        number in INSTRUCTION
        and plan.target.shape[-1] % STRIP == 0
        and size >= min(_RANKS)
        and rank in _RANKS
        and (height % min(size, _ROWS) == 0 or plan.scale.shape[1] == 1)  # a turn's rows: in one row of tiles
    )


def codes(plan: Plan, number: Format, height: int) -> Float[Array, "B R C"]:
    """Codes, in the dtype of the format.

    Args:
        plan: one that this `applies` to.
        number: the format of the codes.
        height: rows of a tile.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    strips = plan.target.shape[-1] // STRIP

    def strip(x: Array) -> Any:
        return pl.BlockSpec((None, x.shape[1], STRIP), lambda i: (i // strips, 0, i % strips))

    def matrix(x: Array) -> Any:
        return pl.BlockSpec((None, *x.shape[1:]), lambda i: (i // strips, *(0 for _ in x.shape[1:])))

    specs = Plan(*map(strip, plan))._replace(
        responses=matrix(plan.responses), directions=matrix(plan.directions)
    )
    return pallas_call(
        functools.partial(_round_strip, number=number, height=height, strips=strips),
        grid=(len(plan.target) * strips,),  # one axis: `vmap` adds its own, and there can be three
        in_specs=list(specs),
        out_specs=strip(plan.target),
        out_shape=jax.ShapeDtypeStruct(plan.target.shape, number.dtype),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name="feedback",
    )(*plan)


def _round_strip(*refs: Any, number: Format, height: int, strips: int) -> None:
    """The kernel: all rows of one strip of a matrix."""
    from jax.experimental import pallas as pl

    *plan, codes_ref = refs
    plan = Plan(*plan)
    blocks, size, rank = plan.responses.shape
    at_once = min(size, _ROWS)
    columns = (pl.program_id(0) % strips).astype(jnp.uint32) * STRIP + jnp.arange(STRIP, dtype=jnp.uint32)
    product = functools.partial(jnp.matmul, precision=lax.Precision.DEFAULT)

    def next_block(i: Array, done: tuple[Array, Size]) -> tuple[Array, Size]:
        s, size_before = done
        more = size_before.correction()

        def next_rows(j: Array, done: tuple[Array, Size]) -> tuple[Array, Size]:
            s_so_far, size_so_far = done
            first = i * size + j * at_once
            here, tile = pl.ds(first, at_once), jnp.minimum(first // height, len(plan.scale) - 1)
            row = first.astype(jnp.uint32) + jnp.arange(at_once, dtype=jnp.uint32)
            thresholds = lattice(row[:, None], columns[None, :])
            rows = Rows.of(plan, lambda x: x[here, :], lambda x: x[pl.ds(tile, 1), :], thresholds)
            directions = plan.directions[here, :]  # asked for early, so that they are there in time
            response = product(plan.responses[i, pl.ds(j * at_once, at_once), :], s)
            rounded = rows.rounded(rows.aim(more, response), number)
            codes_ref[here, :] = rounded.astype(number.dtype)
            error = rows.error(rounded)
            s_so_far += product(directions.T, error)
            return s_so_far, size_so_far.after(rows.change, error, more, jnp.sum)

        return lax.fori_loop(0, size // at_once, next_rows, done)

    start = jnp.zeros((rank, STRIP), jnp.float32), Size.before(plan.left[0, 0])
    lax.fori_loop(0, blocks, next_block, start)
