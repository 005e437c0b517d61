"""The program that an eager call of `quantize` runs on one weight."""

import time
from typing import Any

from jax.typing import ArrayLike

import daq_jax as daq
from daq_jax import leaves
from daq_jax.tilings import DEFAULT_MATRIX


def compiled(base: ArrayLike, tuned: ArrayLike, recipe: daq.Recipe) -> tuple[float, Any]:
    """Seconds to compile the program for a pair of weights `[.., in, out]`, and the program."""
    start = time.perf_counter()
    program = leaves.lowered(base, tuned, recipe=recipe, matrix=DEFAULT_MATRIX).compile()
    return time.perf_counter() - start, program
