"""Runs what the documents promise: every example, and the code of Markdown files and of notebooks.

    python tests/run_docs.py examples README.md docs

All Python blocks of a Markdown file are one program, with its shell blocks below a line `<!-- run -->`, in
the order of the file, and so are the code cells of a notebook. Each file runs in a process of its own, in an
empty folder, so that the installed package is what is imported.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

BLOCK = re.compile(r"^(<!-- run -->\n)?```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
AT_ONCE = 2  # programs; most of their time goes into compiling, which takes one core
SHELL = "import subprocess; subprocess.run(['bash', '-euc', {!r}], check=True)\n"


def program(markdown: str) -> str:
    """The blocks of a Markdown file that are to be run, as one Python program; "" if there are none."""
    found = [
        block if language == "python" else SHELL.format(block)
        for run, language, block in BLOCK.findall(markdown)
        if run or language == "python"
    ]
    return "\n".join(found)


def cells(notebook: str) -> str:
    """The code cells of a notebook, as one Python program."""
    found = json.loads(notebook)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")


def snippets(path: pathlib.Path) -> list[tuple[str, str]]:
    """(name, source) of a Markdown file, or of the scripts of a folder and all documents below it."""
    if not path.is_dir():
        return [(str(path), program(path.read_text()))]
    scripts = [(str(p), p.read_text()) for p in sorted(path.glob("*.py"))]
    pages = [(str(p), program(p.read_text())) for p in sorted(path.rglob("*.md"))]
    pages += [(str(p), cells(p.read_text())) for p in sorted(path.rglob("*.ipynb"))]
    return scripts + [(name, source) for name, source in pages if source]


def run(name: str, source: str) -> tuple[bool, str]:
    """Whether a program ended well, and what to say of it."""
    commands = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, pathlib.Path(name).stem + "_.py")  # shadows no module
        script.write_text(source)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:daq_jax", str(script)],
            cwd=folder,
            env=os.environ | {"PATH": commands},
            capture_output=True,
            text=True,
        )
    failed = done.returncode != 0
    line = f"{'FAILED' if failed else 'ok'} {name} ({time.monotonic() - start:.0f} s)"
    return not failed, "\n".join([line, done.stdout, done.stderr] if failed else [line])


def main(paths: list[str]) -> int:
    programs = [s for p in paths for s in snippets(pathlib.Path(p))]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for ok, said in pool.map(lambda program: run(*program), programs):
            failed += not ok
            print(said, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
