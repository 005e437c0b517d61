"""The store of a job that writes an Orbax checkpoint, which `daq_jax.load` loads: its units are some leaves.

Such a checkpoint holds a tree of Flax's kind, so leaves are paired by path and the rules are those of
`daq_jax.quantize`. A leaf is read, quantized and written as a whole. Orbax collects what is written under
another name. Once all leaves are there and were read back, the checkpoint gets its own name; until then the
journal stands beside it.
"""

import contextlib
import dataclasses
import json
import math
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from daq_jax.analysis.comparison import compare
from daq_jax.analysis.figures import pool
from daq_jax.errors import DaqError
from daq_jax.io.disk.atomic import checksum, temporary_of, write_text
from daq_jax.io.disk.swap import new_beside, put_back, put_in_place, remove_tree
from daq_jax.io.jobs.job import Job
from daq_jax.io.jobs.journal import REPORT, Record
from daq_jax.io.jobs.memory import RUNTIME, runtime_of, work_of
from daq_jax.io.jobs.options import MissingBase, Output, Run
from daq_jax.io.jobs.progress import Expected, Running
from daq_jax.io.jobs.values import describe, flags
from daq_jax.io.orbax.reader import METADATA_KEY, VERSION, Checkpoint, array_names, nested
from daq_jax.io.orbax.replacing import lock_of, refuse_strangers
from daq_jax.pairs import Pair, refuse_unquantizable, warn_ambiguous, warn_unused
from daq_jax.quantization import quantize
from daq_jax.recipe import Recipe
from daq_jax.records import record_of
from daq_jax.rules import DEFAULT_RULES, Rule, decide_all
from daq_jax.version import __version__

_UNIT = 2**28  # bytes of tuned leaves that are written together

Leaves = dict[str, Any]  # by path


@dataclasses.dataclass(frozen=True)
class OrbaxPlan:
    """What will be done with a pair of Orbax checkpoints.

    Attributes:
        pairs: every leaf of the tuned checkpoint with its base, as shapes, by path.
        units: paths of the leaves that are read and written together, by the name of the unit.
        memory: bytes the work will take at most.
        no_base: paths of the leaves that are quantized without a base.
    """

    pairs: dict[str, Pair]
    units: dict[str, tuple[str, ...]]
    memory: int
    no_base: frozenset[str]

    @property
    def quantized(self) -> list[str]:
        """Paths of the leaves that are quantized."""
        return [path for path, pair in self.pairs.items() if pair.decision.quantize]

    def nbytes(self, paths: Sequence[str]) -> int:
        """Bytes of some leaves of the tuned checkpoint."""
        return sum(_nbytes(self.pairs[p].tuned) for p in paths)


def plan_orbax(
    base: Checkpoint,
    tuned: Checkpoint,
    recipe: Recipe,
    *,
    memory: int,
    missing_base: MissingBase,
    rules: Sequence[Rule] = DEFAULT_RULES,
    unit_bytes: int = _UNIT,
) -> OrbaxPlan:
    """Plans the quantization of one checkpoint against another, from metadata alone.

    Args:
        base: checkpoint before tuning.
        tuned: checkpoint after tuning.
        recipe: how to quantize.
        memory: bytes that the work may take.
        missing_base: what becomes of leaves whose base is missing or has another shape.
        rules: which leaves are quantized, and how.
        unit_bytes: bytes of tuned leaves that are written together, unless one leaf alone has more.

    Raises:
        DaqError: naming every leaf that cannot be quantized, or that takes more memory than there is.
    """
    pairs, no_base = {}, set()
    leaves = {path: tuned.abstract(path) for path in tuned.records}
    decisions = decide_all(leaves, rules, recipe)
    for path, leaf in leaves.items():
        how = decisions[path]
        found = base.abstract(path) if path in base.records else None
        if how.quantize and getattr(found, "shape", None) != leaf.shape and missing_base == "absmax":
            no_base.add(path)
            found = leaf
        pairs[path] = Pair(path, found, leaf, how)
    try:
        refuse_unquantizable(list(pairs.values()), check_finite=False)
    except DaqError as error:  # in one line, as all messages of folders
        raise DaqError(f"{tuned.path}: " + "; ".join(map(str.strip, str(error).splitlines()))) from error
    warn_unused(list(pairs.values()), rules)
    warn_ambiguous(list(pairs.values()))
    needed = _memory(tuned.path, list(pairs.values()), recipe, memory, unit_bytes)
    return OrbaxPlan(pairs, _units(pairs, unit_bytes), needed, frozenset(no_base))


def _memory(where: str, pairs: Sequence[Pair], recipe: Recipe, memory: int, unit_bytes: int) -> int:
    """Bytes that the work takes at most; refuses more than `memory`."""
    quantized = [pair for pair in pairs if pair.decision.quantize]
    if not quantized:
        raise DaqError(f"{where}: no leaf of it is quantized by these rules.")
    largest = max(quantized, key=lambda pair: pair.tuned.size)
    unit = min(unit_bytes, sum(_nbytes(pair.tuned) for pair in pairs))
    work = work_of(recipe).bytes_each * largest.tuned.size + 4 * unit
    programs = len({pair.program for pair in quantized})
    needed = max(RUNTIME, runtime_of(recipe, programs, gives_back=False)) + work
    if needed > memory:
        raise DaqError(
            f"{where}: {largest.path!r} is {tuple(largest.tuned.shape)}; with it the work takes "
            f"{needed / 1e9:.1f} GB: raise the memory given (--memory {math.ceil(needed / 1e8) / 10})."
        )
    return needed


def _nbytes(leaf: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf) if hasattr(x, "shape"))


def _units(pairs: Mapping[str, Pair], unit_bytes: int) -> dict[str, tuple[str, ...]]:
    """Leaves in order, in units of a bounded size; first leaves without bytes, which Orbax has none of."""
    units: list[list[str]] = [[]]
    for path in sorted(pairs, key=lambda p: _nbytes(pairs[p].tuned) > 0):
        if sum(_nbytes(pairs[p].tuned) for p in (*units[-1], path)) > unit_bytes and units[-1]:
            units.append([])
        units[-1].append(path)
    return {f"{i:05}": tuple(paths) for i, paths in enumerate(units)}


class OrbaxStore:
    """An Orbax checkpoint that grows by some leaves at a time; see `Store`.

    Args:
        out: absolute path of the result.
        base: checkpoint before tuning.
        tuned: checkpoint after tuning.
        recipe: how leaves are quantized.
        plan: what is written.
        reader: one thread, which reads the leaves of the next unit ahead.
    """

    readable = False  # Orbax opens no checkpoint that is not finalized
    instead = "another folder"

    def __init__(
        self,
        out: Path,
        base: Checkpoint,
        tuned: Checkpoint,
        recipe: Recipe,
        plan: OrbaxPlan,
        reader: ThreadPoolExecutor,
    ) -> None:
        self.out, self.base, self.tuned, self.recipe, self.plan = out, base, tuned, recipe, plan
        self.journal = self.lock = lock_of(out)
        self.units = {unit: plan.nbytes(paths) for unit, paths in plan.units.items()}
        self._new = new_beside(out)  # where the checkpoint is made and verified
        self._reader = reader
        self._compiled: set[Hashable] = set()
        self._ahead: dict[str, Future[tuple[Leaves, Leaves]]] = {}
        self._place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the result on the disk."""
        return sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())

    @property
    def files(self) -> Sequence[str]:
        """See `Store.files`; Orbax picks the names of the others."""
        return [REPORT]

    def missing_bytes(self) -> int:
        """0: Orbax compresses what it writes, so nothing is known before."""
        return 0

    def is_free(self) -> bool:
        """See `Store.is_free`; Orbax gives its checkpoint a name that must not be taken."""
        return not self.out.exists()

    def _partial(self) -> list[Path]:
        beside = self.out.parent.iterdir() if self.out.parent.is_dir() else []
        return [path for path in beside if path.name.startswith(f"{self._new.name}.partial_save")]

    def clear(self) -> None:
        """See `Store.clear`."""
        for path in (self.journal, self._new, *self._partial()):
            remove_tree(path)

    def make_room(self, ours: Sequence[str]) -> None:
        """See `Store.make_room`; the checkpoint that is there stays until the new one takes its place."""
        put_back(self.out)
        refuse_strangers(self.out, ours)
        self.clear()

    def has(self, unit: str) -> bool:
        """See `Store.has`."""
        return self._new.exists() or bool(self._partial()) or not self.units[unit]

    def expected(self, units: Sequence[str]) -> Expected:
        """See `Store.expected`."""
        every = [self.plan.pairs[path] for unit in units for path in self.plan.units[unit]]
        pairs = [pair for pair in every if pair.decision.quantize]
        programs = {pair.program for pair in pairs} - self._compiled
        return Expected(sum(_nbytes(pair.tuned) for pair in pairs), len(programs))

    def write(
        self, unit: str, *, earlier: Sequence[Record], following: str | None, running: Running
    ) -> Record:
        """See `Store.write`."""
        running.begin(self.plan.units[unit][-1], *self.expected([unit]))
        pairs = (self.plan.pairs[path] for path in self.plan.units[unit])
        self._compiled.update(pair.program for pair in pairs if pair.decision.quantize)
        if unit not in self._ahead:
            self._ahead[unit] = self._reader.submit(self._read, unit)
        base, tuned = self._ahead.pop(unit).result()
        if following is not None:
            self._ahead[following] = self._reader.submit(self._read, following)
        rules = [self.plan.pairs[path].decision.as_rule(path) for path in tuned]
        quantized = quantize(base, tuned, self.recipe, rules=rules)
        found = {
            p: f for p, f in compare(base, tuned, quantized).leaves.items() if p not in self.plan.no_base
        }
        records = self._save(unit, quantized, earlier[-1]["records"] if earlier else {})
        running.tell(unit, self.units[unit], pool(found.values()) if found else None)
        sums = {path: _checksum(quantized[path]) for path in self.plan.units[unit]}
        figures = {path: x.plain_sums() for path, x in found.items()}
        return {"records": records, "figures": figures, "crc32": sums}

    def _read(self, unit: str) -> tuple[Leaves, Leaves]:
        """The leaves of a unit, before and after; a leaf without a base is its own."""
        paths, plan = self.plan.units[unit], self.plan
        tuned = self.tuned.read(dict.fromkeys(paths, self._place))
        paired = [p for p in paths if plan.pairs[p].decision.quantize and p not in plan.no_base]
        return tuned | (self.base.read(dict.fromkeys(paired, self._place)) if paired else {}), tuned

    def _save(self, unit: str, quantized: Leaves, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Adds leaves to the checkpoint; returns the records of all leaves so far, for its metadata."""
        records, arrays = dict(earlier), {}
        for path in self.plan.units[unit]:
            record, named = record_of(quantized[path])
            records[path] = {**record, "keys": self.tuned.records[path]["keys"], "arrays": list(named)}
            arrays |= {place: named[name] for place, name in array_names(records[path]).items()}
        metadata: Any = {METADATA_KEY: {"version": VERSION, "leaves": records}}
        if arrays:
            try:
                ocp.partial.save(str(self._new), nested(arrays), custom_metadata=metadata)
            except Exception as error:  # killed before it was recorded, the same bytes are there already
                if type(error).__name__ != "PartialSaveReplacementError":  # which Orbax does not export
                    raise
        return records

    def verify(self, unit: str, record: Record) -> None:
        """See `Store.verify`."""
        checkpoint = Checkpoint.open(self._new)
        there = [path for path in record["crc32"] if path in checkpoint.records]
        found = checkpoint.read(dict.fromkeys(there, self._place))
        for path, expected in record["crc32"].items():
            if path not in found or _checksum(found[path]) != expected:
                raise OSError(f"{self.out}: leaf {path!r} is not what was written; check the disk.")

    def join(self) -> None:
        """See `Store.join`."""
        if self._new.exists():
            return
        try:
            ocp.partial.finalize(str(self._new))
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
            self.discard()
            why = f"{type(error).__name__}: {error}"
            raise OSError(
                f"{self.out}: what was written of it cannot be put together ({why}), "
                "and was removed; check the disk and call again."
            ) from error

    def discard(self) -> None:
        """See `Store.discard`."""
        for path in (self._new, *self._partial()):
            remove_tree(path)

    def complete(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the report, by which the checkpoint is known as a job's, and gives it its name."""
        temporary_of(self._new / REPORT).unlink(missing_ok=True)  # which a stop may have left
        paths = sorted(path for path in self._new.rglob("*") if path.is_file())
        files = {str(path.relative_to(self._new)): checksum(path)._asdict() for path in paths}
        written = {**report, "files": {**files, REPORT: {}}}
        write_text(self._new / REPORT, json.dumps(written, indent=1, allow_nan=False) + "\n")
        refuse_strangers(self.out, _files_of(self.out))
        put_in_place(self._new, self.out)
        for path in self._partial():  # which a stop may have left too
            remove_tree(path)
        return written

    def damaged(self, report: Mapping[str, Any]) -> list[str]:
        """See `Store.damaged`."""
        files, found = report.get("files"), []
        if not isinstance(files, dict) or not files:
            return [f"{REPORT!r} does not list its files"]
        for name, said in files.items():
            path = self.out / name
            if not path.is_file():
                found.append(f"{name!r} is missing")
            elif name != REPORT and checksum(path)._asdict() != said:
                found.append(f"{name!r} is not what was written")
        return found


def _files_of(out: Path) -> list[str]:
    """Names of the files that an earlier job wrote into a checkpoint."""
    return [REPORT] if (out / REPORT).is_file() else []


def _checksum(leaf: Any) -> int:
    """crc32 of the bytes of all arrays of a leaf."""
    found = 0
    for x in jax.tree.leaves(leaf):
        if isinstance(x, (jax.Array, np.ndarray)) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            found = zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, found)
    return found


@contextlib.contextmanager
def open_orbax_job(
    base: Path,
    tuned: Path,
    out: Path,
    recipe: Recipe,
    output: Output,
    run: Run,
    console: Console,
    *,
    unit_bytes: int = _UNIT,
) -> Iterator[Job]:
    """As `quantize_folders.open_job`, of two Orbax checkpoints; `unit_bytes` is that of `plan_orbax`.

    Raises:
        DaqError: as `quantize_folder`.
    """
    before, after = (Checkpoint.open(path.absolute()) for path in (base, tuned))
    rules = DEFAULT_RULES if output.rules is None else output.rules
    how = {"memory": run.memory, "missing_base": run.missing_base, "unit_bytes": unit_bytes}
    plan = plan_orbax(before, after, recipe, rules=rules, **how)
    settings = {
        "version": __version__,
        "format": output.layout.name,
        "target": output.target,
        "recipe": describe(recipe),
        "rules": describe(tuple(rules)),
        "missing_base": run.missing_base,
        "jax": flags(),
    }
    chosen = plan.quantized
    console.print(
        f"{len(chosen)} of {len(plan.pairs)} leaves are quantized, {plan.nbytes(chosen) / 1e9:.2f} of "
        f"{plan.nbytes(list(plan.pairs)) / 1e9:.2f} GB; needs {plan.memory / 1e9:.2f} GB of memory",
        highlight=False,
    )
    with ThreadPoolExecutor(1) as reader:
        store = OrbaxStore(out.absolute(), before, after, recipe, plan, reader)
        yield Job(
            store=store,
            inputs=_inputs(base=Path(before.path), tuned=Path(after.path)),
            settings=settings,
            summary={**settings, "quantized": chosen, "memory_bytes": plan.memory},
            overwrite=run.overwrite,
            console=console,
            memory=plan.memory,
        )


def _inputs(**folders: Path) -> dict[str, Path]:
    """All files of each checkpoint, by the name of the checkpoint and the file."""
    return {
        f"{word}/{path.relative_to(folder)}": path
        for word, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
