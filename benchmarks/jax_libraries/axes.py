"""Which axes of a weight does a model contract? Told by gradients, whatever library the model is of.

A linear layer's gradient is a sum of outer products, one for each of T tokens: the layer's input times the
gradient at its output. Another loss of the same run changes the second factor alone. So with the gradients of
several losses side by side, the rank is T at most where rows are inputs, and larger in any other view.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

TOLERANCE = 2e-3  # of the singular values: views that hold leave 1e-7, views that do not 4e-3 and more
View = tuple[tuple[int, ...], tuple[int, ...]]  # input axes, output axes


def excess(gradients: Sequence[np.ndarray], view: View, tokens: int) -> float | None:
    """The first singular value that the tokens leave no room for, beside the largest one.

    Args:
        gradients: of one leaf, of several losses.
        view: its input axes and output axes; all others count matrices.
        tokens: of the run.

    Returns:
        The largest over all matrices; None if no gradient arrives, 1 if there are too few rows to tell.
    """
    rows, columns = view
    shape = gradients[0].shape
    others = [a for a in range(len(shape)) if a not in rows + columns]
    sizes = math.prod(shape[a] for a in rows), math.prod(shape[a] for a in columns)
    if sizes[0] <= tokens:
        return 1.0
    order = (*others, *rows, *columns)
    beside = np.concatenate([g.transpose(order).reshape(-1, *sizes) for g in gradients], axis=-1)
    live = beside[np.abs(beside).max((1, 2)) > 1e-9 * np.abs(beside).max()]
    if not live.size:
        return None
    values = np.linalg.svd(live, compute_uv=False)
    return float((values[:, tokens] / values[:, 0]).max()) if values.shape[1] > tokens else 0.0


def contracted(gradients: Sequence[np.ndarray], tokens: int) -> list[View]:
    """The views that hold and have the fewest matrices: how the model itself sees a leaf."""
    shape, found = gradients[0].shape, []
    for roles in itertools.product("brc", repeat=len(shape)):
        rows, columns = (tuple(a for a, role in enumerate(roles) if role == x) for x in "rc")
        if rows and columns:
            how_far = excess(gradients, (rows, columns), tokens)
            if how_far is not None and how_far < TOLERANCE:
                found.append((math.prod(shape[a] for a, r in enumerate(roles) if r == "b"), (rows, columns)))
    fewest = min((count for count, _ in found), default=0)
    return [view for count, view in found if count == fewest]


def verdict(gradients: Sequence[np.ndarray], view: View, tokens: int) -> str:
    """What the gradients say of a view: "right", "finer" (right, in more matrices), "wrong" or "not told"."""
    if max(np.abs(g).max() for g in gradients) == 0:
        return "not told"
    how_far, own = excess(gradients, view, tokens), contracted(gradients, tokens)
    if not own or how_far is None:
        return "not told"
    if how_far >= TOLERANCE:
        return "wrong"
    return "right" if view in own else "finer"
