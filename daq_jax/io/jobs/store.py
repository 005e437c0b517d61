"""Where the result of a job is kept, as a job sees it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from daq_jax.io.jobs.journal import Record
from daq_jax.io.jobs.progress import Expected, Running


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

    def expected(self, units: Sequence[str]) -> Expected:
        """What writing some units takes: bytes that are quantized, and programs not compiled yet."""
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

    @property
    def lock(self) -> Path:
        """Path of the locks of `out`, without their endings."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """Names of the files that the job may write into `out`, relative to it."""
        ...

    def is_free(self) -> bool:
        """Whether `out` holds nothing but the journal and locks."""
        ...

    def clear(self) -> None:
        """Removes what stopped jobs left that no journal speaks of."""
        ...

    def make_room(self, ours: Sequence[str]) -> None:
        """Removes from `out` what a job wrote that is to be replaced.

        Args:
            ours: names of the files that are known to be of such a job, relative to `out`.

        Raises:
            DaqError: before anything is removed, if `out` holds files of others that the result would
                replace, or that a loader would take for parts of it.
        """
        ...

    def has(self, unit: str) -> bool:
        """Whether what `write` makes of a unit can be on the disk."""
        ...

    def write(
        self, unit: str, *, earlier: Sequence[Record], following: str | None, running: Running
    ) -> Record:
        """Writes a unit; none of it is lost once its record is.

        Args:
            unit: name of the unit.
            earlier: records of the units before it, in order.
            following: name of the unit that is written next, which may be read ahead; None for none.
            running: takes note of progress.

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
        """Makes one result of the written units, which no loader finds yet; or does so no second time."""
        ...

    def discard(self) -> None:
        """Removes all units; what they were read back as is not what was written."""
        ...

    def complete(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the report and whatever else a loader needs; its last act makes the result look complete.

        Returns:
            The report as it was written, with the checksums of the files beside the units.
        """
        ...

    def damaged(self, report: Mapping[str, Any]) -> list[str]:
        """Reads a complete result; names the files that are not what the report says, and why."""
        ...
