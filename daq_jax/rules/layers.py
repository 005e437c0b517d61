"""Matrix views that types tell: the layers of Equinox, Haliax and Flax NNX, wherever they stand in a tree.

A class is known by its name and the name of its module, so that no library is imported for it. Axes are
counted from the end: stacks of layers are made by `vmap`, which puts their axis in front.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from daq_jax.tilings import DEFAULT_MATRIX, Matrix
from daq_jax.trees import PyTree, is_box, keyed_leaves, path_component

OUT_IN: Matrix = ((-1,), (-2,))  # a weight [..., out, in]


class View(NamedTuple):
    """What is known of a leaf beside the rules.

    Attributes:
        matrix: input axes and output axes; None for a leaf that is no matrix, and is kept.
        why: how it is known, in a few words.
    """

    matrix: Matrix | None
    why: str


def views_by_type(tree: PyTree) -> dict[str, View]:
    """The views of all leaves that belong to a layer of a known type, by path.

    Args:
        tree: any pytree; dicts and other trees without types give no view.
    """
    found = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: _reader(x) is not None)
    for keys, node in nodes:
        read = _reader(node)
        if read is not None:
            prefix = [*map(path_component, keys)]
            for path, (_, leaf) in keyed_leaves(node).items():
                view = read(node, path.partition("/")[0]) if hasattr(leaf, "dtype") else None
                if view is not None and "/" not in path:  # not of an adapter within the layer
                    name = type(node).__name__
                    found["/".join([*prefix, path])] = View(view, name) if view else View(None, name)
    return found


Reader = Callable[[Any, str], Matrix | tuple[()] | None]  # () for what is no matrix, None for no word


def _reader(node: Any) -> Reader | None:
    """What reads the views off a layer; None for a node of no known type."""
    return None if is_box(node) or not hasattr(node, "__dict__") else _reader_of(type(node))


@functools.cache
def _reader_of(layer: type) -> Reader | None:
    for cls in layer.__mro__:
        for package, readers in _READERS.items():
            if cls.__module__.startswith(package) and cls.__name__ in readers:
                return readers[cls.__name__]
    return None


def _no_matrix(layer: Any, name: str) -> tuple[()]:
    return ()


def _out_in(layer: Any, name: str) -> Matrix | None:
    return OUT_IN if name.startswith("weight") else None


def _equinox_conv(layer: Any, name: str) -> Matrix | tuple[()] | None:
    """A kernel `[out, in / groups, *spatial]`."""
    if name != "weight":
        return None
    n = layer.num_spatial_dims
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    return () if depthwise else (tuple(range(-n - 1, 0)), (-n - 2,))


def _haliax_conv(layer: Any, name: str) -> Matrix | tuple[()] | None:
    """A kernel `[out, in / groups, *spatial]`."""
    if name != "weight":
        return None
    n = len(layer.kernel_size)
    depthwise = layer.groups > 1 and layer.groups == layer.In.size
    return () if depthwise else (tuple(range(-n - 1, 0)), (-n - 2,))


def _haliax(layer: Any, name: str) -> Matrix | None:
    """A weight with named axes, `layer.In` to `layer.Out`."""
    if name != "weight":
        return None
    names = [axis.name for axis in layer.weight.axes]
    inputs, outputs = (_names(getattr(layer, x)) for x in ("In", "Out"))
    rows, columns = ([i - len(names) for i, n in enumerate(names) if n in x] for x in (inputs, outputs))
    return tuple(rows), tuple(columns)


def _names(axes: Any) -> list[str]:
    """Names of one axis of Haliax, or of several."""
    return [axis.name for axis in (axes if isinstance(axes, (tuple, list)) else [axes])]


def _flax_linear(layer: Any, name: str) -> Matrix | None:
    return DEFAULT_MATRIX if name == "kernel" else None


def _flax_general(layer: Any, name: str) -> Matrix | None:
    """A kernel `[*batch, *in, *out]`."""
    if name != "kernel":
        return None
    rows, columns = (len(x) if isinstance(x, (tuple, list)) else 1 for x in (layer.axis, layer.out_features))
    return tuple(range(-rows - columns, -columns)), tuple(range(-columns, 0))


def _flax_einsum(layer: Any, name: str) -> Matrix | None:
    """A kernel whose letters are contracted, unless they are in the result too."""
    if name != "kernel":
        return None
    operands, _, result = layer.einsum_str.replace(" ", "").partition("->")
    inputs, kernel = operands.split(",")
    inputs, kernel, result = (x.replace("...", "") for x in (inputs, kernel, result))
    places = {letter: i - len(kernel) for i, letter in enumerate(kernel)}
    rows = tuple(i for letter, i in places.items() if letter in inputs and letter not in result)
    columns = tuple(i for letter, i in places.items() if letter in result and letter not in inputs)
    return (rows, columns) if rows and columns else None


def _flax_conv(layer: Any, name: str) -> Matrix | tuple[()] | None:
    """A kernel `[*spatial, in / groups, out]`."""
    if name != "kernel":
        return None
    groups = getattr(layer, "feature_group_count", 1)
    depthwise = groups > 1 and groups == layer.in_features
    return () if depthwise else (tuple(range(-len(layer.kernel_size) - 2, -1)), (-1,))


_EQUINOX = {
    **dict.fromkeys(("Linear", "GRUCell", "LSTMCell"), _out_in),
    **dict.fromkeys(("Conv", "ConvTranspose"), _equinox_conv),
    **dict.fromkeys(("Embedding", "LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "PReLU"), _no_matrix),
}
_HALIAX = {
    **dict.fromkeys(("Linear", "MoELinear"), _haliax),
    **dict.fromkeys(("Conv", "ConvTranspose"), _haliax_conv),
    **dict.fromkeys(("Embedding", "LayerNorm", "RmsNorm", "LayerNormBase"), _no_matrix),
}
_FLAX = {
    "Linear": _flax_linear,
    "LinearGeneral": _flax_general,
    "Einsum": _flax_einsum,
    **dict.fromkeys(("Conv", "ConvTranspose"), _flax_conv),
    **dict.fromkeys(("Embed", "LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "LoRA"), _no_matrix),
}
_READERS: dict[str, dict[str, Reader]] = {"equinox.nn": _EQUINOX, "haliax.nn": _HALIAX, "flax.nnx.nn": _FLAX}
