"""How long the rest of a job takes. Compiling counts apart: it takes seconds, however few the bytes."""

import dataclasses
from collections.abc import Callable

_ENOUGH = 3  # steps without compiling, before which no pace is told


@dataclasses.dataclass
class _Spent:
    seconds: float = 0.0
    nbytes: int = 0
    programs: int = 0
    steps: int = 0


class Pace:
    """The pace of work that goes on in steps, some of which compile programs first.

    Bytes are those of weights that are quantized. A step that only copies has none, and its time is taken for
    short: it is no part of the pace.

    Args:
        nbytes: bytes of all steps.
        programs: programs that all steps compile.
        clock: seconds, from any beginning.
    """

    def __init__(self, nbytes: int, programs: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nbytes, self._programs = nbytes, programs  # of steps that have not begun
        self._at_hand, self._since = _Spent(), clock()
        self._plain, self._compiling = _Spent(), _Spent()

    def begin(self, nbytes: int, programs: int) -> None:
        """A step of so many bytes begins, which compiles so many programs; the step before it has ended."""
        now, last = self._clock(), self._at_hand
        if last.nbytes:
            spent = self._compiling if last.programs else self._plain
            spent.seconds += now - self._since
            spent.nbytes += last.nbytes
            spent.programs += last.programs
            spent.steps += 1
        self._nbytes -= nbytes
        self._programs -= programs
        self._at_hand, self._since = _Spent(nbytes=nbytes, programs=programs), now

    @property
    def seconds_left(self) -> float | None:
        """Estimate; None while the pace, or how long a program takes, is not known well enough."""
        plain, compiling, at_hand = self._plain, self._compiling, self._at_hand
        if plain.steps < _ENOUGH:
            return None
        if not compiling.programs and (self._programs > 0 or at_hand.programs):
            return None
        rate = plain.seconds / plain.nbytes
        each = max(0.0, compiling.seconds - rate * compiling.nbytes) / max(compiling.programs, 1)
        spent = self._clock() - self._since
        now = max(0.0, rate * at_hand.nbytes + each * at_hand.programs - spent)
        return now + rate * max(self._nbytes, 0) + each * max(self._programs, 0)
