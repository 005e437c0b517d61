"""One job, whatever it writes to: begin or go on, one unit after another, complete.

A result is cut into units. Each unit is written, read back and recorded, so that a job which was killed goes
on at its first unit without a record. What a unit is and how it is written is the business of a `Store`:
`FolderStore` writes safetensors shards, `OrbaxStore` writes leaves of an Orbax checkpoint.
"""

import dataclasses
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

from daq_jax.analysis.figures import Figures, pool
from daq_jax.errors import DaqError
from daq_jax.io.jobs.journal import Journal, Record, fingerprint
from daq_jax.io.jobs.progress import Tell, progress_on, result_of

_SPARE_DISK = 10**8  # bytes left free for report and side files


@runtime_checkable
class Store(Protocol):
    """Where the result of a job is kept.

    A record is plain JSON. Of its keys a job reads two: `crc32`, a checksum of each tensor by name, and
    `figures`, the sums of each tensor that was compared with its base.
    """

    @property
    def out(self) -> Path:
        """Folder of the result."""
        ...

    @property
    def journal(self) -> Path:
        """Folder of the records while the job goes on."""
        ...

    @property
    def units(self) -> Mapping[str, int]:
        """Every unit of the result by name, with the bytes of the tuned weights that it is made from."""
        ...

    @property
    def readable(self) -> bool:
        """Whether a unit can be read back as soon as it is written; otherwise only after `join`."""
        ...

    @property
    def instead(self) -> str:
        """What to pass in place of an `out` that holds something else."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        ...

    def missing_bytes(self) -> int:
        """Bytes that are still to be written at least, as far as they are known before any work."""
        ...

    def is_free(self) -> bool:
        """Whether `out` holds nothing but the journal."""
        ...

    def clear(self, *, result: bool) -> None:
        """Removes what jobs left that no journal speaks of; with `result`, a complete result too.

        Without `result` it touches nothing that another process of the same job may just have begun.
        """
        ...

    def has(self, unit: str) -> bool:
        """Whether what `write` makes of a unit can be on the disk."""
        ...

    def write(self, unit: str, *, earlier: Sequence[Record], following: str | None, tell: Tell) -> Record:
        """Writes a unit; none of it is lost once its record is.

        Args:
            unit: name of the unit.
            earlier: records of the units before it, in order.
            following: name of the unit that is written next, which may be read ahead; None for none.
            tell: takes note of progress.

        Returns:
            The record of the unit.
        """
        ...

    def verify(self, unit: str, record: Record) -> None:
        """Reads a unit back and compares it with its record.

        Raises:
            OSError: naming the tensor that is not what was written.
        """
        ...

    def join(self) -> None:
        """Makes one result of the written units; does nothing where that is done already."""
        ...

    def complete(self, report: Mapping[str, Any]) -> None:
        """Writes the report and whatever else a loader needs; its last act makes the result look complete."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """All that one call has to do.

    Attributes:
        store: where the result goes.
        inputs: files that the result is made from.
        settings: all that decides the bytes of the result, beside the inputs.
        summary: what is known of the result before any weight is read.
        units: names of the units that this process does, in order.
        overwrite: whether to replace what `store.out` holds.
        console: where progress is shown.
    """

    store: Store
    inputs: Sequence[Path]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    units: Sequence[str]
    overwrite: bool
    console: Console

    def run(self) -> dict[str, Any]:
        """Does the job, or what is left of it.

        Returns:
            The report, or the summary if units of other processes are missing.

        Raises:
            DaqError: if the disk is too full, if `store.out` is taken, if another process is at work on a
                unit, or if a weight cannot be quantized.
            OSError: if what is on the disk is not what was written.
        """
        started = time.monotonic()
        _refuse_full_disk(self.store)
        journal = Journal(self.store.journal, self.store.out, fingerprint(self.inputs, self.settings))
        if self._begin(journal):
            self.console.print(f"{self.store.out} is complete already", highlight=False, markup=False)
            return journal.report()
        with progress_on(self.console, sum(self.store.units[unit] for unit in self.units)) as running:
            self._carry_out(journal, running.tell)
        report = self._complete(journal)
        said = result_of(running.pooled, self.store.nbytes, time.monotonic() - started, _peak())
        self.console.print(said, highlight=False)
        return report

    def _begin(self, journal: Journal) -> bool:
        """Opens the journal, or finds it as the same job left it; returns whether the job is complete."""
        begun, completed = journal.begun, journal.completed
        if self.overwrite:
            journal.close()
            self.store.clear(result=True)
        elif begun is not None and begun != journal.key:
            raise self._taken("begun with other inputs, settings or versions", "it")
        elif begun is None and completed == journal.key:
            journal.close()  # of which a kill may have left some
            return True
        elif begun is None and completed is not None:
            raise self._taken("holds a result of other inputs, settings or versions", "it")
        elif begun is None and not self.store.is_free():
            raise self._taken("holds other files", "them")
        elif begun is None:
            self.store.clear(result=False)
        journal.open()
        return False

    def _taken(self, why: str, what: str) -> DaqError:
        return DaqError(
            f"{self.store.out}: {why}; pass {self.store.instead}, or --overwrite to replace {what}."
        )

    def _carry_out(self, journal: Journal, tell: Tell) -> None:
        """Writes the units of this process that are not finished, in order."""
        records: list[Record] = []
        for i, unit in enumerate(self.units):
            with journal.alone(unit, wait=False) as needed:
                if not needed:  # another process has completed the result
                    return
                record = self._record(journal, unit)
                if record is None:
                    following = next((u for u in self.units[i + 1 :] if not self._record(journal, u)), None)
                    record = self.store.write(unit, earlier=records, following=following, tell=tell)
                    if self.store.readable:
                        self.store.verify(unit, record)
                    journal.finish(unit, record)
                else:
                    tell(unit, self.store.units[unit], _pooled(_figures([record])))
                records.append(record)

    def _record(self, journal: Journal, unit: str) -> Record | None:
        """The record of a unit that is finished; None if it is not."""
        return journal.record(unit) if self.store.has(unit) else None

    def _complete(self, journal: Journal) -> dict[str, Any]:
        """Completes the result if all units are finished; of several processes, the last to end does so."""
        with journal.alone("completion", wait=True) as needed:
            if not needed:
                return journal.report()
            found = {unit: self._record(journal, unit) for unit in self.store.units}
            records = {unit: record for unit, record in found.items() if record is not None}
            if len(records) < len(found):
                return dict(self.summary)
            self.store.join()
            if not self.store.readable:
                for unit, record in records.items():
                    self.store.verify(unit, record)
            report = _report(journal.key, self.summary, list(records.values()))
            self.store.complete(report)
            journal.close()
            return report


def _figures(records: Sequence[Record]) -> dict[str, Figures]:
    return {name: Figures.from_sums(sums) for record in records for name, sums in record["figures"].items()}


def _pooled(figures: Mapping[str, Figures]) -> Figures | None:
    return pool(figures.values()) if figures else None


def _report(key: str, summary: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    leaves = _figures(records)
    total = _pooled(leaves)
    return {
        "fingerprint": key,
        **summary,
        "total": None if total is None else total.to_dict(),
        "leaves": {name: figures.to_dict() for name, figures in leaves.items()},
        "crc32": {name: checksum for record in records for name, checksum in record["crc32"].items()},
    }


def _peak() -> int:
    """Most bytes of memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _refuse_full_disk(store: Store) -> None:
    there = next(p for p in (store.out.absolute(), *store.out.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(there).free, store.missing_bytes() + _SPARE_DISK
    if free < needed:
        raise DaqError(
            f"{store.out}: needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; free some, "
            "or pass a folder on a larger disk."
        )
