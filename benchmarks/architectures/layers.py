"""Which stored matrices are linear layers, by transformers' model classes, and where names tell otherwise.

    python -m benchmarks layers

Each model type is built without memory, as its config is by default, with few layers. The class of the module
that holds a parameter says what it is: linear layer, expert, embedding, convolution, router. Names are those
of a saved folder. What `daq-jax quantize` would decide from names and sizes alone is held against it. Where
that would quantize what is no linear layer, or keep a layer of the model for its name, an entry is written to
`daq_jax/io/hf/model_types.json`, which the command reads. The types whose experts or linear layers are stored
[in, out] are in it too. What it has of types that cannot be built stays. Run it again when transformers
moves. Needs torch and transformers.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import daq_jax.io.hf.architectures as architectures
from benchmarks.common import environment, provenance, results, table, write
from benchmarks.folders.models import Model, make
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from daq_jax.io.hf.tensor_files import TensorSpec
from daq_jax.io.jobs.keeping import ALL, BY_NAME, kept_of

PACKAGED = Path(architectures.__file__).with_name("model_types.json")
SAMPLE = ("gpt2", "gpt_oss", "qwen3_moe", "roberta-prelayernorm", "funnel", "dac")
TURNED = "linear, stored [in, out]"
_LAYERS = 3  # of each stack that are built
_SMALLEST = 32  # inputs and outputs of a layer worth an entry
# The class of a model with all its heads comes first.
_HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "PRETRAINING",
    "CTC",
    "IMAGE_CLASSIFICATION",
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A matrix as a saved folder holds it.

    Attributes:
        role: "linear", "experts", or what it is instead, such as "embedding".
        shape: as stored.
        of_layers: whether it is a part of a repeated layer, and of no norm, router or head in it.
    """

    role: str
    shape: tuple[int, ...]
    of_layers: bool


@dataclasses.dataclass(frozen=True)
class Known:
    """What the classes of a model type say.

    Attributes:
        config: of the model, as a folder holds it.
        matrices: by the name that a saved folder has for them.
    """

    config: dict[str, Any]
    matrices: dict[str, Stored]


def kinds() -> dict[str, str]:
    """The class of each model type."""
    from transformers.models.auto import modeling_auto  # pyright: ignore[reportMissingImports]

    found: dict[str, str] = {}
    for name in (*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS), "MODEL_MAPPING_NAMES"):
        for model_type, kind in getattr(modeling_auto, name).items():
            found.setdefault(model_type, kind if isinstance(kind, str) else kind[0])
    return dict(sorted(found.items()))


def known_of(model_type: str, kind: str) -> Known:
    """What the class of a model type says of its matrices."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers.core_model_loading import (  # pyright: ignore[reportMissingImports]
        revert_weight_conversion,
    )

    config = transformers.AutoConfig.for_model(model_type)
    _cut(config)
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    heads = model.get_output_embeddings()
    matrices = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        owners = list(_owners(model, name))
        role = "head" if owners[-1] is heads else _role(owners, parameter.dim())
        try:
            stored = revert_weight_conversion(model, {name: parameter.data})
        except Exception:  # a conversion that takes several parameters at once
            stored = {name: parameter.data}
        for path, x in stored.items():
            matrices[path] = Stored(role, tuple(x.shape), _is_of_layers(owners, path))
    described = json.loads(config.to_json_string(use_diff=False))
    return Known(described | {"architectures": [kind]}, matrices)


def _cut(config: Any) -> None:
    """Leaves a config, and those inside it, few layers, of every kind where there are several."""
    for key, value in list(vars(config).items()):
        if (
            re.fullmatch(r"n(um)?_.*layers?|n_layer|\w+coder_layers|depth|vision_layers", key)
            and type(value) is int
        ):
            with contextlib.suppress(Exception):  # a property of other numbers
                setattr(config, key, min(value, _LAYERS))
        if key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, key, (list(dict.fromkeys(value)) * _LAYERS)[:_LAYERS])
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _cut(value)


def _owners(model: Any, name: str) -> Iterator[Any]:
    """The modules from the model down to the one that holds a parameter."""
    yield model
    for part in name.split(".")[:-1]:
        model = getattr(model, part)
        yield model


def _role(owners: list[Any], ndim: int) -> str:
    """What a parameter is, by the classes of the modules that hold it, the model first."""
    from torch import nn  # pyright: ignore[reportMissingImports]
    from transformers.pytorch_utils import Conv1D  # pyright: ignore[reportMissingImports]

    holder, names = owners[-1], [type(owner).__name__ for owner in owners]
    if isinstance(holder, nn.Embedding) or "Embedding" in names[-1]:
        return "embedding"
    if re.match(r"Conv(Transpose)?\dd", names[-1]):
        return "convolution"
    if isinstance(holder, Conv1D):
        return TURNED
    if names[-1].endswith("Norm"):
        return "norm"
    if any(re.search(r"Router|TopK|MoEGate", n) for n in names[1:]):
        return "router"
    if isinstance(holder, nn.Linear) or re.search(r"Linear", names[-1]):
        return "linear"
    return "experts" if "Expert" in names[-1] and ndim == 3 else f"parameter of {names[-1]}"


def _is_of_layers(owners: list[Any], path: str) -> bool:
    inside = [type(owner).__name__ for owner in owners[1:]]
    layers = any(re.search(r"(Layer|Block)$", name) for name in inside)
    special = any(re.search(r"(Norm|Head|Embed\w*)$", name) for name in inside)
    parents = path.split(".")[:-2]
    return layers and not special and not any(re.search(r"heads?$", part) for part in parents)


def decided(known: Known) -> dict[str, str]:
    """Why the command keeps each matrix; "" for one that it quantizes."""
    with tempfile.TemporaryDirectory() as temporary:
        tensors = {name: TensorSpec("BF16", stored.shape) for name, stored in known.matrices.items()}
        folder = open_folder(make(Path(temporary) / "model", Model(tensors, known.config), None))
        try:
            kept = kept_of(folder, LAYOUTS["fp8-channel"], 1, ALL)
        finally:
            folder.close()
    return {name: kept.get(name, "") for name in known.matrices}


def of_no_known_type(known: Known) -> Known:
    """The same model under a type of which the command knows nothing."""
    inner = architectures.part_of(known.config, "text_config")
    hidden = {"model_type": "", "text_config": {**inner, "model_type": ""}}
    matrices = {n: x for n, x in known.matrices.items() if x.role != TURNED}
    return Known({**known.config, **hidden}, matrices)


def misjudged(known: Known) -> dict[str, str]:
    """Of the matrices that the command takes for what they are not: pattern of the name, and what it is."""
    found = {}
    for name, why in decided(known).items():
        stored = known.matrices[name]
        is_layer = stored.role in architectures.LINEAR
        wide = min(stored.shape) >= _SMALLEST
        if (not why and not is_layer) or (why == BY_NAME and is_layer and stored.of_layers and wide):
            found[architectures.pattern_of(name)] = stored.role
    return found


def are_turned(known: Known) -> bool:
    """Whether stacks of experts are stored [experts, in, out]: the first product takes the model's width."""
    width = {
        known.config.get("hidden_size"),
        architectures.part_of(known.config, "text_config").get("hidden_size"),
    }
    first = [
        x.shape
        for name, x in known.matrices.items()
        if x.role == "experts" and len(x.shape) == 3 and re.search(r"gate_up_proj|experts\.(fc|w)1", name)
    ]
    return bool(first) and all(s[1] in width and s[2] not in width for s in first)


def study(*, quick: bool = False, out: Path | None = None) -> int:
    """Holds the classes of every model type against names and sizes. Exit status 1 if the table is stale.

    Args:
        quick: six types, and nothing is written to the package.
        out: folder for the results.
    """
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: dict[str, Known] = {}
    failed: dict[str, str] = {}
    chosen = {t: kind for t, kind in kinds().items() if not quick or t in SAMPLE}
    for model_type, kind in chosen.items():
        try:
            found[model_type] = known_of(model_type, kind)
        except Exception as error:  # of a config whose defaults do not fit one another, or a missing library
            failed[model_type] = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    entries = {t: e for t, known in found.items() if (e := misjudged(of_no_known_type(known)))}
    version = importlib.metadata.version("transformers")
    made = _with_older(
        {
            "transformers": version,
            "turned_experts": [t for t, known in found.items() if are_turned(known)],
            "turned_layers": [t for t, known in found.items() if _has(known, TURNED)],
            "roles": entries,
        },
        {*found},
    )
    if not quick:
        PACKAGED.write_text(json.dumps(made, indent=1) + "\n")
        architectures.known_types.cache_clear()
    left = {t: e for t, known in found.items() if (e := misjudged(known))}
    report: dict[str, Any] = environment()
    report["versions"] |= {"transformers": version}
    report |= {"types": {t: _counts(known) for t, known in found.items()}, "not_built": failed}
    report |= {"by_name_alone": entries, "misjudged": left}
    write(results(out, quick) / "layers.json", report, _page(report, made))
    print(f"{len(found)} types, {len(failed)} not built, {len(entries)} with entries, misjudged: {left}")
    return int(bool(left))


def _has(known: Known, role: str) -> bool:
    return any(x.role == role for x in known.matrices.values())


def _with_older(made: dict[str, Any], found: set[str]) -> dict[str, Any]:
    """A table with what the one of the package has of types that were not built this time."""
    older = architectures.known_types()
    for key in ("turned_experts", "turned_layers"):
        made[key] = sorted({*made[key], *(t for t in older[key] if t not in found)})
    made["roles"] = {t: e for t, e in older["roles"].items() if t not in found} | made["roles"]
    return made


def _counts(known: Known) -> dict[str, int]:
    why = decided(known)
    quantized = sum(not reason for reason in why.values())
    return {"matrices": len(why), "quantized": quantized}


def _page(report: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    rows = [
        [t, f"`{pattern}`", role]
        for t, entries in report["by_name_alone"].items()
        for pattern, role in entries.items()
    ]
    matrices = sum(x["matrices"] for x in report["types"].values())
    parts = [
        "# Linear layers by the model classes of transformers",
        f"{len(report['types'])} model types of transformers {made['transformers']}, {matrices:,} matrices; "
        f"{len(rows)} names mislead, of {len(report['by_name_alone'])} types. With the table of the package "
        f"{sum(map(len, report['misjudged'].values()))} are misjudged.",
        table(["model type", "name", "what it is"], rows),
        "Experts stored [experts, in, out]: " + ", ".join(made["turned_experts"]) + ".",
        "Linear layers stored [in, out]: " + ", ".join(made["turned_layers"]) + ".",
        "Not built, because the defaults of their config do not fit one another or need another library: "
        + ", ".join(report["not_built"])
        + ".",
        provenance(report),
    ]
    return "\n\n".join(parts) + "\n"


COMMANDS = {"layers": study}
