"""Parts of the first axis in which weights are read, one after another, so that memory stays bounded."""

import math

from daq_jax.io.folders import Tensor
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
