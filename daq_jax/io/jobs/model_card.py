"""The model card of a result: `README.md`, with front matter that the Hugging Face Hub reads.

A card says nothing that depends on where folders are or on how often the job was stopped: folders go by their
names, and command and date are those of the call that began the job. The card of the tuned model is kept
below: its license, languages and other front matter in ours, its text under a heading of its own.
"""

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daq_jax.analysis.names import on_one_line, printable
from daq_jax.io.hf.folders import Folder
from daq_jax.io.jobs.audit import identity_line
from daq_jax.io.jobs.options import Output, Run
from daq_jax.io.jobs.planning import Plan
from daq_jax.recipe import Recipe
from daq_jax.recipes import RECIPES
from daq_jax.version import __version__

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, which differs from process to process
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$\r?\n?", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"^([A-Za-z_][\w-]*):", re.MULTILINE)
# Said anew, or of another model: figures under `model-index` were measured with the weights of the tuned one.
_OWN = ("base_model", "base_model_relation", "tags", "library_name", "model-index")
_FIGURES = (
    ("projection", "size of the change that was kept, along the change; 1 is all"),
    ("cosine", "cosine between the change and what was kept of it"),
    ("sign_rate", "share of the changed weights that still move the same way"),
)


def origin_of(
    base: Folder, tuned: Folder, recipe: Recipe, plan: Plan, output: Output, run: Run
) -> dict[str, str]:
    """Where a result comes from, in words: see `Work.origin`.

    Args:
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        recipe: recipe as the user passed it.
        plan: what is written.
        output: what the result is to be.
        run: how the work is to be done, of which only what decides the result is said.
    """
    names = [hub_name(base.path), hub_name(tuned.overlay or tuned.path)]
    known = next((name for name, value in RECIPES.items() if value == recipe), "")
    return {
        "base": names[0],
        "tuned": names[1],
        "recipe": known or _ADDRESS.sub("", repr(recipe)),
        "command": _command(names, known, plan, output, run),
        "version": __version__,
        "date": _today(),
    }


def hub_name(folder: Path) -> str:
    """ORG/NAME of a folder in a cache of the Hugging Face Hub; the name of any other folder.

    >>> hub_name(Path("hub/models--org--model/snapshots/0123abcd"))
    'org/model'
    """
    place = folder.resolve()
    if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--"):
        return place.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return on_one_line(place.name)


def _today() -> str:
    """The day in UTC, or that of SOURCE_DATE_EPOCH, which makes two builds alike."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.datetime.now(datetime.UTC)
    if given.isdecimal():
        now = datetime.datetime.fromtimestamp(int(given), datetime.UTC)
    return now.date().isoformat()


def _command(names: Sequence[str], recipe: str, plan: Plan, output: Output, run: Run) -> str:
    """A command that gives the result again; what only says how the work is done is left out."""
    words = ["daq-jax quantize", *map(_word, names), "OUT", f"--format {plan.format}"]
    words += [f"--recipe {recipe}"] if recipe else []
    words += [f"--target {output.target}"] if output.target != Output().target else []
    words += [f"--missing-base {run.missing_base}"] if run.missing_base != Run().missing_base else []
    words += [f"--tp {output.tp}"] if output.tp != 1 else []
    words += [f"--base-dtype {output.base_dtype}"] if output.base_dtype else []
    words += ["--custom-code"] if output.custom_code else []
    words += [f"--keep {_word(pattern)}" for pattern in output.choice.keep]
    words += [f"--only {_word(pattern)}" for pattern in output.choice.only]
    return " ".join(words)


def _word(text: str) -> str:
    """A word for a shell."""
    plain = on_one_line(text)
    return plain if re.fullmatch(r"[\w./:=@%+,-]+", plain) else "'" + plain.replace("'", "'\"'\"'") + "'"


def card_of(plan: Plan, report: Mapping[str, Any], tuned: Path | None) -> str:
    """The text of a model card.

    Args:
        plan: what was written.
        report: the report, with `origin` and the figures.
        tuned: model card of the tuned model, whose text is kept below; None for none.
    """
    front, text = _read(tuned)
    origin = report["origin"]
    name = origin["tuned"].rpartition("/")[2]
    parts = [
        _front_matter(plan, origin, front),
        f"# {_escaped(name)}, quantized to {plan.format}",
        f"`{_code(origin['tuned'])}` with weights in {plan.format}. Codes and scales were chosen by what "
        f"becomes of the change from `{_code(origin['base'])}`, the model before tuning.",
        _facts(plan, report),
        _figures(report),
        f"Made on {origin['date']} by daq_jax {origin['version']}:\n\n```sh\n{origin['command']}\n```",
        "All files, tensors and figures are listed in `daq_report.json`.",
    ]
    if text.strip():
        parts += ["---", f"# Model card of {_escaped(name)}", text.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(plan: Plan, origin: Mapping[str, str], front: Mapping[str, str]) -> str:
    method = plan.config.get("quantization_config")
    method = method.get("quant_method") if isinstance(method, Mapping) else None
    words = [*_listed(front.get("tags", "")), "daq-jax", plan.format, *([method] if method else [])]
    library = "\n".join(_listed(front.get("library_name", ""))).strip()
    if library in ("", "peft"):  # the result is no adapter any more
        library = "transformers" if plan.config.get("architectures") else ""
    lines = [f"base_model: {json.dumps(origin['tuned'])}", "base_model_relation: quantized"]
    lines += [f"library_name: {json.dumps(library)}"] if library else []
    lines += ["tags:", *(f"- {json.dumps(word, ensure_ascii=False)}" for word in dict.fromkeys(words))]
    lines += [block for key, block in front.items() if key not in _OWN]
    return "\n".join(["---", *lines, "---"])


def _facts(plan: Plan, report: Mapping[str, Any]) -> str:
    origin, chosen = report["origin"], [task for task in plan.tasks if task.quantize]
    lines = [
        f"- Base: `{_code(origin['base'])}`; tuned: `{_code(origin['tuned'])}`.",
        f"- Recipe: `{_code(origin['recipe'])}`; format: `{plan.format}`.",
        f"- Quantized: {len(chosen)} weights, {plan.share:.1%} of the elements.",
        *(f"- Kept: {len(tasks)} tensors: {_escaped(why)}." for why, tasks in plan.kept.items()),
    ]
    lines += [f"- Left out: {len(plan.dropped)} tensors."] if plan.dropped else []
    return "\n".join(lines)


def _figures(report: Mapping[str, Any]) -> str:
    """What was kept of the change, as a table; "" if nothing was compared."""
    total = report.get("total")
    if not total:
        return ""
    known = [(key, what, total.get(key)) for key, what in _FIGURES]
    rows = [f"| {key} | {value:.4f} | {what} |" for key, what, value in known if value is not None]
    table = "\n".join(["| figure | value | meaning |", "| --- | --- | --- |", *rows])
    line = identity_line(report)
    return f"{table}\n\n{line[:1].upper()}{line[1:]}." if line else table


def _read(path: Path | None) -> tuple[dict[str, str], str]:
    """Front matter of a card, each top-level key with its lines, and the text below it."""
    if path is None:
        return {}, ""
    text = path.read_bytes().decode("utf-8", errors="replace").removeprefix("\ufeff").replace("\r\n", "\n")
    found = _FRONT.match(text)
    starts = list(_KEY.finditer(found[1])) if found else []
    if found is None or not starts:
        return {}, text
    ends = [start.start() for start in starts[1:]] + [len(found[1])]
    blocks = {s[1]: found[1][s.start() : end].rstrip() for s, end in zip(starts, ends, strict=True)}
    return blocks, text[found.end() :]


def _listed(block: str) -> list[str]:
    """The values of a key of front matter: one, a list in brackets, or a list of lines."""
    value = block.partition(":")[2].strip()
    if value.startswith("["):
        words = value.strip("[]").split(",")
    else:
        words = [re.sub(r"^\s*-\s+", "", line) for line in value.splitlines()]
    return [printable(w.strip().strip("\"'")) for w in words if w.strip().strip("\"'")]


def _escaped(text: str) -> str:
    """Text that is no markup."""
    return re.sub(r"([\\`*_\[\]<>#|$])", r"\\\1", on_one_line(text))


def _code(text: str) -> str:
    """Text between backquotes."""
    return on_one_line(text).replace("`", "'")
