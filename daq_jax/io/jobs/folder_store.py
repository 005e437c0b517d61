"""The store of a job that writes a Hugging Face folder: its units are the safetensors files, called shards.

Side files, report and index are written once all shards are there, and the config last: without it no loader
takes the folder for a model.
"""

import contextlib
import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from daq_jax.errors import DaqError, refuse
from daq_jax.io.disk.atomic import Checksum, checksum, copy_file, make_folder, temporary_of, write_text
from daq_jax.io.disk.links import listed_below, stays_inside
from daq_jax.io.hf.folders import INDEX, SINGLE, Folder
from daq_jax.io.hf.methods import QUANTIZATION_FILE
from daq_jax.io.jobs.journal import REPORT, Record
from daq_jax.io.jobs.planning import Plan, Shard
from daq_jax.io.jobs.progress import Tell
from daq_jax.io.jobs.streaming import ShardJob, verify

CONFIG = "config.json"
_JOURNAL = ".daq"
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
_CODE = ".py"
# Files of a tokenizer that a tune may have changed; an adapter's own config must not come into a model.
_OF_TOKENIZER = ("added_tokens", "chat_template", "merges", "special_tokens", "tokenizer", "vocab")
_WRITTEN_HERE = (CONFIG, INDEX, REPORT)
# What tells a loader of adapters, or of codes as other quantizers store them.
_MISLEADING = re.compile(
    r"adapter_.*|quanto_qmap\.json|(.*[_.-])?quant(ize|ization)?[_.-].*\.json|smash_config\.json"
)
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

    @property
    def units(self) -> Mapping[str, int]:
        """See `Store.units`; the name of a unit is that of its file."""
        return {file: shard.tuned_bytes for file, shard in self._shards.items()}

    @property
    def lock(self) -> Path:
        """See `Store.lock`."""
        return self.out / _JOURNAL

    @functools.cached_property
    def side_files(self) -> "SideFiles":
        """Files beside the weights of the tuned model that are copied."""
        return side_files(self.tuned, self.custom_code)

    @property
    def files(self) -> Sequence[str]:
        """See `Store.files`."""
        beside = [QUANTIZATION_FILE] if self.plan.beside else []
        return [*self._shards, *map(str, self.side_files.copied), REPORT, INDEX, *beside, CONFIG]

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
        first = [self.out / name for name in (CONFIG, INDEX, REPORT)]  # which make the folder look complete
        for path in [*(p for p in first if p in mine), *sorted(mine.difference(first))]:
            path.unlink()
        for path in [p for name in ours for p in listed_below(self.out, [name])]:
            temporary_of(path).unlink(missing_ok=True)
            if path.parent != self.out:
                with contextlib.suppress(OSError):  # not there, or not empty
                    path.parent.rmdir()

    def has(self, unit: str) -> bool:
        """See `Store.has`."""
        return (self.out / unit).is_file()

    def write(self, unit: str, *, earlier: Sequence[Record], following: str | None, tell: Tell) -> Record:
        """See `Store.write`."""
        return ShardJob(self.plan, self.base, self.tuned, tell).do(self._shards[unit], self.out)

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
        texts = {INDEX: _text(_index(self.plan), 2)} if list(self._shards) != [SINGLE] else {}
        if self.plan.beside:
            texts[QUANTIZATION_FILE] = _text(self.plan.beside, 2)
        texts[CONFIG] = _text(self.plan.config, 2)
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
        for name, said in files.items():
            path = self.out / name
            try:
                if name in self._shards:
                    self.verify(name, dict(report))
                elif name != REPORT and _said(checksum(path)) != said:
                    found.append(f"{name!r} is not what was written")
            except FileNotFoundError:
                found.append(f"{name!r} is missing")
            except (OSError, DaqError) as error:
                found.append(str(error).removeprefix(f"{self.out}/").rstrip("."))
        return found


def _text(value: Any, indent: int) -> str:
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def _is_of_jobs(path: Path) -> bool:
    """Whether a file in the folder of a result is the journal of a job, or a lock."""
    return path.name == _JOURNAL or (path.name.startswith(f"{_JOURNAL}.") and path.name.endswith(".lock"))


def _said(found: Checksum) -> dict[str, int]:
    return {"bytes": found.nbytes, "crc32": found.crc32}


class SideFiles(NamedTuple):
    """Files beside the weights that a loader needs: tokenizer, chat template, other configs.

    Attributes:
        copied: the folder that each file is copied from, by its path relative to both folders.
        linked: paths of the files that are links out of their folder, and are not copied.
    """

    copied: dict[Path, Path]
    linked: list[Path]


def side_files(tuned: Folder, custom_code: bool) -> SideFiles:
    """Side files of a tuned model, one level deep; an overlay's files of the tokenizer stand in for its own.

    Files that would send a loader elsewhere, such as the config of an adapter, are not among them.

    Args:
        tuned: folder of the tuned model.
        custom_code: whether Python files are among the side files.
    """
    found = _beside(tuned.path, (*_SIDE_FILES, _CODE) if custom_code else _SIDE_FILES)
    if tuned.overlay is not None:
        above = _beside(tuned.overlay, _SIDE_FILES)
        found |= {p: folder for p, folder in above.items() if p.name.startswith(_OF_TOKENIZER)}
    copied = {p: folder for p, folder in found.items() if stays_inside(folder / p, folder)}
    return SideFiles(copied, [p for p in found if p not in copied])


def _beside(folder: Path, suffixes: tuple[str, ...]) -> dict[Path, Path]:
    """The side files of one folder, by their path relative to it, sorted."""
    found = [*folder.glob("*"), *folder.glob("[!.]*/*")]
    files = [p.relative_to(folder) for p in found if p.suffix in suffixes and p.is_file()]
    return {p: folder for p in sorted(files) if str(p) not in _WRITTEN_HERE and not _misleads(p)}


def _misleads(path: Path) -> bool:
    indexes = (".safetensors.index.json", ".bin.index.json")
    return path.name.endswith(indexes) or _MISLEADING.fullmatch(path.name) is not None


def _index(plan: Plan) -> dict[str, Any]:
    sizes = [spec.nbytes for shard in plan.shards for spec in shard.outputs.values()]
    files = {name: shard.file for shard in plan.shards for name in shard.outputs}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}
