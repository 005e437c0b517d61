"""Trees of weights: leaves by path, and the tree put together again."""

import collections
from collections.abc import Callable, Collection, Iterator, Mapping, MappingView, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from daq_jax.errors import DaqError
from daq_jax.qtensor import QTensor

PyTree = Any
_NO_TREES = (Iterator, MappingView, Set)


def is_qtensor(x: object) -> bool:
    """Whether a node of a tree is a QTensor, which is a leaf to us."""
    return isinstance(x, QTensor)


def is_box(x: object) -> bool:
    """What adds metadata to an array: `nnx.Variable`, `nn.Partitioned`, Haliax's `NamedArray`, their kin."""
    if type(x).__name__ == "NamedArray" and type(x).__module__.partition(".")[0] == "haliax":
        return True
    return hasattr(x, "get_raw_value") or (hasattr(x, "unbox") and hasattr(x, "replace_boxed"))


def path_component(key: Any) -> str:
    """One component of a path, from a key of a JAX key path: a dict key, an index or an attribute name."""
    for name in ("key", "idx", "name"):  # of DictKey, SequenceKey, GetAttrKey
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def keyed_leaves(
    tree: PyTree, is_whole: Callable[[Any], bool] = is_qtensor
) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """As `named_leaves`, with each leaf's JAX key path beside it; None is a leaf too.

    Args:
        tree: any pytree.
        is_whole: which nodes are one leaf, whatever they hold.

    Raises:
        DaqError: if two leaves have the same path, such as `{"a/b": x, "a": {"b": y}}`; for a dict whose keys
            have no order, and for a generator, a set or the like, none of which JAX looks into.
    """
    leaves: dict[str, tuple[tuple[Any, ...], Any]] = {}
    is_leaf = lambda x: x is None or is_whole(x) or is_box(x) or isinstance(x, _NO_TREES)  # noqa: E731
    try:
        outer, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    except (ValueError, TypeError):
        _refuse_unordered(tree)
        raise
    for keys, node in outer:
        path = "/".join(map(path_component, keys))
        if isinstance(node, _NO_TREES):
            raise DaqError(
                f"{path!r} is a {type(node).__name__}, which is no tree to JAX; pass a dict or a list of its "
                "leaves, such as dict(x) or list(x)."
            )
        found = [None] if node is None else jax.tree.leaves(node, is_leaf=is_whole)
        if len(found) > 1:
            raise DaqError(
                f"{path!r} is a {type(node).__name__} of {len(found)} arrays, not a weight. If it comes from "
                "`nnx_with` or `linen_variables`, pass what `quantize` returned instead."
            )
        for leaf in found:
            if path in leaves:
                raise DaqError(f"two leaves have the path {path!r}; rename one so that paths are unique.")
            leaves[path] = keys, leaf
    return leaves


def _refuse_unordered(node: Any, path: str = "") -> None:
    """Raises DaqError, naming the first dict of a tree whose keys cannot be sorted, as JAX does."""
    if isinstance(node, Mapping):
        try:
            sorted(node)
        except TypeError as error:
            kinds = " and ".join(sorted({type(key).__name__ for key in node}))
            raise DaqError(
                f"{path!r} is a dict with keys of {kinds}: {list(node)[:5]}, which JAX cannot sort; give all "
                "keys one type, such as {str(key): x for key, x in d.items()}."
            ) from error
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if _is_list(node) else ()
    for key, child in children:
        _refuse_unordered(child, f"{path}/{key}" if path else str(key))


def _is_list(node: Any) -> bool:
    return isinstance(node, (list, tuple))


def unreadable(x: Any) -> str | None:
    """Why the numbers of a leaf cannot be taken as they are, and a way out; None where they can."""
    for array in jax.tree.leaves(x):
        if isinstance(array, np.ma.MaskedArray):
            return "a masked array, whose mask would be ignored; fill it first, x.filled(value)"
        if isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_deleted():
            return "a deleted array, as donated ones are; pass one that still exists"
        if isinstance(array, jax.ShapeDtypeStruct):
            return "a shape without numbers; pass an array, or call inside jax.eval_shape"
        if isinstance(array, (np.ndarray, np.generic)) and not array.dtype.isnative:
            return f'{array.dtype}, in another byte order; pass x.astype(x.dtype.newbyteorder("="))'
    return None


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves of a tree by path, in the tree's order; a QTensor is one leaf, a box adds nothing to a path.

    Raises:
        DaqError: if two leaves have the same path, such as `{"a/b": x, "a": {"b": y}}`.
    """
    return {path: leaf for path, (_, leaf) in keyed_leaves(tree).items() if leaf is not None}


def with_leaves(tree: PyTree, leaves: Sequence[Any]) -> PyTree:
    """The tree with other leaves, in the order of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_qtensor), leaves)


def aligned(found: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """The path in one tree of each leaf of another, where the first may stand deeper.

    Checkpoints hold weights below components that a model has not, such as `params/params`, and below the
    name of each array of an `nnx.Variable`, `value`.

    Args:
        found: paths of the first tree.
        wanted: paths of the second tree.

    Returns:
        Paths of the first tree by those of the second, of leaves that both have.

    Raises:
        DaqError: if the second tree is found in two places of the first.
    """
    known, counts = set(wanted), collections.Counter[tuple[str, str]]()
    for path in found:
        for end in ("", "/value"):
            names = path.removesuffix(end).split("/") if path.endswith(end) else []
            tails = (names[i:] for i in range(len(names)))
            counts.update(
                (path[: len(path) - len(end) - len(tail)], end)
                for tail in map("/".join, tails)
                if tail in known
            )
    most = max(counts.values(), default=0)
    best = sorted((place for place, count in counts.items() if count == most), key=lambda p: len(p[0]))
    if len(best) > 1 and best[0][0]:
        raise DaqError(
            f"the weights are found below {best[0][0]!r} and below {best[1][0]!r}; choose one of the two."
        )
    start, end = best[0] if best else ("", "")
    inside = set(found)
    return {path: start + path + end for path in wanted if start + path + end in inside}


def is_concrete(x: Any) -> bool:
    """Whether all arrays of a tree hold numbers: none is traced or abstract."""
    return not any(isinstance(a, (Tracer, jax.ShapeDtypeStruct)) for a in jax.tree.leaves(x))
