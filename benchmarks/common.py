"""What all benchmarks share: where figures come from, where results go, how a call is timed."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
QUICK = ROOT / "build" / "benchmarks"  # not committed
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "daq_jax", "wheels").expanduser()
PACKAGES = ("daq-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes")
OF_A_MACHINE = ("--out", "--wheels", "--weights", "--disk", "--place")  # options that hold one path each
_WARM_UP = 0.3  # seconds


# --- Where figures come from --------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """When, where, with what and by which command a run was made; as JSON has it.

    `commit` is that of the checkout, with "+" where files differ from it, and None where git knows none.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv[1:]),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "backend": jax.default_backend(),
        "cpu": cpu(),
        "cpu_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **versions()},
    }


def command(words: Sequence[str]) -> str:
    """The command line, without the paths that differ from machine to machine."""
    kept, skipped = [], False
    for word in words:
        if skipped or word.partition("=")[0] in OF_A_MACHINE:
            skipped = not skipped and "=" not in word
            continue
        kept.append(word)
    return shlex.join(["python", "-m", "benchmarks", *kept])


def commit() -> str | None:
    """The commit of the checkout, 12 digits, "+" behind it where a tracked file was changed."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu() -> str:
    """Name of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Version of each package that figures may depend on, where it is installed."""
    import daq_jax  # of a plain checkout, no version is installed

    found = {"daq_jax": daq_jax.__version__}
    for name in PACKAGES[1:]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(report: dict[str, Any]) -> str:
    """Date, device, versions and command of a report, as a sentence of Markdown."""
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['date'][:10]}; {report['device']}; {used}; `{report['command']}`"


# --- Where results go ---------------------------------------------------------------------------------------


def results(out: Path | None, quick: bool, *folders: str) -> Path:
    """The folder for results, made if need be: `out`, or the usual one, or that of quick runs."""
    path = out or (QUICK if quick else RESULTS).joinpath(*folders)
    path.mkdir(parents=True, exist_ok=True)
    return path


def named(word: str, report: dict[str, Any], folder: Path) -> Path:
    """`WORD_DEVICE.json` in a folder."""
    device = report["device"].lower().removeprefix("nvidia ").replace(" ", "_")
    return folder / f"{word}_{device}.json"


def write(path: Path, report: dict[str, Any], markdown: str | None = None) -> None:
    """Writes a report as JSON, and its Markdown beside it."""
    path.write_text(json.dumps(report, indent=1) + "\n")
    if markdown is not None:
        path.with_suffix(".md").write_text(markdown)


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# --- How a call is timed ------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall time of each of several calls, after others that are not counted: an idle GPU is slow at first."""
    start = time.perf_counter()
    while True:
        jax.block_until_ready(call())
        if time.perf_counter() - start > _WARM_UP:
            break
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def queued_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call where a program goes on giving the device work, and nothing is waited for in between."""
    start, last = time.perf_counter(), None
    for _ in range(repeats):
        last = call()
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / repeats
