"""What is installed, what the machine has, and what runs where: for people in trouble and for their reports.

Every line stands for itself: what cannot be found out is said on its line, and the others are still told.
"""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from daq_jax.numerics.kernel_choice import may_take_kernels, why_no_kernels
from daq_jax.version import __version__

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_dtypes", "numpy", "scipy", "jaxtyping"),
    *("rich", "tyro"),
)
# Modules that are imported only where something needs them: what needs them, and how to install them.
EXTRAS: Mapping[str, tuple[str, str]] = {
    "matplotlib": ("pictures, and pages of `compare --html`", "pip install 'daq-jax[plot]'"),
    "jinja2": ("pages of `compare --html`", "pip install 'daq-jax[plot]'"),
    "qwix": ("`from_qwix` and `to_qwix`", "pip install qwix"),
}
SETTINGS = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "JAX_ENABLE_X64",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_GIB = 2**30
_NVIDIA = Path("/dev/nvidiactl")  # there wherever the driver is

Answers = dict[str, str]


def examine() -> dict[str, Answers]:
    """Everything that is known of this installation and machine: answers by question, by section.

    Starts JAX if nothing has. Never raises: where an answer cannot be found, the answer says why.
    """
    sections: dict[str, Mapping[str, Callable[[], str]]] = {
        "versions": _versions(),
        "machine": {"processor": _processor, "cores": _cores, "memory": _memory, "threads of BLAS": _blas},
        "devices": _devices(),
        "what runs where": {
            "quantize, compare": _where,
            "GPU kernels": _kernels,
            "folders": lambda: (
                f"files are read and written by threads of the CPU; weights go to {_default()}"
            ),
            "tables and pages": lambda: "CPU",
        },
        "compiled programs": {"folder": _cache_folder, "size": _cache_size},
        "extras": {name: _extra(name) for name in EXTRAS},
        "settings": {name: _setting(name) for name in SETTINGS},
    }
    return {
        section: {question: _answer(ask) for question, ask in questions.items()}
        for section, questions in sections.items()
    }


def text(found: Mapping[str, Answers]) -> str:
    """The answers as plain lines, to read and to paste."""
    width = max(len(question) for answers in found.values() for question in answers)
    lines = []
    for section, answers in found.items():
        lines += ["", section, *(f"  {question:<{width}}  {answer}" for question, answer in answers.items())]
    return "\n".join(lines[1:])


def _answer(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except Exception as error:  # whatever is broken here is what the reader came for
        return f"could not be found out: {_reason(error)}"


def _reason(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).split()]).removesuffix(":")


# --- One function for each question ---


def _versions() -> dict[str, Callable[[], str]]:
    def of(name: str) -> Callable[[], str]:
        def ask() -> str:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                return "not installed"

        return ask

    own = {"daq_jax": lambda: f"{__version__}, {Path(__file__).parents[1]}"}
    python = {"python": lambda: f"{platform.python_version()}, {platform.platform()}"}
    return own | python | {name: of(name) for name in PACKAGES}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} {platform.processor()}".strip()


def _cores() -> str:
    total = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return f"{total}" if usable == total else f"{usable} of {total} for this process"


def _memory() -> str:
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return (
        f"{page * total / _GIB:.1f} GiB, {page * free / _GIB:.1f} GiB unused; "
        f"`quantize` takes {page * total / 4e9:.1f} GB unless `--memory` says otherwise"
    )


def _blas() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ) or (
        "as many as cores; set OPENBLAS_NUM_THREADS=1 if the default recipe is slow on a CPU"
    )


def _devices() -> Mapping[str, Callable[[], str]]:
    try:
        found: dict[str, Callable[[], str]] = {str(d): _device(d) for d in jax.local_devices()}
    except Exception as error:
        why = _reason(error)
        return {"JAX": lambda: f"does not start: {why}. Is JAX_PLATFORMS right, and the driver new enough?"}
    if jax.default_backend() == "cpu" and _NVIDIA.exists():
        found["NVIDIA GPU"] = lambda: "in this machine, but JAX does not use it: pip install 'jax[cuda13]'"
    if jax.process_count() > 1:
        found["processes"] = lambda: f"{jax.process_index()} of {jax.process_count()}"
    return found


def _device(device: Any) -> Callable[[], str]:
    def ask() -> str:
        stats = device.memory_stats() or {}
        limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
        memory = "memory of the machine" if device.platform == "cpu" else "memory is not told"
        if limit:
            memory = f"{limit / _GIB:.1f} GiB for JAX, {(used or 0) / _GIB:.1f} GiB in use"
        return f"{device.device_kind}, {memory}"

    return ask


def _default() -> str:
    return str(getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0])


def _where() -> str:
    how = "in kernels where there is one" if may_take_kernels() else "in programs compiled by XLA"
    return f"{_default()}, or where the arrays are, {how}"


def _kernels() -> str:
    why = why_no_kernels()
    return f"not used: {why}; results are the same" if why else "used"


def _cache() -> Path | None:
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(folder) if folder and getattr(jax.config, "jax_enable_compilation_cache", True) else None


def _cache_folder() -> str:
    folder = _cache()
    return str(folder) if folder else "none: programs are compiled anew by each process"


def _cache_size() -> str:
    folder = _cache()
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()] if folder else []
    return f"{sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files"


def _extra(name: str) -> Callable[[], str]:
    purpose, install = EXTRAS[name]

    def ask() -> str:
        if importlib.util.find_spec(name) is None:
            return f"missing: {purpose}. {install}"
        return f"{importlib.metadata.version(name)}: {purpose}"

    return ask


def _setting(name: str) -> Callable[[], str]:
    return lambda: os.environ.get(name, "not set")
