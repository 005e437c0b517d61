"""One job, whatever it writes to: begin or go on, one unit after another, complete.

A result is cut into units. Each unit is written, read back and recorded, so that a job which was killed goes
on at its first unit without a record. What a unit is and how it is written is the business of a `Store`:
`FolderStore` writes safetensors shards, `OrbaxStore` writes leaves of an Orbax checkpoint.
"""

import contextlib
import dataclasses
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from daq_jax.analysis.figures import Figures, pool
from daq_jax.analysis.names import printable
from daq_jax.errors import DaqError, refuse
from daq_jax.io.disk.locks import one_writer
from daq_jax.io.jobs.audit import identity_line, identity_of
from daq_jax.io.jobs.identity import Inputs
from daq_jax.io.jobs.journal import Journal, Record, Work
from daq_jax.io.jobs.progress import Running, progress_on, result_of
from daq_jax.io.jobs.store import Store

_SPARE_DISK = 10**8  # bytes left free for report and side files


@dataclasses.dataclass(frozen=True)
class Job:
    """All that one call has to do.

    Attributes:
        store: where the result goes.
        inputs: files that the result is made from, by the name that messages give each.
        settings: all that decides the bytes of the result, beside the inputs.
        summary: what is known of the result before any weight is read.
        share: (I, N): this process does every N-th unit, from the I-th on.
        memory: bytes that the plan says the work takes at most.
        origin: what the result says of where it comes from; see `Work.origin`.
        overwrite: whether to replace what `store.out` holds.
        console: where progress is shown.
    """

    store: Store
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    overwrite: bool
    console: Console
    share: tuple[int, int] = (1, 1)
    memory: int = 0
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def units(self) -> list[str]:
        """Names of the units that this process does, in order."""
        first, step = self.share
        return list(self.store.units)[first - 1 :: step]

    def run(self) -> dict[str, Any]:
        """Does the job, or what is left of it.

        Returns:
            The report, or the summary if units of other processes are missing.

        Raises:
            DaqError: if the disk is too full, if `store.out` is taken, if another process is at work on it,
                if an input changes meanwhile, or if a weight cannot be quantized.
            OSError: if what is on the disk is not what was written.
        """
        started = time.monotonic()
        _refuse_full_disk(self.store)
        inputs = Inputs(self.inputs)
        work = Work(inputs.identities, self.settings, self.store.files, self.origin)
        journal = Journal(self.store.journal, self.store.out, work)
        with one_writer(self.store.lock, self.store.out, self.share, take_over=self.overwrite):
            if self._begin(journal):
                self._say(f"{self.store.out} is complete already, and each file is what was written")
                return journal.report()
            progress, running = self._pass(journal)
            if progress.resumed and not self.store.readable and not self._holds_together(progress):
                self._say("what was finished before cannot be put together: all is written anew")
                progress, running = self._pass(journal)
            report = self._complete(progress, inputs)
        seconds = time.monotonic() - started
        self._say(result_of(running.pooled, self.store.nbytes, seconds, _peak(), self.memory))
        if report is None:
            self._say(self._still_missing(progress))
        elif identity_line(report):
            self._say(identity_line(report))
        return dict(self.summary) if report is None else report

    def _say(self, words: str) -> None:
        whole = not self.console.is_terminal  # a line for whoever reads a log
        self.console.print(printable(words), highlight=False, markup=False, soft_wrap=whole)

    def _begin(self, journal: Journal) -> bool:
        """Opens the journal, or finds it as the same job left it; returns whether the job is complete."""
        begun, completed, key = journal.begun, journal.completed, journal.work.key
        if self.overwrite:
            self.store.make_room([name for work in (begun, completed) for name in _files(work)])
            journal.close()
        elif begun is not None and begun["fingerprint"] != key:
            raise self._taken("begun with other inputs, settings or versions", journal.work.unlike(begun))
        elif begun is not None and self._is_whole(completed, key):  # stopped when all was done
            journal.close()
            return True
        elif begun is None and completed is not None and completed["fingerprint"] == key:
            journal.close()  # of which a kill may have left some
            self._refuse_damaged(completed)
            return True
        elif begun is None and completed is not None:
            why = "holds a result of other inputs, settings or versions"
            raise self._taken(why, journal.work.unlike(completed))
        elif begun is None and not self.store.is_free():
            raise self._taken("holds other files", "", "them")
        elif begun is None and self.share[1] == 1:
            self.store.clear()
        journal.open()
        return False

    def _taken(self, why: str, which: str, what: str = "it") -> DaqError:
        why += f" ({which})" if which else ""
        return DaqError(
            f"{self.store.out}: {why}; pass {self.store.instead}, or --overwrite to replace {what}."
        )

    def _is_whole(self, report: Mapping[str, Any] | None, key: str) -> bool:
        return report is not None and report["fingerprint"] == key and not self.store.damaged(report)

    def _refuse_damaged(self, report: Mapping[str, Any]) -> None:
        damaged = self.store.damaged(report)
        if damaged:
            way_out = "Pass --overwrite to write it anew."
            refuse(f"{self.store.out}: was complete and is so no more", damaged, way_out, one_line=True)

    def _pass(self, journal: Journal) -> "tuple[Finished, Running]":
        """Carries out what is left, and shows progress."""
        done = Finished(self.store, journal, self._say)
        total = sum(self.store.units[unit] for unit in self.units)
        expected = self.store.expected([unit for unit in self.units if not done.claims(unit)])
        with progress_on(self.console, total, expected) as running:
            self._carry_out(done, running)
        return done, running

    def _carry_out(self, done: "Finished", running: Running) -> None:
        """Writes the units of this process that are not finished, in order."""
        records: list[Record] = []
        for i, unit in enumerate(self.units):
            with done.journal.alone(unit, wait=False) as needed:
                if not needed:  # another process has completed the result
                    return
                record = done.record(unit)
                if record is None:
                    following = next((u for u in self.units[i + 1 :] if not done.claims(u)), None)
                    record = self.store.write(unit, earlier=records, following=following, running=running)
                    done.add(unit, record)
                else:
                    running.tell(unit, self.store.units[unit], _pooled(_figures([record])))
                records.append(record)

    def _complete(self, done: "Finished", inputs: Inputs) -> dict[str, Any] | None:
        """Completes the result if all units are finished; of several processes, the last to end does so."""
        with done.journal.alone("completion", wait=True) as needed:
            if not needed:
                return done.journal.report()
            found = {unit: done.record(unit) for unit in self.store.units}
            records = {unit: record for unit, record in found.items() if record is not None}
            if len(records) < len(found):
                return None
            self._join(done, records)
            self._refuse_changed(inputs, done.journal)
            work = dataclasses.replace(done.journal.work, origin=done.journal.origin)
            report = _report(work, self.summary, list(records.values()))
            report = self.store.complete(report)
            done.journal.close()
            return report

    def _holds_together(self, done: "Finished") -> bool:
        """Whether what an earlier call wrote can be joined; a stop while it was written may have torn it."""
        try:
            self._join(done, {unit: record for unit in self.units if (record := done.record(unit))})
        except (OSError, DaqError):
            return False
        return True

    def _join(self, done: "Finished", records: Mapping[str, Record]) -> None:
        """Joins all units and reads them back; of what is not what was written nothing is left that loads."""
        if done.joined:
            return
        try:
            self.store.join()
            if not self.store.readable:
                for unit, record in records.items():
                    self.store.verify(unit, record)
        except (OSError, DaqError):
            for unit in records:
                done.journal.forget(unit)
            self.store.discard()
            raise
        done.joined = True

    def _refuse_changed(self, inputs: Inputs, journal: Journal) -> None:
        """Looks at all inputs again: a result of inputs from before and after a change is of neither."""
        changed, unclear = inputs.changed()
        if changed:
            journal.spoil()
            raise DaqError(
                f"{self.store.out}: inputs changed while they were read ({_some(changed)}), so the result "
                "would be of neither state; pass --overwrite to begin anew."
            )
        if unclear:
            raise DaqError(
                f"{self.store.out}: inputs were written to while they were read ({_some(unclear)}), and are "
                "too large to tell whether they changed; if they did not, call again to complete the "
                "result, otherwise pass --overwrite to begin anew."
            )

    def _still_missing(self, done: "Finished") -> str:
        there = sum(done.claims(unit) for unit in self.store.units)
        return (
            f"{self.store.out} is not complete yet: {there} of {len(self.store.units)} files are written, "
            "and other shares of the work are still to be done; the last of them completes it"
        )


@dataclasses.dataclass
class Finished:
    """The units of a job that are finished, each of which was read back by this process.

    Attributes:
        store: where the units are.
        journal: the records of the units.
        say: shows a line to whoever looks.
        resumed: whether one of the units was finished by an earlier call.
        joined: whether the units are joined and were read back.
    """

    store: Store
    journal: Journal
    say: Callable[[str], None]
    resumed: bool = False
    joined: bool = False
    _verified: dict[str, Record] = dataclasses.field(default_factory=dict)

    def claims(self, unit: str) -> bool:
        """Whether there is a record of a unit, and something that it may be a record of."""
        return self.store.has(unit) and self.journal.record(unit) is not None

    def record(self, unit: str) -> Record | None:
        """The record of a unit that is what was written; None if the unit is still to be written."""
        if unit in self._verified:
            return self._verified[unit]
        record = self.journal.record(unit) if self.store.has(unit) else None
        if record is None:
            return None
        if self.store.readable:
            try:
                self.store.verify(unit, record)
            except (OSError, DaqError):
                self.journal.forget(unit)
                self.say(f"{unit} was finished before and is not what was written: it is written anew")
                return None
        self.resumed = True
        self._verified[unit] = record
        return record

    def add(self, unit: str, record: Record) -> None:
        """Reads a unit back that was just written, and notes that it is finished."""
        if self.store.readable:
            self.store.verify(unit, record)
        self.journal.finish(unit, record)
        self._verified[unit] = record


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _files(work: Mapping[str, Any] | None) -> list[str]:
    files = (work or {}).get("files")
    return [name for name in files if isinstance(name, str)] if isinstance(files, (list, dict)) else []


def _figures(records: Sequence[Record]) -> dict[str, Figures]:
    return {name: Figures.from_sums(sums) for record in records for name, sums in record["figures"].items()}


def _pooled(figures: Mapping[str, Figures]) -> Figures | None:
    return pool(figures.values()) if figures else None


def _report(work: Work, summary: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    leaves = _figures(records)
    total = _pooled(leaves)
    return {
        **work.to_dict(),
        **summary,
        "total": None if total is None else total.to_dict(),
        "leaves": {name: figures.to_dict() for name, figures in leaves.items()},
        **identity_of(records),
        "crc32": {name: checksum for record in records for name, checksum in record["crc32"].items()},
    }


def _peak() -> int:
    """Most bytes of memory that this process has had."""
    # The system's usage of a process also counts what was there before it became this program.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
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
