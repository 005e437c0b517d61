"""Matrix views that shapes tell: what a leaf is, seen from the leaves beside it.

A name says less than the shapes around it. A matrix with one output for each expert of its block is a router,
whatever it is called; a leaf of two axes in a stack of layers is a vector of each layer.
"""

import collections
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from daq_jax.rules.layers import OUT_IN, View
from daq_jax.tilings import DEFAULT_MATRIX

Shapes = Mapping[str, tuple[int, ...]]
_SEPARATOR = re.compile(r"[./]")
_NAMES = ("value", "kernel", "weight", "w")  # last components of a path that name an array, not a module


def float_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the floating-point leaves, by path."""
    floats = {
        p: x for p, x in leaves.items() if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    }
    return {path: tuple(x.shape) for path, x in floats.items()}


def views_by_shape(shapes: Shapes) -> dict[str, View]:
    """The views that shapes tell, by path.

    Args:
        shapes: of all floating-point leaves of a tree, without the axes of stacks of layers; neighbours tell
            what a leaf is.
    """
    found: dict[str, View] = {}
    for look in (_empty, _experts, _gates, _weights, _convolutions, _routers):
        found |= dict(look(shapes))
    return found


Found = Iterator[tuple[str, View]]


def _empty(shapes: Shapes) -> Found:
    """Leaves without an element."""
    for path, shape in shapes.items():
        if 0 in shape:
            yield path, View(None, "empty")


def _convolutions(shapes: Shapes) -> Found:
    """Depthwise kernels, each of one channel: `[..., 1, out]`, in PyTorch `[out, 1, ...]`."""
    for path, shape in shapes.items():
        if len(shape) >= 3 and re.search(r"(?i)conv", path):
            *_, name = _SEPARATOR.split(path.removesuffix("/value"))
            if shape[1 if name == "weight" else -2] == 1:
                yield path, View(None, "convolution of single channels")


def own_axes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The axes of each leaf that are its own, and not those along which layers are stacked.

    Layers are stacked in a part of the tree where all leaves share the length of their first or second axis,
    and where norms have two axes. Stacks may hold stacks.

    Args:
        shapes: of all floating-point leaves of a tree, by path.
    """
    return dict(_own_axes(tuple(shapes.items())))


@functools.lru_cache(maxsize=16)  # several parts of a call ask, and calls repeat
def _own_axes(items: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, tuple[int, ...]]:
    shapes = dict(items)
    parts: dict[str, list[str]] = collections.defaultdict(list)
    for path in shapes:
        names = path.split("/")
        for i in range(len(names)):
            parts["/".join(names[:i])].append(path)
    own = {path: tuple(range(len(shape))) for path, shape in shapes.items()}
    while stacked := _stacked(parts, {p: tuple(shapes[p][a] for a in axes) for p, axes in own.items()}):
        for path, axis in stacked.items():
            own[path] = own[path][:axis] + own[path][axis + 1 :]
    return own


def _stacked(parts: Mapping[str, list[str]], shapes: Shapes) -> dict[str, int]:
    """The stack axis of each leaf in a stack; the outermost part decides where parts hold one another."""
    found: dict[str, int] = {}
    for part in sorted(parts, key=len):
        axis = _stack_axis({path: shapes[path] for path in parts[part]})
        if axis is not None and not any(path in found for path in parts[part]):
            found |= dict.fromkeys(parts[part], axis)
    return found


def _stack_axis(shapes: Shapes) -> int | None:
    """The axis along which layers are stacked in a part of a tree, if it is a stack."""
    norms = [s for path, s in shapes.items() if _is_norm(path)]
    if not any(len(s) == 2 for s in norms) or not any(len(s) > 2 for s in shapes.values()):
        return None
    for axis in (0, 1):
        lengths = {s[axis] if len(s) > axis else -1 for s in shapes.values()}
        if len(lengths) == 1 and -1 not in lengths:
            return axis
    return None


@functools.lru_cache(maxsize=2**16)
def _is_norm(path: str) -> bool:
    return re.search(r"(?i)norm|(^|[/_])(ln\w*|scale)([/_]|$)", path) is not None


def _routers(shapes: Shapes) -> Found:
    """Matrices with an output for each of the experts that are stacked beside them and share their inputs."""
    stacks: dict[str, set[tuple[int, ...]]] = collections.defaultdict(set)
    for path, shape in shapes.items():
        if len(shape) >= 3:
            for block in _blocks(path):
                stacks[block].add(shape)
    for path, shape in shapes.items():
        beside = set().union(*(stacks.get(block, ()) for block in _blocks(path)[-2:]))
        if len(shape) >= 2 and any(_routes(shape, stack) for stack in beside):
            yield path, View(None, "router: an output for each expert")


def _blocks(path: str) -> list[str]:
    """Paths of the modules around a leaf, the outermost first, without the one whose kernel it is."""
    parts = _SEPARATOR.split(path)
    while len(parts) > 1 and parts[-1] in _NAMES:
        parts = parts[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _routes(shape: tuple[int, ...], experts: tuple[int, ...]) -> bool:
    """Whether a matrix of this shape, of either orientation, may choose among such a stack of experts.

    No model has more experts than an expert has inputs or outputs: `[D, 2, F]` is two fused matrices.
    """
    if len(experts) != len(shape) + 1:
        return False
    for outputs in (len(shape) - 1, len(shape) - 2):
        others = [n for i, n in enumerate(shape) if i != outputs]
        stack = collections.Counter(experts[:-2])
        stack.subtract(others)
        left = [n for n, times in stack.items() if times > 0]
        few = shape[outputs] <= min(experts[-2:])
        if few and left == [shape[outputs]] and any(n in experts[-2:] for n in others):
            return True
    return False


def _gates(shapes: Shapes) -> Found:
    """Gemma's `gating_einsum`, `[2, D, F]` or `[2, F, D]`; `linear` beside it is `[F, D]`."""
    for path, linear in gates(shapes).items():
        transposed, plain = (shapes[path][-2:] == x for x in (linear[-2:], linear[-2:][::-1]))
        if transposed != plain:
            view = OUT_IN if transposed else DEFAULT_MATRIX
            yield path, View(view, f"Gemma: beside linear {linear[-2:]}")


def gates(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """For each `gating_einsum` of a tree, the shape of `linear` beside it; `()` where there is none."""
    found = {}
    for path, shape in shapes.items():
        match = re.fullmatch(r"(.*[./])?gating_einsum((?:/w)?(?:/value)?)", path)
        if match and len(shape) >= 3:
            found[path] = shapes.get(f"{match[1] or ''}linear{match[2]}", ())
    return found


def _experts(shapes: Shapes) -> Found:
    """Stacked experts of Hugging Face: `gate_up_proj` is `[E, D, 2 F]` or `[E, 2 F, D]`, by `down_proj`."""
    for path, up in shapes.items():
        other = path.replace("gate_up_proj", "down_proj")
        if len(up) != 3 or other == path or len(shapes.get(other, ())) != 3:
            continue
        down = shapes[other]
        plain = (up[1], up[2]) == (down[2], 2 * down[1])
        turned = (up[1], up[2]) == (2 * down[2], down[1])
        if plain != turned:
            for one in (path, other):
                yield (
                    one,
                    View(DEFAULT_MATRIX if plain else OUT_IN, "experts, by up and down beside each other"),
                )


def _weights(shapes: Shapes) -> Found:
    """Matrices called `weight` with a bias beside them, which has as many elements as there are outputs."""
    for path, shape in shapes.items():
        bias = shapes.get(re.sub(r"weight$", "bias", path), ()) if path.endswith("weight") else ()
        if len(shape) == 2 and len(bias) == 1 and shape[0] != shape[1] and bias[0] in shape:
            yield path, View(OUT_IN if bias[0] == shape[0] else DEFAULT_MATRIX, "its bias tells its outputs")
