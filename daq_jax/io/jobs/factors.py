"""The factor that all scales of a weight share in NVFP4, found before any weight is quantized.

Servers multiply some weights as one, such as those of queries, keys and values, and use one factor for all of
them. So it is decided for each such set, from the largest weights of the tuned model: they are read for it.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

from daq_jax.io.hf.bands import MOST_ELEMENTS, bands
from daq_jax.io.hf.folders import Folder
from daq_jax.io.hf.layouts import Layout
from daq_jax.io.hf.weight_names import fused_with
from daq_jax.qtensor import QTensor

_LARGEST = 448.0  # of FP8 (e4m3), in which scales are stored over the factor


def shared_factors(base: Folder, tuned: Folder, layout: Layout, names: Sequence[str]) -> dict[str, float]:
    """The factor of each weight, one for all weights that servers fuse.

    A base that is stored with such factors keeps them, where the tuned weights fit. Other factors are powers
    of two, for which the largest scale is stored as a number from 112 to 224: a base may need one that is
    larger than those of its fine-tune, and a scale loses precision only 2^14 below that.

    Args:
        base: folder before tuning.
        tuned: folder after tuning.
        layout: how the result is stored.
        names: the weights that are quantized.

    Returns:
        By name what is stored: the factor, or its inverse if the layout divides.
    """
    sets: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        sets[fused_with(name)].append(name)
    found = {}
    for members in sets.values():
        largest = max(_largest(tuned, name) for name in members) / layout.format.largest
        stored = {_stored(base, name, layout.divides) for name in members}
        factor = stored.pop() if len(stored) == 1 else None
        if factor is None or not _fits(largest, 1 / factor if layout.divides else factor):
            power = math.ceil(math.log2(largest / (_LARGEST / 2))) if 0 < largest < math.inf else 0
            factor = 2.0 ** (-power if layout.divides else power)
        found |= dict.fromkeys(members, factor)
    return found


def _fits(largest: float, factor: float) -> bool:
    """Whether the largest scale can be stored, and does not use the last bits alone."""
    return largest <= _LARGEST * factor and largest >= factor / _LARGEST


def _stored(folder: Folder, name: str, divides: bool) -> float | None:
    """The factor of a weight of the base, if its scales have one of the same kind."""
    tensor = folder.tensors.get(name)
    if tensor is None or tensor.coding is None:
        return None
    return tensor.coding.storage.factor_if(divides)


def _largest(folder: Folder, name: str) -> float:
    """The largest magnitude of a weight; infinity where it is not finite."""
    tensor = folder.tensors[name]
    largest = 0.0
    for rows in bands(tensor.shape, tensor.band_step, most=MOST_ELEMENTS):
        band = folder.read(name, rows)
        values = np.asarray(band.dequantize(np.float32) if isinstance(band, QTensor) else band)
        size = float(np.abs(values).max()) if values.size else 0.0
        largest = max(largest, size if math.isfinite(size) else math.inf)
    return largest
