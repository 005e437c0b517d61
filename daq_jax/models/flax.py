"""Flax models on quantized weights, without a change to their code.

Codes and scales stay in device memory. Where a model reads a weight, the weight is decoded and the model gets
an array. Call such models inside `jax.jit` or `nnx.jit`: there the array exists only between the read and its
use. Outside of `jit`, every read decodes the weight again.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from daq_jax.errors import DaqError, refuse
from daq_jax.qtensor import QTensor
from daq_jax.records import QTENSOR_ARRAYS, qtensor_of, static_record
from daq_jax.tilings import Matrix
from daq_jax.trees import PyTree, aligned, is_box, is_qtensor, named_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InPlace(nn.meta.AxisMetadata):
    """A QTensor in the form of a Flax box, which Flax opens where a model reads the weight.

    `nn.scan`, `nnx.scan` and `vmap` slice all arrays of a box along one axis, that of the layers or experts,
    and may move this axis to the front before. So every array has the rank of the weight, with length 1 along
    axes where a scale does not vary. A slice of the box is then the box of one layer's weight.

    Attributes:
        codes: codes of the QTensor, moved or sliced along batch axes.
        spread: the other arrays of the QTensor by name, "scale" and maybe "zero", in the rank of the weight.
        axes: an array without elements, of the length of `codes` along batch axes and of length 0 along
            others. It is moved and sliced with `codes`, and so tells which axes these are now.
        static: the QTensor without arrays.
        roles: role of each axis that is no batch axis, in their order: "r" or "c" for an input or output
            axis, followed by its position among the input or output axes.
    """

    codes: Any
    spread: dict[str, Any]
    axes: Any
    static: QTensor = dataclasses.field(metadata={"static": True})
    roles: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, q: QTensor) -> "InPlace":
        """The box that holds a QTensor."""
        batch, rows, columns = q.view.axes
        roles = {
            a: f"{letter}{i}"
            for letter, axes in zip("rc", (rows, columns), strict=True)
            for i, a in enumerate(axes)
        }
        lengths = {axis: q.shape[axis] for axis in batch}
        lengths |= {rows[0]: q.view.grid[-2], columns[0]: q.view.grid[-1]}
        order = (*batch, rows[0], columns[0])

        def spread(x: Array) -> Array:
            x = x.transpose(sorted(range(len(order)), key=order.__getitem__))
            return jnp.expand_dims(x, [a for a in range(q.ndim) if a not in lengths])

        fields = {f.name: getattr(q, f.name) for f in dataclasses.fields(q) if not f.metadata.get("static")}
        spreads = {k: spread(x) for k, x in fields.items() if k != "codes" and x is not None}
        axes = jnp.zeros([0 if a in roles else n for a, n in enumerate(q.shape)], jnp.int8)
        static = dataclasses.replace(q, **dict.fromkeys(fields))
        return cls(q.codes, spreads, axes, static, tuple(roles[a] for a in sorted(roles)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the weight when it is read."""
        return self.static.dtype

    def qtensor(self) -> QTensor:
        """The QTensor in the box, or in what a moved or sliced box holds."""
        rows, columns = matrix = self._matrix()
        batch = [a for a in range(self.ndim) if a not in rows + columns]

        def gather(x: Array) -> Array:
            grid = [math.prod(x.shape[a] for a in axes) for axes in matrix]
            return x.transpose([*batch, *rows, *columns]).reshape(*(x.shape[a] for a in batch), *grid)

        fields = {name: gather(x) for name, x in self.spread.items()}
        return dataclasses.replace(self.static, codes=self.codes, matrix=matrix, **fields)

    def _matrix(self) -> Matrix:
        """Input and output axes of the weight as it is now."""
        found = [a for a, n in enumerate(self.axes.shape) if n == 0]
        if len(found) != len(self.roles):
            raise DaqError(
                f"a quantized weight was cut to {self.shape} along an input or output axis, with its codes "
                "and scales apart; cut it along batch axes alone, or dequantize it first."
            )
        rows, columns = (
            tuple(a for role, a in sorted(zip(self.roles, found, strict=True)) if role[0] == x) for x in "rc"
        )
        return rows, columns

    def unbox(self) -> Array:
        """The weight, decoded."""
        return self.qtensor().dequantize()

    def replace_boxed(self, val: Any) -> Any:
        """What takes the place of the box for a new value: the value itself, which is not quantized."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "InPlace":
        """The same box: it derives its axes from its arrays."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "InPlace":
        """The same box: it derives its axes from its arrays."""
        return self


def linen_variables(variables: PyTree) -> PyTree:
    """Quantized variables in the form that `model.apply` takes, of any Linen model.

    Args:
        variables: variables as `model.init` returns them, with QTensors in place of some arrays.

    Returns:
        The tree with each QTensor in a box and all other leaves as they are, for
        `jax.jit(model.apply)(variables, x)`. Box once and call many times.

    >>> import flax.linen as nn
    >>> model, x = nn.Dense(8), jnp.ones((2, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> from daq_jax import quantize
    >>> q = quantize(variables, variables)
    >>> jax.jit(model.apply)(linen_variables(q), x).shape
    (2, 8)
    """

    def boxed(node: Any) -> Any:
        # A box of Flax's own, such as nn.Partitioned, is left out: the arrays are sharded already.
        inner = jax.tree.leaves(node, is_leaf=is_qtensor)[0] if is_box(node) else node
        return InPlace.of(inner) if is_qtensor(inner) else node

    return jax.tree.map(boxed, variables, is_leaf=lambda x: is_qtensor(x) or is_box(x))


def linen_apply(model: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
    """`model.apply(variables, *args, **kwargs)` with quantized variables; call it inside `jax.jit`.

    Args:
        model: any Linen module.
        variables: as for `linen_variables`.
        *args: passed on to `model.apply`.
        **kwargs: passed on to `model.apply`.

    Returns:
        What `model.apply` returns.
    """
    return model.apply(linen_variables(variables), *args, **kwargs)


class QuantizedParam(nnx.Param):
    """An `nnx.Param` that holds codes and scales, and gives the decoded weight where it is read."""

    def get_value(self, *, index: Any = ...) -> Any:
        """The weight, decoded; with an index, these elements of it."""
        raw = self.get_raw_value()
        # Not so while Flax handles its metadata, or prints the model.
        value: Any = raw
        if isinstance(raw, InPlace) and isinstance(raw.codes, jax.Array | np.ndarray):
            value = raw.unbox()
        return value if isinstance(index, type(...)) or not hasattr(value, "shape") else value[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # of an array, such as `T`
            return getattr(self.get_value(), name)


def nnx_with(model: nnx.Module, q: PyTree) -> nnx.Module:
    """An NNX model on quantized weights.

    Args:
        model: the model, which is not changed. It may be abstract, from `nnx.eval_shape`, if `q` has every
            leaf.
        q: quantized state of the model, or of its parameters: what `quantize` made of `nnx.state(model)`, or
            what `load` read of it. A nested dict with the same paths will do, and so will one whose leaves
            stand deeper, all below the same components, or end in `/value`, as in checkpoints.

    Returns:
        A model of the same class, for any use that only reads weights, inside `nnx.jit` and outside of it.

    Raises:
        DaqError: naming the leaves of `q` that the model lacks, those of other shape, and those of an
            abstract model that `q` lacks.

    >>> from daq_jax import quantize
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    >>> state = nnx.state(model)
    >>> quantized = nnx_with(model, quantize(state, state))
    >>> nnx.jit(lambda model, x: model(x))(quantized, jnp.ones((2, 4))).shape
    (2, 8)
    """
    graph, state = nnx.split(model)
    leaves, variables = named_leaves(q), dict(nnx.to_flat_state(state))
    named = {"/".join(map(str, keys)): keys for keys in variables}
    leaves = _by_paths_of(named, leaves)
    _refuse_misfits(leaves, {path: variables[keys].get_raw_value() for path, keys in named.items()})
    for path, leaf in leaves.items():
        variable = variables[named[path]]
        new = QuantizedParam(InPlace.of(leaf)) if is_qtensor(leaf) else variable.replace(leaf)
        variables[named[path]] = new
    return nnx.merge(graph, nnx.from_flat_state(variables))


def _by_paths_of(model: Mapping[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by their paths in the model; those that stand elsewhere in a checkpoint are left out."""
    names = aligned(leaves, model)
    if all(path == name for path, name in names.items()):
        return leaves
    return {path: leaves[name] for path, name in names.items()}


def _refuse_misfits(leaves: dict[str, Any], model: dict[str, Any]) -> None:
    problems = [f"{p!r} is not in the model" for p in leaves if p not in model]
    for path, value in model.items():
        if path in leaves and value.shape != leaves[path].shape:
            problems.append(f"{path!r} is {leaves[path].shape} but {value.shape} in the model")
        if path not in leaves and isinstance(value, jax.ShapeDtypeStruct):
            problems.append(f"{path!r} is missing, and the model is abstract there")
    if problems:
        refuse("these quantized weights do not fit the model", problems, "Pass the state of this model.")


# --- Exported programs --------------------------------------------------------------------------------------
# `jax.export` writes the types of a program's arguments, and is told here how to write an InPlace.


def _to_bytes(static: QTensor, *roles: str) -> bytes:
    return json.dumps([static_record(static), *roles]).encode()


def _from_bytes(data: bytes | bytearray) -> tuple[QTensor, tuple[str, ...]]:
    record, *roles = json.loads(bytes(data))
    return qtensor_of(record, dict.fromkeys(QTENSOR_ARRAYS)), tuple(roles)


jax.export.register_pytree_node_serialization(
    InPlace,
    serialized_name="daq_jax.InPlace",
    serialize_auxdata=lambda fields: _to_bytes(fields[0], *fields[1]),
    deserialize_auxdata=_from_bytes,
)
