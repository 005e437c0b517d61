"""Gram matrices of layer inputs: all that calibration data has to say about the error of an output.

`calibration` makes them, `quantize_density` uses them.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array

from daq_jax.tilings import TileView


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["products"],
    meta_fields=["tokens", "group", "joint"],
)
@dataclasses.dataclass(frozen=True)
class Grams:
    """Mean of `x x'` over the calibration data, `x` the inputs of a layer, for each layer.

    Attributes:
        products: float32 arrays by path of the kernel: `[ceil(R / n), n, n]`, one for each group of `n`
            inputs, filled up with zeros; `[R, R]` if `joint`.
        tokens: number of input vectors that the mean is over.
        group: n; None for one group of all inputs.
        joint: whether each is of all inputs together, which serves every size of group.
    """

    products: Mapping[str, Array]
    tokens: int
    group: int | None
    joint: bool

    def problem(self, path: str, view: TileView, group: int | None, row: bool) -> str | None:
        """Why these cannot serve a kernel, or None if they can.

        Args:
            path: of the kernel.
            view: its tiles; those of a group.
            group: inputs of a group, as the recipe has it.
            row: whether the loss is of the whole row.
        """
        if path not in self.products:
            return "no Gram matrix of its inputs: the calibrated model did not use it as a linear kernel"
        if row and not self.joint:
            return "a loss over the whole row needs Gram matrices from calibrate(..., joint=True)"
        if not self.joint and self.group != group:
            return f"its Gram matrices are of groups of {self.group} but the recipe has groups of {group}"
        n, count = view.tile[0], view.grid[-2]
        wanted = (view.rows, view.rows) if self.joint else (count, n, n)
        shape = tuple(self.products[path].shape)
        return None if shape == wanted else f"its Gram matrix is {shape} but needs to be {wanted}"
