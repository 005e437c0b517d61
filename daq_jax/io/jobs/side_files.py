"""Files beside the weights of a tuned model: which of them come along into a result, and why others do not.

Every file of the tuned model that is not hidden is accounted for: it holds the weights that are read, is
copied, is written anew for the result, or is left out for a reason that plan and report give.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from daq_jax.io.disk.links import stays_inside
from daq_jax.io.hf.folders import ADAPTER, Folder
from daq_jax.io.hf.methods import QUANTIZATION_FILE

LINKED = "is a link that leads out of its folder"
CARD = "README.md"
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
_CODE = ".py"
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)
# Files of a tokenizer that a tune may have changed; an adapter's own config must not come into a model.
_OF_TOKENIZER = ("added_tokens", "chat_template", "merges", "special_tokens", "tokenizer", "vocab")
_OF_ADAPTER = re.compile(r"adapter_.*")
# What tells a loader of codes as other quantizers store them.
_OF_QUANTIZERS = re.compile(
    r"quanto_qmap\.json|(.*[_.-])?quant(ize|ization)?[_.-].*\.json|smash_config\.json"
)
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz")


class SideFiles(NamedTuple):
    """Files beside the weights of a tuned model: tokenizer, chat template, other configs, terms of use.

    Attributes:
        copied: folder that each file is copied from, by the path of the file relative to both folders.
        left_out: why each other file is not in the result, by its path relative to the folder it is in.
        card: model card of the tuned model, whose text goes into that of the result; None if it has none.
    """

    copied: dict[Path, Path]
    left_out: dict[str, str]
    card: Path | None


def side_files(tuned: Folder, custom_code: bool, written: Iterable[str]) -> SideFiles:
    """Side files of a tuned model, one level deep; an overlay's files of the tokenizer stand in for its own.

    Args:
        tuned: folder of the tuned model.
        custom_code: whether Python files are among the files that are copied.
        written: names of the files that are written anew for the result.
    """
    read = {*written, *(p.name for p in tuned.files if p.parent in (tuned.path, tuned.overlay))}
    copied: dict[Path, Path] = {}
    left_out: dict[str, str] = {}
    modules = _modules_of(tuned.path)
    folders = [tuned.path] if tuned.overlay is None else [tuned.path, tuned.overlay]
    for folder in folders:
        for path in _beside(folder):
            above = folder != tuned.path and not path.name.startswith(_OF_TOKENIZER)
            if str(path) in read or (above and path in copied):
                continue
            of_module = path.suffix == ".safetensors" and str(path.parent) in modules
            if not of_module and (
                why := _why_left_out(path, custom_code) or ("of the adapter" if above else "")
            ):
                left_out.setdefault(str(path), why)
            elif not stays_inside(folder / path, folder):
                left_out[str(path)] = LINKED
            else:
                copied[path] = folder
    return SideFiles(copied, left_out, _card_of(folders))


def _modules_of(folder: Path) -> set[str]:
    """Folders of modules with weights of their own, by the `modules.json` of sentence-transformers."""
    path = folder / "modules.json"
    if not (path.is_file() and stays_inside(path, folder)):
        return set()
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return set()
    modules = [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []
    return {x["path"] for x in modules if isinstance(x.get("path"), str) and x["path"] not in ("", ".")}


def _card_of(folders: Sequence[Path]) -> Path | None:
    """The model card of the topmost folder that has one."""
    found = [f / CARD for f in reversed(folders) if (f / CARD).is_file() and stays_inside(f / CARD, f)]
    return next(iter(found), None)


def _beside(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones, one level deep, by their path relative to it, sorted."""
    found = [*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")]
    return sorted(p.relative_to(folder) for p in found if p.is_file())


def _why_left_out(path: Path, custom_code: bool) -> str:
    """Why a file is not copied, by its name; "" if it is."""
    name = path.name
    if name == ADAPTER or _OF_ADAPTER.fullmatch(name):
        return "of an adapter, which loaders would look for"
    if name == QUANTIZATION_FILE or _OF_QUANTIZERS.fullmatch(name):
        return "says how another quantizer stores weights"
    if name.endswith(_INDEXES):
        return "an index of other files"
    if path.suffix in _WEIGHTS and path.parent.name:
        return "weights of another model or module, in a folder inside: copy them if a loader needs them"
    if path.suffix in _WEIGHTS:
        return "weights, which the result has its own of"
    if path.suffix == _CODE:
        return "" if custom_code else "code of the model: --custom-code copies it"
    if path.suffix in _SUFFIXES or _TERMS.fullmatch(name):
        return ""
    return "no file that a loader of the weights reads"
