"""Set up before JAX starts: eight CPU devices, strict dtype promotion, and types checked on every call."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For `from benchmarks import ..`. At the end: an installed daq_jax must be found before the checkout's.
sys.path.append(str(Path(__file__).parents[1]))
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads of tests side by side wait for one another
# Programs are kept from one run to the next; many tests start processes, which share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")

# The package must not be imported before this line: the hook rewrites modules as they load.
install_import_hook("daq_jax", "beartype.beartype")

MANY = 20_000  # memory maps of a process; Linux allows 65,530, beyond which XLA crashes while it compiles


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped() -> Iterator[None]:
    """Programs of tests that are done are dropped when they are many: each has several memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MANY:
        jax.clear_caches()
        gc.collect()
