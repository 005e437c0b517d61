"""Parts of the first axis in which weights are read, one after another, so that memory stays bounded."""

import math
from pathlib import Path

from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import Folder, Tensor, is_orbax, open_folder
from daq_jax.tilings import Block, PerTensor


def band_step(*tensors: Tensor) -> int:
    """At multiples of how many rows all of these tensors may be parted without cutting through a tile."""
    step = 1
    for tensor in tensors:
        tiling = tensor.coding.tiling if tensor.coding and len(tensor.shape) == 2 else None
        if isinstance(tiling, Block):
            step = math.lcm(step, tiling.c)
        elif isinstance(tiling, PerTensor):
            step = math.lcm(step, max(tensor.shape[0], 1))
    return step


def band_around(first: int, last: int, step: int, length: int) -> slice:
    """The smallest band of whole steps that holds rows `first` to `last`, the last not among them."""
    return slice(first // step * step, min(-(-last // step) * step, length))


def bands(*tensors: Tensor, most: int) -> list[slice]:
    """Bands that cover tensors of one shape, each of at most `most` elements if a step is no larger."""
    length, *rest = tensors[0].shape
    step = band_step(*tensors)
    rows = max(step, most // max(math.prod(rest), 1) // step * step)
    return [slice(i, min(i + rows, length)) for i in range(0, length, rows)]


def open_for_bands(path: str | Path) -> Folder:
    """Opens a folder whose weights can be read in bands.

    Raises:
        DaqError: as `open_folder`, and for an Orbax checkpoint.
    """
    if is_orbax(Path(path)):
        raise DaqError(
            f"{path}: an Orbax checkpoint, which this does not read; load it by `daq_jax.load_weights`, a "
            "quantized one by `daq_jax.load`, and call `daq_jax.inspect` or `daq_jax.compare` on the trees."
        )
    return open_folder(path)
