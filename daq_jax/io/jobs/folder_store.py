"""The store of a job that writes a Hugging Face folder: its units are the safetensors files, called shards.

Side files, report and index are written once all shards are there, and the config last: without it no loader
takes the folder for a model.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daq_jax.io.hf.folders import INDEX, SINGLE, Folder
from daq_jax.io.hf.tensor_files import write_text
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
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return self.plan.nbytes

    def missing_bytes(self) -> int:
        """Bytes of all shards, without those of files that are there."""
        there = [self.out / file for file in self._shards]
        return self.nbytes - sum(path.stat().st_size for path in there if path.is_file())

    def is_free(self) -> bool:
        """See `Store.is_free`."""
        return not self.out.exists() or all(path == self.journal for path in self.out.iterdir())

    def clear(self, *, result: bool) -> None:
        """With `result`, removes what a checkpoint folder holds; files of another kind stay."""
        if not result:  # a folder that is free has nothing to remove
            return
        for name in (CONFIG, INDEX, REPORT):  # first the files that make the folder look complete
            (self.out / name).unlink(missing_ok=True)
        for path in [*self.out.glob("*.safetensors"), *self.out.glob(".*.partial")]:
            path.unlink()

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

    def complete(self, report: Mapping[str, Any]) -> None:
        """Writes side files, report and index, and the config last."""
        for path, folder in self._side_files().items():
            (self.out / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, self.out / path)
        write_text(self.out / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
        if list(self._shards) != [SINGLE]:
            write_text(self.out / INDEX, json.dumps(_index(self.plan), indent=2) + "\n")
        write_text(self.out / CONFIG, json.dumps(_config(self.plan, self.tuned), indent=2) + "\n")

    def _side_files(self) -> dict[Path, Path]:
        """Files to copy, relative to the folder that each is copied from."""
        found = dict.fromkeys(side_files(self.tuned.path, self.custom_code), self.tuned.path)
        if self.tuned.overlay is not None:
            above = side_files(self.tuned.overlay, custom_code=False)
            found |= {p: self.tuned.overlay for p in above if p.name.startswith(_OF_TOKENIZER)}
        return found


def side_files(folder: Path, custom_code: bool) -> list[Path]:
    """Files beside the weights that a loader needs, one level deep: tokenizer, chat template, other configs.

    Args:
        folder: folder of the tuned model.
        custom_code: whether Python files are among the side files.

    Returns:
        Paths relative to `folder`, sorted.
    """
    suffixes = (*_SIDE_FILES, _CODE) if custom_code else _SIDE_FILES
    found = [*folder.glob("*"), *folder.glob("[!.]*/*")]
    files = [p.relative_to(folder) for p in found if p.suffix in suffixes and p.is_file()]
    indexes = (".safetensors.index.json", ".bin.index.json")
    return sorted(p for p in files if str(p) not in _WRITTEN_HERE and not p.name.endswith(indexes))


def _index(plan: Plan) -> dict[str, Any]:
    sizes = [spec.nbytes for shard in plan.shards for spec in shard.outputs.values()]
    files = {name: shard.file for shard in plan.shards for name in shard.outputs}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}


def _config(plan: Plan, tuned: Folder) -> dict[str, Any]:
    config = {k: v for k, v in tuned.config.items() if k not in ("quantization_config", "compression_config")}
    return config | {"quantization_config": plan.layout.config(plan.skipped)}
