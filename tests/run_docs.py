"""Runs what the documents promise: every example, and every Python block of a Markdown file.

    python tests/run_docs.py examples README.md

Each runs in a process of its own, in an empty folder, so that the installed package is what is imported.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time


def snippets(path: pathlib.Path) -> list[tuple[str, str]]:
    """(name, source) of each script below a folder, or of all Python blocks of a Markdown file as one."""
    if path.is_dir():
        return [(str(p), p.read_text()) for p in sorted(path.glob("*.py"))]
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(str(path), "\n".join(blocks))]


def main(paths: list[str]) -> int:
    failed = 0
    for name, source in [s for p in paths for s in snippets(pathlib.Path(p))]:
        with tempfile.TemporaryDirectory() as folder:
            script = pathlib.Path(folder, pathlib.Path(name).stem + ".py")
            script.write_text(source)
            start = time.monotonic()
            command = [sys.executable, "-W", "error::DeprecationWarning:daq_jax", str(script)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        print(f"{'ok' if done.returncode == 0 else 'FAILED'} {name} ({time.monotonic() - start:.0f} s)")
        if done.returncode:
            failed += 1
            print(done.stdout, done.stderr, sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
