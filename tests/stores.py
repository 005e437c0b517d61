"""Stores of jobs to which something happens."""

from collections.abc import Callable
from typing import Any

_PASSED_ON = ("out", "journal", "units", "readable", "instead", "nbytes", "missing_bytes", "is_free")
_PASSED_ON += ("clear", "has", "write", "verify", "join", "complete", "lock", "files", "make_room", "discard")
_PASSED_ON += ("damaged", "expected")


class Wrapped:
    """A store that does what another does."""

    def __init__(self, store: Any) -> None:
        self._store = store


for _name in _PASSED_ON:
    setattr(Wrapped, _name, property(lambda self, name=_name: getattr(self._store, name)))


class Stopped(Wrapped):
    """A store that ends the process at one of the units it writes.

    Args:
        store: what does the work.
        at: number of the unit, from 1 on.
        error: what is raised.
        written: whether the unit is written before.
    """

    def __init__(self, store: Any, *, at: int, error: type[BaseException], written: bool = True) -> None:
        super().__init__(store)
        self._at, self._error, self._written = at, error, written
        self._calls = 0

    def write(self, unit: str, **options: Any) -> Any:
        self._calls += 1
        if self._calls == self._at and not self._written:
            raise self._error
        record = self._store.write(unit, **options)
        if self._calls == self._at:
            raise self._error
        return record


class Unreported(Wrapped):
    """A store that ends the process when all but the report is written."""

    def complete(self, report: Any) -> None:
        raise KeyboardInterrupt


class Damaged(Wrapped):
    """A store on whose disk something becomes of each unit before it is read back."""

    def __init__(self, store: Any, damage: Callable[[str], None]) -> None:
        super().__init__(store)
        self._damage = damage

    def verify(self, unit: str, record: Any) -> None:
        self._damage(unit)
        self._store.verify(unit, record)
