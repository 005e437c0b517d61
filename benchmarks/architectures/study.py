"""Tiny random models of every architecture of transformers, in five formats: loaded right, or refused.

    python -m benchmarks architectures

For each model a base folder and a tuned one are written, quantized, and loaded again by `from_pretrained`. No
key may be missing or unexpected, and the outputs must be those of a model that holds the dequantized weights
in plain float32. The plan must account for every tensor of the tuned folder. Needs torch, transformers and
compressed-tensors.
"""

import dataclasses
import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import daq_jax as daq
from benchmarks.architectures.models import MODELS, Model, built, outputs_of
from benchmarks.common import environment, provenance, results, table, write
from daq_jax.io.hf.folders import open_folder

FORMATS = ("fp8-block", "fp8-channel", "int8-channel", "int4-group", "mxfp4")
SAMPLE = ("llama", "qwen3_moe", "deepseek_v3", "t5", "whisper", "llava")
QUICK_FORMATS = ("fp8-block", "int4-group")
PRECISION = 2e-3  # of the largest output: rounding in other orders and dtypes; formats err by 10 times this
CHANGE = 1e-3  # of the size of each tensor


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a model in a format.

    Attributes:
        model_type: type of the model.
        format: name of the format.
        verdict: "ok"; "refused"; "told", where the plan says that transformers does not load it; or "fault".
        words: why, where it is not "ok".
        quantized: number of weights that were quantized.
        kept: number of tensors that were kept.
        difference: largest difference of an output from that of the dequantized model, over the largest.
        error: norm of the difference from the tuned model, over its norm.
    """

    model_type: str
    format: str
    verdict: str
    words: str = ""
    quantized: int = 0
    kept: int = 0
    difference: float | None = None
    error: float | None = None


def pair_of(model: Model, path: Path) -> tuple[Path, Path]:
    """A base folder, and the folder of the same model after a small change of every parameter."""
    import torch  # pyright: ignore[reportMissingImports]

    loaded = built(model)
    loaded.save_pretrained(path / "base")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in loaded.parameters():
            size = CHANGE * float(parameter.abs().mean())
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    loaded.save_pretrained(path / "tuned")
    return path / "base", path / "tuned"


def outcome_of(model: Model, format: str, base: Path, tuned: Path, path: Path) -> Outcome:
    """Quantizes a pair into a format and holds the result against the dequantized model."""
    out = path / format
    try:
        report = daq.quantize_folder(base, tuned, out, daq.recipes.absmax, format=format, memory_gb=2)
    except daq.DaqError as error:
        why = str(error).replace(f"{path}/", "").replace("|", "/")
        return Outcome(model.model_type, format, "refused", why)
    if "transformers does not load" in report["server"]:
        return Outcome(model.model_type, format, "told", f"the plan says: {report['server']}")
    counts = {"quantized": len(report["quantized"]), "kept": len(report["kept"])}
    try:
        faults, difference, error = _compared(model, format, tuned, out, report)
    except Exception as fault:  # a loader's: any kind
        faults, difference, error = [f"{type(fault).__name__}: {str(fault)[:200]}"], None, None
    words = "; ".join(faults).replace("\n", " ").replace("|", "/")
    verdict = "fault" if faults else "ok"
    return Outcome(model.model_type, format, verdict, words, **counts, difference=difference, error=error)


def _compared(
    model: Model, format: str, tuned: Path, out: Path, report: dict[str, Any]
) -> tuple[list[str], float, float]:
    """Faults of a result, its difference from the dequantized model, its error against the tuned model."""
    faults = [f"not accounted for: {name}" for name in unaccounted(tuned, report)]
    loaded, told = load(model, out, format)
    faults += [f"{key}: {', '.join(sorted(map(str, names))[:4])}" for key, names in told.items() if names]
    plain, _ = load(model, dequantized(tuned, out, out.with_name(f"{format}-plain")))
    before, _ = load(model, tuned)
    found, wanted, first = (outputs_of(model, x) for x in (loaded, plain, before))
    if not np.isfinite(found).all():
        faults.append("outputs are not finite")
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    error = float(np.linalg.norm(wanted - first) / np.linalg.norm(first))
    if not difference <= PRECISION:
        faults.append(f"outputs differ from the dequantized model's by {difference:.2g} of the largest")
    return faults, difference, error


def unaccounted(tuned: Path, report: dict[str, Any]) -> list[str]:
    """Tensors of a tuned folder that a report does not list as quantized, kept or left out."""
    names = set[str]()
    for file in tuned.glob("*.safetensors"):
        with file.open("rb") as content:
            names |= json.loads(content.read(int.from_bytes(content.read(8), "little"))).keys()
    listed = {*report["quantized"], *report["kept"], *report["left_out"]}
    return sorted(names - listed - {"__metadata__"})


def load(model: Model, path: Path, format: str = "") -> tuple[Any, dict[str, Any]]:
    """A model in float32 as transformers loads it, dequantized if it has a format, and what it tells."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    how: dict[str, Any] = {}
    if format:
        fine = format == "fp8-block"
        kind = transformers.FineGrainedFP8Config if fine else transformers.CompressedTensorsConfig
        how["quantization_config"] = kind(dequantize=True)
    kind = getattr(transformers, model.kind)
    loaded, told = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **how)
    return loaded.float(), told  # experts in MXFP4 come in bfloat16, whatever the dtype asked for


def dequantized(tuned: Path, out: Path, path: Path) -> Path:
    """A folder like the tuned one, with the weights that another one has quantized as that stores them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tuned, path)
    folder = open_folder(out)
    try:
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors.keys() & folder.tensors.keys():
                found = folder.read(name, dtype=np.dtype(np.float32))
                if isinstance(found, daq.QTensor):
                    weight = np.asarray(found.dequantize(np.float32))
                    turned = folder.tensors[name].turned
                    tensors[name] = np.ascontiguousarray(weight.swapaxes(-1, -2)) if turned else weight
            save_file(tensors, file, {"format": "pt"})
    finally:
        folder.close()
    return path


def study(
    *, quick: bool = False, out: Path | None = None, only: tuple[str, ...] = (), formats: tuple[str, ...] = ()
) -> int:
    """Loads tiny random models of every architecture in every format. Exit status 1 if one is at fault.

    Args:
        quick: six architectures and two formats.
        out: folder for the results.
        only: types of the models to take, whose outcomes take the place of earlier ones; none for all.
        formats: formats to take, whose outcomes take the place of earlier ones; none for all.
    """
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    where = results(out, quick) / "architectures.json"
    types = only or (SAMPLE if quick else tuple(m.model_type for m in MODELS))
    taken = formats or (QUICK_FORMATS if quick else FORMATS)
    earlier = _earlier(where) if only or formats else []
    outcomes = [o for o in earlier if o.model_type not in types or o.format not in taken]
    for model in (m for m in MODELS if m.model_type in types):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            base, tuned = pair_of(model, Path(folder))
            for format in taken:
                outcomes.append(outcome_of(model, format, base, tuned, Path(folder)))
        mine = [o for o in outcomes if o.model_type == model.model_type]
        words = " ".join(f"{o.format}={o.verdict}" for o in mine)
        print(f"{model.model_type} ({time.monotonic() - start:.0f} s): {words}", flush=True)
        for o in mine:
            if o.words:
                print(f"    {o.format}: {o.words}", flush=True)
    report: dict[str, Any] = environment()
    report["versions"] |= _versions()
    order = [m.model_type for m in MODELS]
    outcomes.sort(key=lambda o: (order.index(o.model_type), FORMATS.index(o.format)))
    report["outcomes"] = [dataclasses.asdict(o) for o in outcomes]
    write(where, report, _page(report))
    return int(any(o.verdict == "fault" for o in outcomes))


def _earlier(where: Path) -> list[Outcome]:
    """What the result file has."""
    return [Outcome(**o) for o in json.loads(where.read_text())["outcomes"]] if where.exists() else []


def _versions() -> dict[str, str]:
    import importlib.metadata

    return {n: importlib.metadata.version(n) for n in ("torch", "transformers", "compressed-tensors")}


def _page(report: dict[str, Any]) -> str:
    outcomes = [Outcome(**o) for o in report["outcomes"]]
    formats = [f for f in FORMATS if f in {o.format for o in outcomes}]
    models = [m for m in MODELS if m.model_type in {o.model_type for o in outcomes}]
    of = {(o.model_type, o.format): o for o in outcomes}
    reasons = list(dict.fromkeys(o.words for o in outcomes if o.words))
    rows = []
    for model in models:
        cells = [_cell(of.get((model.model_type, f)), reasons) for f in formats]
        rows.append([model.family, f"`{model.model_type}`", *cells])
    counts = {v: sum(o.verdict == v for o in outcomes) for v in ("ok", "refused", "told", "fault")}
    return (
        "\n\n".join(
            [
                "# Architectures of transformers",
                f"{len(models)} architectures in {len(formats)} formats: {counts['ok']} loaded right, "
                f"{counts['refused']} refused, {counts['told']} not for transformers as the plan says, "
                f"{counts['fault']} at fault. A cell says how many weights are "
                "quantized, and the error of the outputs against the tuned model. Loaded right: no key "
                f"missing or unexpected, and outputs within {PRECISION:g} of those of the dequantized model.",
                table(["family", "model", *formats], rows),
                "\n".join(f"{i + 1}. {why}" for i, why in enumerate(reasons)),
                provenance(report),
            ]
        )
        + "\n"
    )


def _cell(outcome: Outcome | None, reasons: list[str]) -> str:
    if outcome is None:
        return ""
    if outcome.verdict == "ok":
        return f"{outcome.quantized}: {outcome.error:.1e}"
    return f"{outcome.verdict} ({reasons.index(outcome.words) + 1})"


COMMANDS = {"architectures": study}
