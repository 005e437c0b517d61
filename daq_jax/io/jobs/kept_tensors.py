"""Whether a quantized folder holds all that the tuned model holds, beside the weights that are quantized."""

import contextlib
from pathlib import Path

import numpy as np

from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.bands import MOST_ELEMENTS, bands
from daq_jax.io.hf.folders import Folder, open_safetensors
from daq_jax.io.hf.paired_names import paired
from daq_jax.io.jobs.leftovers import FLOATS, dropped_of, same_bytes
from daq_jax.qtensor import QTensor


def faults_of_folder(base: str | Path, tuned: str | Path, quantized: str | Path) -> list[str]:
    """Tensors of the tuned model that a quantized one lacks, or altered though it did not quantize them.

    Figures of quantized weights say nothing of the others: a norm that is missing or zero ruins the model. A
    tensor that is stored in a narrower dtype than in the tuned model may be rounded to it. What loaders do
    not read, such as a tied head that is stored twice, may be missing.

    Args:
        base: folder before tuning.
        tuned: folder after tuning, or a LoRA adapter of `base`.
        quantized: folder of the quantized model, with the names of the tuned one, or other ones as
            transformers renames them.

    Returns:
        One phrase for each, beginning with the name.

    Raises:
        DaqError: in one sentence, what a folder has wrong.
    """
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(contextlib.closing(open_safetensors(base)))
        after = stack.enter_context(contextlib.closing(open_tuned(tuned, before)))
        result = stack.enter_context(contextlib.closing(open_safetensors(quantized)))
        after, _ = paired(after, result)
        spared = dropped_of(after)
        found = ((name, _fault(name, after, result)) for name in after.tensors if name not in spared)
        return [f"{name!r} {why}" for name, why in found if why]


def _fault(name: str, tuned: Folder, quantized: Folder) -> str:
    """What is wrong with a tensor of the quantized model; "" for nothing."""
    wanted, found = tuned.tensors[name], quantized.tensors.get(name)
    if found is None:
        return "is missing"
    if found.shape != wanted.shape:
        return f"is {found.shape} in place of {wanted.shape}"
    if found.coding is not None:
        return ""  # its figures tell
    if wanted.coding is None and same_bytes(tuned, name, quantized, name):
        return ""
    if found.spec.dtype not in FLOATS:  # no number may be rounded to a code that has no scale
        return f"is altered, as {found.spec.dtype} without a scale"
    where = bands(wanted.shape, wanted.band_step, most=MOST_ELEMENTS) if wanted.shape else [slice(None)]
    share = max((_altered(tuned, quantized, name, band) for band in where), default=0.0)
    return f"is altered, in up to {100 * share:.2g} % of the elements of a part of it" if share else ""


def _altered(tuned: Folder, quantized: Folder, name: str, band: slice) -> float:
    """Share of the elements of a band that are not those of the tuned model."""
    wanted, found = tuned.read(name, band), np.asarray(quantized.read(name, band))
    wanted = np.asarray(wanted.dequantize(np.float32) if isinstance(wanted, QTensor) else wanted)
    rounded = wanted.astype(found.dtype)
    same = (rounded == found) | ((rounded != rounded) & (found != found))  # NaN is like NaN
    return 1 - float(same.mean()) if same.size else 0.0
