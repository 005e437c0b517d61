"""`compare` for checkpoint folders, in bounded memory: two models and a quantized one, whoever wrote it."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from daq_jax.analysis.comparison import Comparison, compare_leaf
from daq_jax.analysis.figures import Figures, pool
from daq_jax.analysis.histograms import Details, details_of
from daq_jax.analysis.names import printable
from daq_jax.analysis.relation import Patch, as_patch, chosen, doubt_of
from daq_jax.errors import DaqError, refuse
from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.bands import MOST_ELEMENTS, bands
from daq_jax.io.hf.folders import Folder, Tensor, open_safetensors
from daq_jax.io.hf.paired_names import paired
from daq_jax.io.hf.tensor_files import read_json
from daq_jax.io.jobs.journal import REPORT
from daq_jax.io.jobs.leftovers import refuse_unread
from daq_jax.io.jobs.progress import Tell
from daq_jax.qtensor import QTensor

_ROWS = 128  # of a weight, from which a doubt is told


def compare_folders(
    base: str | Path,
    tuned: str | Path,
    quantized: str | Path,
    *,
    details: bool = False,
    tell: Callable[[int], Tell] | None = None,
) -> Comparison:
    """Compares a quantized checkpoint folder with the change that tuning made.

    All figures come from the stored codes. Reads what `quantize_folder` writes, and what others do in the
    layouts of `daq_jax.io.hf.recognition`: 8 bits, packed integers, and 4-bit floats.

    Args:
        base: folder before tuning.
        tuned: folder after tuning, or a LoRA adapter of `base`.
        quantized: folder of the quantized model. Its weights have the names of those of the tuned model, or
            other ones as transformers renames them.
        details: also collect what pictures need, of all weights together: under the path "".
        tell: of the number of bytes to come, makes what is told of progress.

    Raises:
        DaqError: in one sentence: what a folder has wrong, no quantized weight, or weights that the other
            folders lack.
    """
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(contextlib.closing(open_safetensors(base)))
        after = stack.enter_context(contextlib.closing(open_tuned(tuned, before)))
        result = stack.enter_context(contextlib.closing(open_safetensors(quantized)))
        before, after = (paired(folder, result)[0] for folder in (before, after))
        return compare_opened(before, after, result, details=details, tell=tell)


def compare_opened(
    base: Folder,
    tuned: Folder,
    quantized: Folder,
    *,
    details: bool = False,
    tell: Callable[[int], Tell] | None = None,
    most: int = MOST_ELEMENTS,
) -> Comparison:
    """As `compare_folders`, of folders that are open; bands have at most `most` elements."""
    folders = base, tuned, quantized
    names = _names(*folders)
    for folder in folders:
        refuse_unread(folder)
    progress = tell(sum(quantized.tensors[name].nbytes for name in names)) if tell else None
    leaves: dict[str, Figures] = {}
    closer: Details | None = None
    for name in names:
        leaves[name], found = _leaf(name, folders, details, progress, most)
        closer = found if closer is None or found is None else closer + found
    doubt = doubt_of(patches_of_folders(base, tuned, names))
    return Comparison(leaves, pool(leaves.values()), {} if closer is None else {"": closer}, doubt)


def facts_of_folders(base: str | Path, tuned: str | Path, quantized: str | Path) -> dict[str, str]:
    """What is compared, in words by name; recipe, command and date are those of the report in `quantized`."""
    words = {"base": str(base), "tuned": str(tuned), "quantized": str(quantized)}
    with contextlib.suppress(DaqError):  # no report
        origin = read_json(Path(quantized, REPORT), "the report").get("origin")
        origin = origin if isinstance(origin, dict) else {}  # not one of ours
        words |= {name: str(origin[name]) for name in ("recipe", "command", "date") if name in origin}
    return {name: printable(word) for name, word in words.items()}


def patches_of_folders(base: Folder, tuned: Folder, names: Iterable[str]) -> Iterator[tuple[Patch, Patch]]:
    """The first rows of a few weights that both folders hold in one shape; none of an adapter.

    An adapter names its base and is no model of its own, and a plan reads none of its weights.
    """
    if tuned.overlay is not None:
        return
    both = [name for name in names if name in base.tensors and name in tuned.tensors]
    for name in chosen(name for name in both if base.tensors[name].shape == tuned.tensors[name].shape):
        step = math.lcm(base.tensors[name].band_step, tuned.tensors[name].band_step)
        first, *others = base.tensors[name].shape
        rows = 1 if len(others) > 1 else min(first, -(-_ROWS // step) * step)
        yield as_patch(base.read(name, slice(rows))), as_patch(tuned.read(name, slice(rows)))


def _names(base: Folder, tuned: Folder, quantized: Folder) -> list[str]:
    """Quantized weights, all of which have partners."""
    names = [name for name, tensor in quantized.tensors.items() if tensor.coding]
    if not names:
        packed = any(name.endswith("weight_packed") for name in quantized.tensors)
        why = "its weights are packed in another way" if packed else "no weight has a scale beside it"
        raise DaqError(
            f"{quantized.path}: holds no quantized weight: {why}; needed 8 bits, packed integers or "
            "4-bit floats."
        )
    problems = [
        f"{name!r} {why}"
        for name in names
        for folder in (base, tuned)
        if (why := _problem(folder, quantized.tensors[name]))
    ]
    if problems:
        refuse(f"{quantized.path}: the three folders do not fit", problems, one_line=True)
    return names


def _problem(folder: Folder, tensor: Tensor) -> str:
    partner = folder.tensors.get(tensor.name)
    if partner is None:
        return f"is not in {folder.path}"
    if partner.shape != tensor.shape:
        return f"is {tensor.shape} but {partner.shape} in {folder.path}"
    if partner.coding is None and partner.spec.dtype not in ("BF16", "F16", "F32"):
        return f"is {partner.spec.dtype} without a scale in {folder.path}"
    return ""


def _leaf(
    name: str, folders: tuple[Folder, Folder, Folder], details: bool, tell: Tell | None, most: int
) -> tuple[Figures, Details | None]:
    """Figures of one weight, band by band."""
    base, tuned, quantized = folders
    figures: Figures | None = None
    found: Details | None = None
    tensors = [folder.tensors[name] for folder in folders]
    own = None if tensors[1].coding else tensors[1].dtype
    dtype = own or tuned.working_dtype or tuned.dtype  # what a quantized base stands for
    shape, step = tensors[2].shape, math.lcm(*(tensor.band_step for tensor in tensors))
    for band in bands(shape, step, most=most):
        old, new, q = (folder.read(name, band, dtype) for folder in (base, tuned, quantized))
        assert isinstance(q, QTensor)
        here = compare_leaf(old, new, q)
        figures = here if figures is None else pool([figures, here])
        if details:
            closer = details_of(old, new, q)
            found = closer if found is None else found + closer
        if tell:
            tell(name, int(tensors[2].nbytes * (band.stop - band.start) / shape[0]), figures)
    return pool([]) if figures is None else figures, found
