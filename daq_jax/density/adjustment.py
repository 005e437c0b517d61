"""Stage 2 of density-aware quantization: move scale and zero of each group to where the output is best.

`Adjustment` says what an adjustment is asked; `LeastSquares` and `SignSteps` are ours. All groups of a layer
are adjusted at once, each by its own loss.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from daq_jax.density.groups import AffineMap, Groups, Loss, across, better_map
from daq_jax.errors import DaqError, check_whole_numbers


class _Best(NamedTuple):
    affine: AffineMap
    loss: Array

    def or_better(self, affine: AffineMap, loss: Array) -> "_Best":
        lower = loss < self.loss
        return _Best(self.affine.replaced(lower, affine), jnp.where(lower, loss, self.loss))


class Adjustment:
    """Moves the affine map of each group to where a loss is lower: stage 2 of a `DensityRecipe`.

    A class of your own should be a frozen dataclass, so that equal recipes share one compiled program. A
    plain function of the same signature will do as well; it is taken to serve any loss.

    Attributes:
        any_loss: whether any loss will do, such as minus a metric of the change. False for a class that asks
            more of its loss, as `LeastSquares` does, which is right for losses of the output only.
    """

    any_loss: ClassVar[bool] = True

    def __call__(self, groups: Groups, loss: Loss, start: AffineMap) -> AffineMap:
        """The adjusted affine map of each group.

        Args:
            groups: the weights of a layer.
            loss: of code values `[N, n, C]` and affine maps, `[N, C]`; lower is better.
            start: the map to adjust.

        Returns:
            Maps whose losses, with every weight at its nearest code, are nowhere above those of `start`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `__call__`.")


@dataclasses.dataclass(frozen=True)
class LeastSquares(Adjustment):
    """Alternating least squares from many starts: the nearest codes, then the best affine map for them.

    For fixed codes the loss is quadratic in the scale and the offset, so the best map has a closed form. The
    alternation ends in a local minimum near its start, and there are many local minima. So it starts from a
    coarse grid of ranges and centres, and then from a fine grid that spans half a coarse step around the best
    map so far. Ranges below 1 clip the farthest weights: a coarse format often gains more by finer steps than
    it loses by clipping. Of all maps that were evaluated the best is returned.

    Evaluates the loss `turns * (coarse**2 + fine**2) + 1` times. Serves losses of the output only.

    Attributes:
        coarse: number of ranges of the coarse grid, and number of its centres.
        fine: number of ranges of the fine grid, and number of its centres.
        turns: how often codes and map are chosen in turn, from each start.
        lowest: narrowest range of the coarse grid, as a share of the range of the starting map.
        farthest: largest move of the centre on the coarse grid, as a share of the format's largest value.
    """

    any_loss: ClassVar[bool] = False

    coarse: int = 8
    fine: int = 8
    turns: int = 2
    lowest: float = 0.55
    farthest: float = 0.12

    def __post_init__(self) -> None:
        check_whole_numbers(self, coarse=self.coarse, fine=self.fine, turns=self.turns)
        if not (0 < self.lowest <= 1 and self.farthest >= 0):
            raise DaqError(
                "LeastSquares: needs 0 < lowest <= 1 and farthest >= 0; "
                f"got {self.lowest} and {self.farthest}."
            )

    @property
    def evaluations(self) -> int:
        """How often the loss is evaluated, the one of the starting map included."""
        return self.turns * (self.coarse**2 + self.fine**2) + 1

    def __call__(self, groups: Groups, loss: Loss, start: AffineMap) -> AffineMap:
        """The adjusted affine map; see `Adjustment`."""
        best = _Best(start, loss(groups.nearest(start), start))
        shares = np.linspace(1, self.lowest, self.coarse)
        moves = np.linspace(-self.farthest, self.farthest, self.coarse)
        best = self._search(groups, best, shares, moves)
        half_share, half_move = (abs(x[-1] - x[0]) / max(self.coarse - 1, 1) / 2 for x in (shares, moves))
        around = np.linspace(-1, 1, self.fine)
        return self._search(groups, best, 1 + half_share * around, half_move * around).affine

    def _search(self, groups: Groups, best: _Best, shares: np.ndarray, moves: np.ndarray) -> _Best:
        """The best of `best` and of all maps on the way from this grid of starts around it."""
        affine = best.affine
        reach = groups.format.largest if groups.shift else 0.0

        def from_start(best: _Best, grid: Array) -> tuple[_Best, None]:
            share, move = grid
            trial = AffineMap(affine.scale * share, (affine.zero + move * reach) / share)
            for _ in range(self.turns):
                values = groups.nearest(trial)
                error = groups.error(values, trial)
                gradient = across(groups.gram, error)
                best = best.or_better(trial, jnp.sum(error * gradient, axis=1))
                trial, _ = better_map(values, trial, gradient, groups.real, groups.gram, shift=groups.shift)
            return best, None

        moves = moves if groups.shift else moves[:1]
        grid = np.stack(np.meshgrid(shares, moves, indexing="ij"), -1).reshape(-1, 2)
        return lax.scan(from_start, best, jnp.asarray(grid, jnp.float32))[0]


class _Walk(NamedTuple):
    affine: AffineMap
    loss: Array
    turn: Array
    idle: Array  # turns in a row in which no group moved


@dataclasses.dataclass(frozen=True)
class SignSteps(Adjustment):
    """Steps of given sizes, down the sign of a finite difference: first of the zero, then of the scale.

    Each group steps only if its loss falls. The step of the zero is in code units, the step of the scale is
    a share of the scale. Even turns take growing steps: turn `2 i` has the size
    `step * spread * growth**(i + 1)`. Odd turns take shrinking steps: turn `2 i + 1` has the size
    `step / spread * decay**(i + 1)`. Each epoch starts with the first size again. An epoch ends early when no
    group has moved for more than `patience` turns. Serves any loss. With the defaults, which are those of the
    released program, the loss is evaluated up to 4001 times.

    Attributes:
        epochs: how often the whole sequence of sizes is gone through.
        turns: number of turns of an epoch.
        step: size of a step before growth and decay.
        spread: factor from `step` up to the growing steps and down to the shrinking ones, at least 1.
        growth: factor of each growing step over the one before, at least 1.
        decay: factor of each shrinking step over the one before, in (0, 1].
        patience: turns in a row in which no group may move before an epoch ends.

    Source: the program released with arXiv:2410.12187, which evaluates it six times a turn where four do.
    """

    epochs: int = 10
    turns: int = 100
    step: float = 1e-3
    spread: float = 5.0
    growth: float = 1.1
    decay: float = 0.9
    patience: int = 5

    def __post_init__(self) -> None:
        check_whole_numbers(self, epochs=self.epochs, turns=self.turns, patience=self.patience)
        if not (self.step > 0 and self.spread >= 1 and self.growth >= 1 and 0 < self.decay <= 1):
            raise DaqError(
                "SignSteps: needs step > 0, spread >= 1, growth >= 1 and 0 < decay <= 1; "
                f"got {self.step}, {self.spread}, {self.growth} and {self.decay}."
            )

    @property
    def evaluations(self) -> int:
        """How often the loss is evaluated at most."""
        return 4 * self.epochs * self.turns + 1

    @property
    def sizes(self) -> np.ndarray:
        """`[turns]` float32: the size of each step of an epoch."""
        i = np.arange(self.turns) // 2 + 1.0
        large, small = self.step * self.spread * self.growth**i, self.step / self.spread * self.decay**i
        return np.where(np.arange(self.turns) % 2, small, large).astype(np.float32)

    def __call__(self, groups: Groups, loss: Loss, start: AffineMap) -> AffineMap:
        """The adjusted affine map; see `Adjustment`."""
        sizes = jnp.asarray(self.sizes)

        def at(affine: AffineMap) -> Array:
            return loss(groups.nearest(affine), affine)

        def unfinished(walk: _Walk) -> Array:
            return walk.turn < self.epochs * self.turns

        def turn(walk: _Walk) -> _Walk:
            size, (scale, zero) = sizes[walk.turn % self.turns], walk.affine
            affine, before = walk.affine, walk.loss
            moved = jnp.bool_(False)
            if groups.shift:
                sides = AffineMap(scale, zero - size), AffineMap(scale, zero + size)
                affine, before, moved = _to_lower_side(at, affine, before, sides)
            sides = (affine._replace(scale=affine.scale * (1 + sign * size)) for sign in (-1, 1))
            affine, before, moved_scale = _to_lower_side(at, affine, before, tuple(sides))
            idle = jnp.where(walk.turn % self.turns == 0, walk.idle + 1, walk.idle)
            idle = jnp.where(moved | moved_scale, 0, idle + 1)
            next_epoch = (walk.turn // self.turns + 1) * self.turns
            return _Walk(affine, before, jnp.where(idle > self.patience, next_epoch, walk.turn + 1), idle)

        walk = _Walk(start, at(start), jnp.int32(0), jnp.int32(0))
        return lax.while_loop(unfinished, turn, walk).affine


def _to_lower_side(
    at: Callable[[AffineMap], Array], affine: AffineMap, loss: Array, sides: tuple[AffineMap, ...]
) -> tuple[AffineMap, Array, Array]:
    """Moves each group to the better of two neighbouring maps, where its loss is below the present one.

    Returns the maps, their losses, and whether any group moved. Neighbours with equal losses move no group.
    """
    left, right = map(at, sides)
    moves = ((left < loss) | (right < loss)) & (left != right)
    affine = affine.replaced(moves & (left < right), sides[0]).replaced(moves & (right < left), sides[1])
    return affine, jnp.where(moves, jnp.minimum(left, right), loss), jnp.any(moves)
