"""Stage 2 of the program released with arXiv:2410.12187, in NumPy and float64, from its description.

Nothing is shared with the library. Losses are `e' G e`, of each group and output by itself, as there.
"""

import numpy as np
from numpy.typing import NDArray

EPOCHS, TURNS, STEP, PATIENCE = 10, 100, 1e-3, 5


def nearest(x: NDArray, levels: NDArray) -> NDArray:
    """The nearest level; half-way goes to the lower one."""
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x, side="left")]


def start(weight: NDArray, levels: NDArray) -> tuple[NDArray, NDArray]:
    """Scale and zero of `[N, n, C]` weights: 0.9 of the reach around the quantiles' centre, and 0."""
    low, high = np.quantile(weight, [0.025, 0.975], axis=1)
    centre = (low + high) / 2
    reach = np.maximum(weight.max(1) - centre, centre - weight.min(1))
    return 0.9 * reach / levels[-1], np.zeros_like(reach)


def adjust(
    weight: NDArray,
    gram: NDArray,
    levels: NDArray,
    scale: NDArray,
    zero: NDArray,
    *,
    epochs: int = EPOCHS,
    turns: int = TURNS,
) -> tuple[NDArray, NDArray, int]:
    """Scale, zero and the number of loss evaluations.

    Args:
        weight: `[N, n, C]`.
        gram: `[N, n, n]`.
        levels: of the codes, ascending.
        scale, zero: `[N, C]`, where to start.
        epochs, turns: how long to go on at most.
    """
    evaluations = 0

    def loss(scale: NDArray, zero: NDArray) -> NDArray:
        nonlocal evaluations
        evaluations += 1
        s, z = scale[:, None], zero[:, None]
        error = weight - (nearest(weight / s + z, levels) - z) * s
        return np.sum(error * (gram @ error), axis=1)

    idle = 0
    for _ in range(epochs):
        idle += 1
        small, large = STEP / 5, STEP * 5
        for turn in range(turns):
            if turn % 2:
                small *= 0.9
            else:
                large *= 1.1
            size = small if turn % 2 else large
            middle, left, right = loss(scale, zero), loss(scale, zero - size), loss(scale, zero + size)
            step = np.where((left < middle) | (right < middle), np.sign(right - left), 0)
            zero = zero - size * step
            middle = loss(scale, zero)
            left, right = loss(scale * (1 - size), zero), loss(scale * (1 + size), zero)
            moves = ((left < middle) | (right < middle)) & (left != right)
            scale = np.where(moves, np.where(left < right, scale * (1 - size), scale * (1 + size)), scale)
            idle = 0 if step.any() or moves.any() else idle + 1
            if idle > PATIENCE:
                break
    return scale, zero, evaluations
