"""Are the models of other JAX libraries seen as they compute, and do they run on codes?

    python -m benchmarks jax_libraries

makes a virtual environment for each library in `build/jax_libraries`, with the Python that runs it; MaxText,
`gemma` and Levanter need 3.12. Tiny models of each library are planned, quantized, saved, loaded and run on
codes. The axes of every quantized leaf are compared with those that gradients tell (`axes`), and the result
of the run with that on dequantized weights. Writes `jax_libraries.json` and `jax_libraries.md`, which name
what does not install or run.
"""

import datetime
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.environments import install, python_of


class Library(NamedTuple):
    """What is installed for a library: with its dependencies, and without."""

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()


LIBRARIES = {
    "equinox": Library(("equinox",)),
    "haliax": Library(("equinox", "marin-haliax")),
    "keras": Library(("keras",)),
    "penzai": Library(("penzai",)),
    "tunix": Library(("einops", "fsspec", "safetensors"), ("google-tunix", "qwix")),
    "maxtext": Library(
        ("aqtp", "jinja2", "omegaconf", "packaging", "psutil", "pydantic"), ("maxtext", "qwix")
    ),
    "gemma": Library(
        (
            "chex",
            "clu",
            "dialog",
            "einops",
            "etils[ecolab]",
            "immutabledict",
            "lark",
            "sentencepiece",
            "typeguard",
        ),
        ("gemma", "kauldron"),
    ),
    "levanter": Library(("marin-levanter", "marin-haliax", "equinox")),
    # EasyDeL imports PyTorch, and asks for versions of JAX and Flax that are too old for daq_jax.
    "easydel": Library(("easydel", "pillow", "torch==2.13.0"), ("jax>=0.12", "jaxlib>=0.12", "flax>=0.12.7")),
}
LIMIT = 3600  # seconds for each library
HEADS = (
    "library",
    "model",
    "quantized",
    "right",
    "finer",
    "wrong",
    "not told",
    "loaded = saved",
    "difference in jit",
)


def rows_of(name: str, library: Library) -> list[dict[str, Any]]:
    """Installs a library and checks its models, each a row; one row with an `error` if that cannot be."""
    python = python_of(common.ROOT / "build" / "jax_libraries" / name)
    # The library comes in a second step, so that its pins of old versions do not make the first impossible.
    steps = [("-e", str(common.ROOT)), ("--pre", *library.packages), ("--pre", "--no-deps", *library.alone)]
    for step in steps[: 3 if library.alone else 2]:
        if wrong := install(python, *step):
            return [{"library": name, "model": "", "error": wrong}]
    call = [python, "-m", "benchmarks.jax_libraries.check", name]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(common.ROOT)}
    with tempfile.TemporaryDirectory() as folder:  # some libraries write logs where they are imported
        done = subprocess.run(call, cwd=folder, env=settings, capture_output=True, text=True, timeout=LIMIT)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"library"')]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word"]
        rows.append({"library": name, "model": "all", "error": lines[-1]})
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The table of all models, and what is to be said of single leaves."""

    def line(row: dict[str, Any]) -> list[Any]:
        versions = row.get("versions", {})
        library = f"{row['library']} {versions.get(row['library'], '')}".strip()
        library += f", JAX {versions['jax']}, Python {versions['python']}" if versions else ""
        if "error" in row:
            return [library, row["model"], *["-"] * 6, row["error"].partition("\n")[0][:120]]
        counts = [row[name] for name in ("quantized", "right", "finer", "wrong", "not told")]
        return [
            library,
            row["model"],
            *counts,
            "yes" if row["loaded_is_saved"] else "no",
            f"{row['difference']:.1g}",
        ]

    notes = [
        f"- {row['library']}, {row['model']}: {word.replace('_', ' ')} {', '.join(row[word])}"
        for row in report["rows"]
        for word in ("wrong_leaves", "not_told_leaves")
        if row.get(word)
    ]
    dates = sorted(row["date"] for row in report["rows"])
    head = (
        "Axes of every quantized leaf, beside those that gradients tell: *right*; right and *finer*, in\n"
        "more matrices than the model needs; *wrong*; or *not told* by gradients. Then whether a saved\n"
        "model loads bit for bit, and the largest difference between the results on codes and on\n"
        "dequantized weights, both inside `jit`.\n\n"
        "Each library has an environment of its own. `--only NAME` measures one and leaves the rows of the\n"
        f"others as they are: the rows here come from calls between {dates[0]} and {dates[-1]}, of which\n"
        "the last one is named below.\n"
    )
    return "\n".join(
        [
            head,
            common.table(HEADS, map(line, report["rows"])),
            "",
            *notes,
            *[""] * bool(notes),
            common.provenance(report),
            "",
        ]
    )


def main(*, only: tuple[str, ...] = (), out: Path | None = None, quick: bool = False) -> int:
    """Installs and checks the libraries. Status 1 if one fails, a leaf is wrong or a result differs.

    Args:
        only: names of libraries, whose rows take the place of earlier ones; none for all.
        out: folder for the results; None for `benchmarks/results`.
        quick: Equinox alone.
    """
    path = common.results(out, quick) / "jax_libraries.json"
    names = only or (("equinox",) if quick else tuple(LIBRARIES))
    rows = json.loads(path.read_text())["rows"] if only and path.exists() else []
    for name in names:
        found = rows_of(name, LIBRARIES[name])
        for row in found:
            print(json.dumps(row), flush=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        rows = [row for row in rows if row["name"] != name]
        rows += [{"name": name, "date": today, **row} for row in found]
        rows.sort(key=lambda row: list(LIBRARIES).index(row["name"]))
        report = common.environment() | {"rows": rows}
        common.write(path, report, markdown(report))
    print(path.with_suffix(".md").read_text())
    return int(any("error" in row or row.get("wrong") or row.get("difference") for row in rows))


COMMANDS = {"jax_libraries": main}
