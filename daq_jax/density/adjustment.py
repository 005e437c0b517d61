"""Stage 2 of density-aware quantization: move scale and zero of each group to where the output is best.

An adjustment takes `Groups`, a loss and a starting `Line`, and returns a line whose loss, with every weight
at its nearest code, is nowhere above the start's. All groups of a layer move at once, each by its own loss.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from daq_jax.density.code_lines import Groups, Line, Loss, across, better_line
from daq_jax.errors import DaqError


def _check_counts(adjustment: object, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DaqError(
                f"{type(adjustment).__name__}: `{name}` must be a whole number above 0; got {value!r}."
            )


class _Best(NamedTuple):
    line: Line
    loss: Array

    def or_better(self, line: Line, loss: Array) -> "_Best":
        lower = loss < self.loss
        return _Best(self.line.replaced(lower, line), jnp.where(lower, loss, self.loss))


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Many starts, each followed by turns of "nearest codes, then the best line for these codes".

    For fixed codes the loss is a square of two unknowns, so the best scale and zero have a closed form. Turns
    end in a minimum near where they began, and there are many: so they begin on a coarse grid of ranges and
    centres, and then on a fine one, half a coarse step around the best. Ranges below 1 clip the farthest
    weights: a coarse format often gains more by finer steps than it loses by clipping. Of all lines seen the
    best is kept.

    Evaluates the loss `turns * (coarse**2 + fine**2)` times; only for losses of the output.

    Attributes:
        coarse: number of ranges on the coarse grid, and of centres.
        fine: the same of the fine grid.
        turns: of codes and line, from each start.
        lowest: share of the range that the narrowest range of the coarse grid keeps.
        farthest: how far the coarse grid moves the centre, as a share of the reach on either side.
    """

    coarse: int = 8
    fine: int = 8
    turns: int = 2
    lowest: float = 0.55
    farthest: float = 0.12

    def __post_init__(self) -> None:
        _check_counts(self, coarse=self.coarse, fine=self.fine, turns=self.turns)
        if not (0 < self.lowest <= 1 and self.farthest >= 0):
            raise DaqError(
                "LeastSquares: needs 0 < lowest <= 1 and farthest >= 0; "
                f"got {self.lowest} and {self.farthest}."
            )

    @property
    def evaluations(self) -> int:
        """How often the loss is taken, the start's included."""
        return self.turns * (self.coarse**2 + self.fine**2) + 1

    def __call__(self, groups: Groups, loss: Loss, start: Line) -> Line:
        """The adjusted line."""
        best = _Best(start, loss(groups.nearest(start), start))
        shares = np.linspace(1, self.lowest, self.coarse)
        moves = np.linspace(-self.farthest, self.farthest, self.coarse)
        best = self._search(groups, best, shares, moves)
        half_share, half_move = (abs(x[-1] - x[0]) / max(self.coarse - 1, 1) / 2 for x in (shares, moves))
        around = np.linspace(-1, 1, self.fine)
        return self._search(groups, best, 1 + half_share * around, half_move * around).line

    def _search(self, groups: Groups, best: _Best, shares: np.ndarray, moves: np.ndarray) -> _Best:
        """The best of `best` and of what turns from these ranges and centres around it lead to."""
        line = best.line
        reach = groups.format.largest if groups.shift else 0.0

        def from_start(best: _Best, grid: Array) -> tuple[_Best, None]:
            share, move = grid
            trial = Line(line.scale * share, (line.zero + move * reach) / share)
            for _ in range(self.turns):
                values = groups.nearest(trial)
                error = groups.error(values, trial)
                pull = across(groups.gram, error)
                best = best.or_better(trial, jnp.sum(error * pull, axis=1))
                trial, _ = better_line(values, trial, pull, groups.real, groups.gram, shift=groups.shift)
            return best, None

        moves = moves if groups.shift else moves[:1]
        grid = np.stack(np.meshgrid(shares, moves, indexing="ij"), -1).reshape(-1, 2)
        return lax.scan(from_start, best, jnp.asarray(grid, jnp.float32))[0]


class _Walk(NamedTuple):
    line: Line
    loss: Array
    turn: Array
    idle: Array  # turns in a row in which no group moved


@dataclasses.dataclass(frozen=True)
class SignSteps:
    """Steps of given sizes, down the sign of a finite difference: first of the zero, then of the scale.

    A group takes a step only if its loss falls. Even turns take growing steps and odd turns shrinking ones:
    turn `2 i` one of `step * spread * growth**(i + 1)` code units (for the scale, that share of it), turn
    `2 i + 1` one of `step / spread * decay**(i + 1)`. Each epoch begins anew, and ends when no group has
    moved for more than `patience` turns. As released, it evaluates the loss up to 4000 times; for any loss.

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
        _check_counts(self, epochs=self.epochs, turns=self.turns, patience=self.patience)
        if not (self.step > 0 and self.spread >= 1 and self.growth >= 1 and 0 < self.decay <= 1):
            raise DaqError(
                "SignSteps: needs step > 0, spread >= 1, growth >= 1 and 0 < decay <= 1; "
                f"got {self.step}, {self.spread}, {self.growth} and {self.decay}."
            )

    @property
    def evaluations(self) -> int:
        """How often the loss is taken at most."""
        return 4 * self.epochs * self.turns + 1

    @property
    def sizes(self) -> np.ndarray:
        """`[turns]` float32: the size of each step of an epoch."""
        i = np.arange(self.turns) // 2 + 1.0
        large, small = self.step * self.spread * self.growth**i, self.step / self.spread * self.decay**i
        return np.where(np.arange(self.turns) % 2, small, large).astype(np.float32)

    def __call__(self, groups: Groups, loss: Loss, start: Line) -> Line:
        """The adjusted line."""
        sizes = jnp.asarray(self.sizes)

        def at(line: Line) -> Array:
            return loss(groups.nearest(line), line)

        def unfinished(walk: _Walk) -> Array:
            return walk.turn < self.epochs * self.turns

        def turn(walk: _Walk) -> _Walk:
            size, (scale, zero) = sizes[walk.turn % self.turns], walk.line
            line, before = walk.line, walk.loss
            moved = jnp.bool_(False)
            if groups.shift:
                sides = Line(scale, zero - size), Line(scale, zero + size)
                line, before, moved = _to_lower_side(at, line, before, sides)
            sides = (line._replace(scale=line.scale * (1 + sign * size)) for sign in (-1, 1))
            line, before, moved_scale = _to_lower_side(at, line, before, tuple(sides))
            idle = jnp.where(walk.turn % self.turns == 0, walk.idle + 1, walk.idle)
            idle = jnp.where(moved | moved_scale, 0, idle + 1)
            next_epoch = (walk.turn // self.turns + 1) * self.turns
            return _Walk(line, before, jnp.where(idle > self.patience, next_epoch, walk.turn + 1), idle)

        walk = _Walk(start, at(start), jnp.int32(0), jnp.int32(0))
        return lax.while_loop(unfinished, turn, walk).line


def _to_lower_side(
    at: Callable[[Line], Array], line: Line, loss: Array, sides: tuple[Line, ...]
) -> tuple[Line, Array, Array]:
    """The side of lower loss, for the groups where the two differ and one is below the middle."""
    left, right = map(at, sides)
    moves = ((left < loss) | (right < loss)) & (left != right)
    line = line.replaced(moves & (left < right), sides[0]).replaced(moves & (right < left), sides[1])
    return line, jnp.where(moves, jnp.minimum(left, right), loss), jnp.any(moves)
