"""Gram matrices of layer inputs: all that is kept of the calibration data.

The mean square of a layer's output error depends on the data through these matrices alone; see `groups`.
`calibration` makes them, `quantize_density` uses them.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.export

from daq_jax.tilings import TileView


class KernelInputs(NamedTuple):
    """How a model contracts its inputs with a kernel.

    Attributes:
        path: path of the kernel in the tree of params.
        axes: axes of the kernel that are contracted, in rising order.
        size: R, number of inputs: the product of the lengths of these axes.
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
    """Gram matrices of each layer: the mean of `x x'` over the calibration data, with `x` the layer's inputs.

    Attributes:
        products: float32 arrays by path of the kernel: `[ceil(R / n), n, n]`, one matrix for each
            group of `n` of the `R` inputs, the last one filled up with zeros; or `[R, R]` if `joint`.
        inputs: how the model contracts its inputs with each of these kernels.
        group: n, inputs of a group; None for one group of all inputs.
        joint: whether a matrix is of all inputs of its layer, which serves every size of group.
    """

    products: Mapping[str, Any]  # arrays; what stands for one (a shape, a sharding) in a mapped tree
    inputs: tuple[KernelInputs, ...]
    group: int | None = None
    joint: bool = False

    def problem(self, path: str, view: TileView, group: int | None, *, row: bool) -> str | None:
        """Why these matrices cannot serve a kernel, as a clause; None if they can.

        Args:
            path: path of the kernel.
            view: how the kernel is cut into groups.
            group: inputs of a group, as in the recipe; None for all inputs.
            row: whether the loss is of the whole output, as with `DensityRecipe(loss="row")`.
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


def _to_bytes(fields: tuple[Any, ...]) -> bytes:
    """The static fields of a Grams, as a pytree has them, for `jax.export`."""
    return json.dumps(fields).encode()


def _from_bytes(data: bytes | bytearray) -> tuple[Any, ...]:
    inputs, group, joint = json.loads(bytes(data))
    return tuple(KernelInputs(path, tuple(axes), size) for path, axes, size in inputs), group, joint


jax.export.register_pytree_node_serialization(
    Grams, serialized_name="daq_jax.Grams", serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
)
