"""Gram matrices of layer inputs: all that calibration data has to say about the error of an output.

`calibration` makes them, `quantize_density` uses them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array

from daq_jax.tilings import TileView


class KernelInputs(NamedTuple):
    """What a model multiplies a kernel with.

    Attributes:
        path: of the kernel.
        axes: of the kernel that are contracted, in rising order.
        size: R, how many inputs that makes.
    """

    path: str
    axes: tuple[int, ...]
    size: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["products"],
    meta_fields=["inputs", "group", "joint"],
)
@dataclasses.dataclass(frozen=True)
class Grams:
    """Mean of `x x'` over the calibration data, `x` the inputs of a layer, for each layer.

    Attributes:
        products: float32 arrays by path of the kernel: `[ceil(R / n), n, n]`, one for each group of `n`
            inputs, filled up with zeros; `[R, R]` if `joint`.
        inputs: of each of these kernels.
        group: n; None for one group of all inputs.
        joint: whether each is of all inputs together, which serves every size of group.
    """

    products: Mapping[str, Array]
    inputs: tuple[KernelInputs, ...]
    group: int | None = None
    joint: bool = False

    def problem(self, path: str, view: TileView, group: int | None, *, row: bool) -> str | None:
        """Why these cannot serve a kernel, or None if they can.

        Args:
            path: of the kernel.
            view: how it is cut into groups.
            group: inputs of a group, as the recipe has it.
            row: whether the loss is of the whole row.
        """
        known = {kernel.path: kernel for kernel in self.inputs}
        if path not in known:
            return "there is no Gram matrix of its inputs: the calibrated model multiplied nothing with it"
        if row and not self.joint:
            return "a loss over the whole row needs Gram matrices from calibrate(..., joint=True)"
        if not self.joint and self.group != group:
            return f"its Gram matrices are of groups of {self.group} but the recipe has groups of {group}"
        _, axes, size = known[path]
        if (axes, size) != (view.axes[1], view.rows):
            return (
                f"the model contracts its axes {axes}, {size} inputs, but its matrix view has {view.rows} on "
                f"axes {view.axes[1]}: say which they are with use(pattern, matrix=(input axes, output axes))"
            )
        return None
