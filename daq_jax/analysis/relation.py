"""Whether two models look like a base and its fine-tune, in this order; told from a few patches, by NumPy.

Two faults give perfect reports: the models change places, and then the change is that from the tuned model to
the base; or they have nothing to do with each other, and then the change is the model.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from daq_jax.analysis.verdicts import UNRELATED
from daq_jax.qtensor import QTensor

MOST_LEAVES = 8  # looked at
SIDE = 256  # rows and columns of a patch, at most
_FEWEST = 2**12  # elements of a patch that says something
_ALIKE = 0.3  # cosine of the weights of two models; tunes have 0.9 and more, unrelated models about 0
# Runs of weights that share a scale, and the most magnitudes that codes of 4 and of 8 bits give them there.
# Weights off any grid have nearly as many as there are weights, or a few hundred in bfloat16.
_RUNS = ((32, 16), (256, 128))
_SHARE = 0.9  # of the runs of a patch that is on a grid
_MOST_RUNS = 64
_OUTLIER = 100  # times the median magnitude; of normal weights none is beyond 10
_MOST_KNOWN = 64  # pairs of trees whose doubt is remembered

Patch = NDArray[np.float32]
_known: dict[tuple[int, ...], tuple[list[weakref.ref[Any]], str]] = {}


class UnlikelyPairWarning(UserWarning):
    """Base and tuned look swapped, or as if they had nothing to do with each other."""


def doubt_of(patches: Iterable[tuple[Patch, Patch]]) -> str:
    """What is odd about a base and its tune, in a sentence with a way out; "" where nothing is.

    Args:
        patches: parts of a few weights `[r, c]` before and after tuning. Nothing is told of small ones, nor
            of those that hold NaN or infinity.
    """
    pairs = [(b, t) for b, t in patches if b.size >= _FEWEST and _is_telling(b) and _is_telling(t)]
    if not pairs:
        return ""
    usual = [(_usual(b), _usual(t)) for b, t in pairs]
    cosines = [np.sum(b * t) / (np.linalg.norm(b) * np.linalg.norm(t)) for b, t in usual]
    change = np.sqrt(sum(np.sum((t - b) ** 2) for b, t in usual))
    size = np.sqrt(sum(np.sum(b**2) for b, _ in usual))
    if np.median(cosines) < _ALIKE and change >= UNRELATED * size:
        return (
            f"These two models look unrelated: the change is {change / size:.0%} of the weights. "
            "Is this the base that the tuned model was made from?"
        )
    only_tuned = [_on_a_grid(t) and not _on_a_grid(b) for b, t in pairs if not np.array_equal(b, t)]
    if only_tuned and np.mean(only_tuned) > 0.5:
        return (
            "Base and tuned may be swapped: the weights of the tuned model lie on the grid of a number "
            "format, as those of a model that ships quantized do, and the weights of the base do not. Pass "
            "the base first."
        )
    return ""


def doubt_of_leaves(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """`doubt_of` a few leaves of two trees, by path; found once for the same arrays, which calls repeat.

    To read them each time would let an accelerator wait for longer than it searches.
    """
    names = chosen(before)
    arrays = [x for name in names for x in jax.tree.leaves((before[name], after[name]))]
    key = tuple(map(id, arrays))
    refs, doubt = _known.get(key, ([], ""))
    if refs and all(ref() is x for ref, x in zip(refs, arrays, strict=True)):
        return doubt
    doubt = doubt_of(patches_of(before, after, names))
    for oldest in list(_known)[: max(0, len(_known) + 1 - _MOST_KNOWN)]:
        _known.pop(oldest, None)
    _known[key] = [weakref.ref(x) for x in arrays], doubt
    return doubt


def warn_unlikely(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Warns, in the name of the caller's caller, where two trees look swapped or unrelated."""
    if doubt := doubt_of_leaves(before, after):
        warnings.warn(doubt, UnlikelyPairWarning, stacklevel=3)


def chosen(names: Iterable[str]) -> list[str]:
    """A few of many names, evenly spread."""
    names = list(names)
    return names[:: max(1, -(-len(names) // MOST_LEAVES))]


def patches_of(
    before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]
) -> Iterator[tuple[Patch, Patch]]:
    """A corner of each of some leaves of two trees of arrays and QTensors."""
    for name in names:
        base, tuned = before[name], after[name]
        if getattr(base, "sharding", None) == getattr(tuned, "sharding", None) or not _is_apart(base, tuned):
            yield as_patch(base), as_patch(tuned)


def as_patch(x: Any) -> Patch:
    """The corner of the first matrix of an array or a QTensor, float32 `[r, c]`; of what one device holds."""
    if _is_apart(x):
        x = np.zeros(0) if isinstance(x, QTensor) else x.addressable_shards[0].data
    if isinstance(x, QTensor):
        x = x.dequantize(np.float32)
    if np.ndim(x) < 2:
        return np.zeros((0, 0), np.float32)
    corner = x[(0,) * (np.ndim(x) - 2) + (slice(SIDE), slice(SIDE))]
    return np.asarray(corner).astype(np.float32)


def _is_apart(*leaves: Any) -> bool:
    """Whether any of the arrays lies on several devices."""
    arrays = [x for leaf in leaves for x in jax.tree.leaves(leaf) if isinstance(x, jax.Array)]
    return any(len(x.sharding.device_set) > 1 for x in arrays)


def _is_telling(patch: Patch) -> bool:
    return bool(np.any(patch)) and bool(np.all(np.isfinite(patch)))


def _usual(patch: Patch) -> NDArray[np.float64]:
    """A patch without outliers, one of which would outweigh all others; in float64, where squares fit."""
    wide = patch.astype(np.float64)
    limit = _OUTLIER * np.median(np.abs(wide))
    return np.clip(wide, -limit, limit) if limit > 0 else wide


def _on_a_grid(patch: Patch) -> bool:
    """Whether runs of weights along rows, or along columns, or a block have few magnitudes."""
    block = patch[:64, :64]
    if block.size == 64 * 64 and _magnitudes(block.reshape(1, -1))[0] <= 128:
        return True
    return any(_runs_on_a_grid(x, *run) for x in (patch, patch.T) for run in _RUNS)


def _runs_on_a_grid(x: Patch, length: int, most: int) -> bool:
    if x.shape[1] < length:
        return False
    runs = x[:_MOST_RUNS, : x.shape[1] // length * length].reshape(-1, length)
    found = _magnitudes(runs[:: max(1, len(runs) // _MOST_RUNS)])
    found = found[found > 2]  # all alike says nothing
    return len(found) > 0 and float(np.mean(found <= most)) >= _SHARE


def _magnitudes(runs: Patch) -> NDArray[np.int64]:
    """How many different magnitudes each row has."""
    ordered = np.sort(np.abs(runs), axis=1)
    return 1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1)
