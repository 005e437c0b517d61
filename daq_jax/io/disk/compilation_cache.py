"""Compiled programs kept on disk: JAX's persistent compilation cache, set up in one call.

JAX compiles a program for each recipe and shape of weights, which takes seconds, and forgets it when the
process ends. With its persistent cache the next process reads the program instead. A cache holds programs
that will be run, so it lies in a folder of the user's own, and one for each kind of processor: homes are
shared.
"""

import os
import platform
import zlib
from pathlib import Path
from typing import Any

import jax

_FROM = 0.2  # seconds that compiling must take for a program to be kept
_CPU = Path("/proc/cpuinfo")


def enable_compilation_cache(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Keeps compiled programs on disk, for this process and later ones.

    Call it before the first quantization. On a pod every process calls it; a path on a shared disk is then
    compiled for once. A cache that was set up already, by `jax_compilation_cache_dir` or its environment
    variable, is left as it is, and JAX_ENABLE_COMPILATION_CACHE=false turns all of this off. Nothing is ever
    removed: delete the folder when it has grown too large.

    Args:
        path: folder of the cache; None for `daq_jax` in the user's cache folder, which is XDG_CACHE_HOME or
            `~/.cache`.

    Returns:
        The folder; None if the cache is turned off, or no folder can be made where None was given.

    Raises:
        OSError: if the folder that was given cannot be made.
    """
    if not _setting("jax_enable_compilation_cache"):
        return None
    found = _setting("jax_compilation_cache_dir")
    if path is None and found:
        return Path(found)
    try:
        folder = _own_folder() if path is None else Path(path)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where a user has no home
        if path is None:
            return None
        raise
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _FROM)
    return folder


def _setting(name: str) -> Any:
    """A setting of JAX, which defines them while it loads: no type checker knows them."""
    return getattr(jax.config, name)


def _own_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "daq_jax" / f"compiled-{zlib.crc32(_processor().encode()):08x}"


def _processor() -> str:
    """What the compiler knows of the processor: programs for one may not run on another."""
    try:
        lines = _CPU.read_text().splitlines()
    except OSError:
        lines = []
    known = (line for line in lines if line.startswith(("flags", "Features", "model name")))
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(known))])
