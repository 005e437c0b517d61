"""The programs that a call of `quantize` compiles and runs, and how to compile them without our kernels.

Both helpers patch names inside daq_jax: nothing public gives the compiled program of an eager call yet.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from daq_jax import leaves
from daq_jax.roundings import feedback, gains


def compiled_by(call: Callable[[], Any]) -> list[tuple[float, Any]]:
    """The programs that a call of `quantize` runs on its leaves: seconds to compile each, and the program."""
    run, found = leaves._quantize_pair, []

    def record(*args: Any, **static: Any) -> Any:
        start = time.perf_counter()
        compiled = run.lower(*args, **static).compile()
        found.append((time.perf_counter() - start, compiled))
        return run(*args, **static)

    with mock.patch.object(leaves, "_quantize_pair", record):
        call()
    return found


def without_kernels() -> contextlib.ExitStack:
    """While this is open, `quantize` compiles plain programs."""
    stack = contextlib.ExitStack()
    for module in (leaves, gains, feedback):
        stack.enter_context(mock.patch.object(module, "has_fp8_gpu", return_value=False))
    return stack
