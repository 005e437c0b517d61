"""The store of a job that writes a Hugging Face folder: its units are the safetensors files, called shards.

Side files, report and index are written once all shards are there, and the config last: without it no loader
takes the folder for a model.
"""

import contextlib
import dataclasses
import functools
import json
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daq_jax.errors import DaqError, refuse
from daq_jax.io.disk.atomic import (
    Checksum,
    checksum,
    copy_file,
    make_folder,
    sync_folder,
    temporary_of,
    write_text,
)
from daq_jax.io.disk.links import listed_below, stays_inside
from daq_jax.io.hf.folders import INDEX, SINGLE, Folder
from daq_jax.io.hf.methods import QUANTIZATION_FILE
from daq_jax.io.jobs.journal import REPORT, Record
from daq_jax.io.jobs.model_card import card_of
from daq_jax.io.jobs.planning import Plan, Shard
from daq_jax.io.jobs.progress import Expected, Running
from daq_jax.io.jobs.side_files import CARD, SideFiles, side_files
from daq_jax.io.jobs.streaming import ShardJob, verify

CONFIG = "config.json"
_JOURNAL = ".daq"
_WEIGHTS = (".safetensors", ".index.json")


@dataclasses.dataclass(frozen=True)
class FolderStore:
    """A folder of safetensors shards; see `Store`.

    Attributes:
        out: folder of the result.
        plan: what is written.
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        custom_code: whether Python files of the tuned model are copied too.
    """

    out: Path
    plan: Plan
    base: Folder
    tuned: Folder
    custom_code: bool

    readable = True
    instead = "an empty folder"

    @property
    def journal(self) -> Path:
        """See `Store.journal`."""
        return self.out / _JOURNAL

    @functools.cached_property
    def _shards(self) -> dict[str, Shard]:
        return {shard.file: shard for shard in self.plan.shards}

    @functools.cached_property
    def _compiled(self) -> set[Hashable]:
        return set()

    @property
    def units(self) -> Mapping[str, int]:
        """See `Store.units`; the name of a unit is that of its file."""
        return {file: shard.tuned_bytes for file, shard in self._shards.items()}

    def expected(self, units: Sequence[str]) -> Expected:
        """See `Store.expected`."""
        tasks = [task for unit in units for task in self._shards[unit].tasks if task.quantize]
        programs = {task.program(rows) for task in tasks for rows in task.bands}
        return Expected(sum(task.tuned.nbytes for task in tasks), len(programs - self._compiled))

    @property
    def lock(self) -> Path:
        """See `Store.lock`."""
        return self.out / _JOURNAL

    @functools.cached_property
    def side_files(self) -> SideFiles:
        """Files beside the weights of the tuned model, copied or left out."""
        return side_files(self.tuned, self.custom_code, (CARD, REPORT, INDEX, CONFIG))

    @property
    def written(self) -> Sequence[str]:
        """Names of the files beside the shards that are written anew, in order."""
        beside = [QUANTIZATION_FILE] if self.plan.beside else []
        index = [] if list(self._shards) == [SINGLE] else [INDEX]
        return [CARD, REPORT, *index, *beside, CONFIG]

    @property
    def files(self) -> Sequence[str]:
        """See `Store.files`."""
        return [*self._shards, *map(str, self.side_files.copied), *self.written]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return self.plan.nbytes

    def missing_bytes(self) -> int:
        """Bytes of all shards, without those of files that are there."""
        there = [self.out / file for file in self._shards]
        return self.nbytes - sum(path.stat().st_size for path in there if path.is_file())

    def is_free(self) -> bool:
        """See `Store.is_free`."""
        return not self.out.exists() or all(_is_of_jobs(path) for path in self.out.iterdir())

    def clear(self) -> None:
        """Does nothing: a folder that is free has nothing to remove."""

    def make_room(self, ours: Sequence[str]) -> None:
        """See `Store.make_room`; files of another kind stay."""
        mine = {p for p in listed_below(self.out, ours) if p.is_symlink() or p.is_file()}
        kept = [p for p in self.out.iterdir() if p not in mine and not _is_of_jobs(p)]
        planned = [self.out / name for name in self.files]
        taken = {p for p in kept if p.name.endswith(_WEIGHTS)}
        taken |= {p for p in planned if p not in mine and (p.is_symlink() or p.exists())}
        if taken:
            refuse(
                f"{self.out}: holds files that would mix with the result and that no call of daq-jax wrote",
                [repr(str(p.relative_to(self.out))) for p in sorted(taken)],
                "Move them away, or pass an empty folder.",
                one_line=True,
            )
        first = [self.out / CONFIG, self.out / INDEX]  # which make the folder look complete
        last = self.out / REPORT  # which says whose the other files are
        self._remove(mine.intersection(first))
        self._remove(mine.difference(first, [last]))
        for path in listed_below(self.out, ours):
            temporary_of(path).unlink(missing_ok=True)
            if path.parent != self.out:
                with contextlib.suppress(OSError):  # not there, or not empty
                    path.parent.rmdir()
        self._remove(mine.intersection([last]))

    def _remove(self, paths: Iterable[Path]) -> None:
        """Removes files of the result before any that are removed later, also if the machine loses power."""
        for path in sorted(paths):
            path.unlink()
            sync_folder(path.parent)

    def has(self, unit: str) -> bool:
        """See `Store.has`."""
        return (self.out / unit).is_file()

    def write(
        self, unit: str, *, earlier: Sequence[Record], following: str | None, running: Running
    ) -> Record:
        """See `Store.write`."""
        return ShardJob(self.plan, self.base, self.tuned, running, self._compiled).do(
            self._shards[unit], self.out
        )

    def verify(self, unit: str, record: Record) -> None:
        """See `Store.verify`."""
        verify(self.out / unit, self._shards[unit].outputs, record["crc32"])

    def join(self) -> None:
        """Does nothing: shards are readable by themselves."""

    def discard(self) -> None:
        """Removes all shards; see `Store.discard`."""
        for file in self._shards:
            (self.out / file).unlink(missing_ok=True)

    def complete(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Writes side files, report and index, and the config last."""
        files: dict[str, Any] = {file: {"bytes": shard.nbytes} for file, shard in self._shards.items()}
        for path, folder in self.side_files.copied.items():
            files[str(path)] = _said(self._copied(path, folder))
        made = {
            CARD: lambda: card_of(self.plan, report, self.side_files.card),
            INDEX: lambda: _text(_index(self.plan), 2),
            QUANTIZATION_FILE: lambda: _text(self.plan.beside, 2),
            CONFIG: lambda: _text(self.plan.config, 2),
        }
        texts = {name: made[name]() for name in self.written if name != REPORT}
        for name, text in texts.items():
            files[name] = _said(Checksum(len(text.encode()), zlib.crc32(text.encode())))
        written = {**report, "files": {**files, REPORT: {}}}
        write_text(self.out / REPORT, _text(written, 1))
        for name, text in texts.items():  # the config last
            write_text(self.out / name, text)
        return written

    def _copied(self, path: Path, folder: Path) -> Checksum:
        """Copies a side file from a folder."""
        source, copy = folder / path, self.out / path
        if not (stays_inside(source, folder) and stays_inside(copy.parent, self.out)):
            raise DaqError(
                f"{source} or {copy.parent}: became a link that leads out of its folder; remove it."
            )
        make_folder(copy.parent)
        return copy_file(source, copy)

    def damaged(self, report: Mapping[str, Any]) -> list[str]:
        """See `Store.damaged`."""
        files, found = report.get("files"), []
        if not isinstance(files, dict) or not {*self._shards, CONFIG} <= set(files):
            return [f"{REPORT!r} does not list its files"]
        sums = report.get("crc32")
        if not isinstance(sums, dict) or any(type(x) is not int for x in sums.values()):
            return [f"{REPORT!r} does not list the checksums of its tensors"]
        for name, said in files.items():
            path = self.out / name
            try:
                if name in self._shards:
                    self.verify(name, dict(report))
                elif name != REPORT and _said(checksum(path)) != said:
                    found.append(f"{name!r} is not what was written")
            except FileNotFoundError:
                found.append(f"{name!r} is missing")
            except (OSError, ValueError) as error:  # the latter also of names that no file can have
                found.append(str(error).removeprefix(f"{self.out}/").rstrip("."))
        return found


def _text(value: Any, indent: int) -> str:
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def _is_of_jobs(path: Path) -> bool:
    """Whether a file in the folder of a result is the journal of a job, or a lock."""
    return path.name == _JOURNAL or (path.name.startswith(f"{_JOURNAL}.") and path.name.endswith(".lock"))


def _said(found: Checksum) -> dict[str, int]:
    return {"bytes": found.nbytes, "crc32": found.crc32}


def _index(plan: Plan) -> dict[str, Any]:
    sizes = [spec.nbytes for shard in plan.shards for spec in shard.outputs.values()]
    files = {name: shard.file for shard in plan.shards for name in shard.outputs}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}
