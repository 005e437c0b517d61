"""Virtual environments of benchmarks that need what the project itself does not."""

import subprocess
import venv
from pathlib import Path


def python_of(folder: Path, *packages: str) -> Path:
    """The interpreter of an environment, which is made if need be, with some packages in it."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install(python, *packages)
    return python


def install(python: Path, *words: str) -> str:
    """Installs packages. Returns what went wrong, in a line; "" if nothing did."""
    done = subprocess.run([python, "-m", "pip", "install", "-q", *words], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (lines or ["pip failed"])[-1]
