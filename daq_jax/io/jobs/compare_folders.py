"""`compare` for checkpoint folders, in bounded memory: two models and a quantized one, whoever wrote it."""

from collections.abc import Callable
from pathlib import Path

from daq_jax.analysis.comparison import Comparison, compare_leaf
from daq_jax.analysis.figures import Figures, pool
from daq_jax.analysis.histograms import Details, details_of
from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import Folder, Tensor
from daq_jax.io.hf.row_bands import bands, open_for_bands
from daq_jax.qtensor import QTensor

_AT_A_TIME = 2**22  # elements: some 200 MB while they are compared
_SHOWN = 8  # problems listed in full

Tell = Callable[[str, int, Figures | None], None]  # (tensor, bytes of codes done, its figures so far)


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
    formats of transformers (`fp8`) and of compressed-tensors: 8 bits by channel, block or tensor, and packed
    int4.

    Args:
        base: folder before tuning.
        tuned: folder after tuning.
        quantized: folder of the quantized model. Its weights bear the names of the tuned model's.
        details: also collect what pictures need, of all weights together: under the path "".
        tell: of the number of bytes to come, makes what is told of progress.

    Raises:
        DaqError: in one sentence: what a folder has wrong, no quantized weight, or weights that the other
            folders lack.
    """
    folders: list[Folder] = []
    try:
        for path in (base, tuned, quantized):
            folders.append(open_for_bands(path))
        names = _names(*folders)
        progress = tell(sum(folders[2].tensors[name].nbytes for name in names)) if tell else None
        leaves: dict[str, Figures] = {}
        closer: Details | None = None
        for name in names:
            leaves[name], found = _leaf(name, folders, details, progress)
            closer = found if closer is None or found is None else closer + found
        return Comparison(leaves, pool(leaves.values()), {} if closer is None else {"": closer})
    finally:
        for folder in folders:
            folder.close()


def _names(base: Folder, tuned: Folder, quantized: Folder) -> list[str]:
    """Quantized weights, all of which have partners."""
    names = [name for name, tensor in quantized.tensors.items() if tensor.coding]
    if not names:
        packed = any(name.endswith("weight_packed") for name in quantized.tensors)
        why = "its weights are packed in another way" if packed else "no weight has a scale beside it"
        raise DaqError(
            f"{quantized.path}: holds no quantized weight: {why}; needed FP8, int8 or packed int4."
        )
    problems = [
        f"{name!r} {why}"
        for name in names
        for folder in (base, tuned)
        if (why := _problem(folder, quantized.tensors[name]))
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DaqError(
            f"{quantized.path}: the three folders do not fit: {'; '.join(problems[:_SHOWN])}{more}."
        )
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
    name: str, folders: list[Folder], details: bool, tell: Tell | None
) -> tuple[Figures, Details | None]:
    """Figures of one weight, band by band."""
    base, tuned, quantized = folders
    dtype = tuned.dtype  # what an FP8 base stands for
    figures: Figures | None = None
    found: Details | None = None
    tensors = [folder.tensors[name] for folder in folders]
    for part in bands(*tensors, most=_AT_A_TIME):
        old, new, q = (folder.read(name, part, dtype) for folder in (base, tuned, quantized))
        assert isinstance(q, QTensor)
        here = compare_leaf(old, new, q)
        figures = here if figures is None else pool([figures, here])
        if details:
            closer = details_of(old, new, q)
            found = closer if found is None else found + closer
        if tell:
            share = (part.stop - part.start) / tensors[2].shape[0]
            tell(name, int(tensors[2].nbytes * share), figures)
    return pool([]) if figures is None else figures, found
