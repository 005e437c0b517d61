"""Orbax checkpoints, leaf by leaf: BASE and TUNED to a third, which `daq_jax.load` loads.

Such a checkpoint holds a tree of Flax's kind, so leaves are paired by path and the rules are those of
`daq_jax.quantize`. A leaf is read, quantized and written as a whole. Orbax collects what is written under
another name and gives the checkpoint its own when all is there; until then a folder beside it records what is
done.
"""

import collections
import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from daq_jax.analysis.comparison import compare
from daq_jax.analysis.figures import Figures, pool
from daq_jax.errors import DaqError
from daq_jax.io.hf.tensor_files import read_json, write_text
from daq_jax.io.jobs.journal import REPORT, fingerprint
from daq_jax.io.jobs.planning import RUNTIME, MissingBase, work_of
from daq_jax.io.jobs.progress import progress_on
from daq_jax.io.orbax.reader import OURS, VERSION, Checkpoint, array_names
from daq_jax.quantization import quantize
from daq_jax.recipe import Recipe
from daq_jax.records import record_of
from daq_jax.rules import DEFAULT_RULES, decide
from daq_jax.trees import Pair, refuse_unquantizable

_GROUP = 2**28  # bytes of leaves that are written together
_WORK_FILE = "work.json"


@dataclasses.dataclass(frozen=True)
class OrbaxPlan:
    """What will be done with a pair of Orbax checkpoints.

    Attributes:
        pairs: every leaf of the tuned checkpoint with its base, as shapes.
        groups: paths of the leaves that are read and written together.
        memory: bytes the work will take at most.
        no_base: leaves that are quantized without a base.
    """

    pairs: dict[str, Pair]
    groups: tuple[tuple[str, ...], ...]
    memory: int
    no_base: frozenset[str]

    def nbytes(self, paths: Sequence[str]) -> int:
        """Bytes of some leaves of the tuned checkpoint."""
        return sum(_nbytes(self.pairs[p].tuned) for p in paths)


def plan_orbax(
    base: Checkpoint, tuned: Checkpoint, recipe: Recipe, *, memory: int, missing_base: MissingBase
) -> OrbaxPlan:
    """Plans from metadata alone.

    Raises:
        DaqError: naming every leaf that cannot be quantized, or that takes more memory than there is.
    """
    pairs, no_base = {}, set()
    for path in tuned.records:
        leaf = tuned.abstract(path)
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        how = decide(path, len(getattr(leaf, "shape", ())), floating, DEFAULT_RULES, recipe)
        found = base.abstract(path) if path in base.records else None
        if how.quantize and getattr(found, "shape", None) != leaf.shape and missing_base == "absmax":
            no_base.add(path)
            found = leaf
        pairs[path] = Pair(path, found, leaf, how)
    try:
        refuse_unquantizable(list(pairs.values()), check_finite=False)
    except DaqError as error:  # one line, as of all commands
        raise DaqError(f"{tuned.path}: " + "; ".join(map(str.strip, str(error).splitlines()))) from error
    quantized = [p for p in pairs.values() if p.decision.quantize]
    if not quantized:
        raise DaqError(f"{tuned.path}: no leaf of it is quantized by the default rules.")
    largest = max(quantized, key=lambda p: p.tuned.size)
    needed = RUNTIME + work_of(recipe) * largest.tuned.size + 4 * _GROUP
    if needed > memory:
        raise DaqError(
            f"{tuned.path}: {largest.path!r} is {tuple(largest.tuned.shape)}; with it the work takes "
            f"{needed / 1e9:.1f} GB: raise the memory given (--memory {math.ceil(needed / 1e8) / 10})."
        )
    return OrbaxPlan(pairs, _groups(pairs), needed, frozenset(no_base))


def _nbytes(leaf: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf) if hasattr(x, "shape"))


def _groups(pairs: Mapping[str, Pair]) -> tuple[tuple[str, ...], ...]:
    """Leaves in order, in groups of a bounded size; those without bytes, which Orbax has none of, first."""
    groups: list[list[str]] = [[]]
    for path in sorted(pairs, key=lambda p: _nbytes(pairs[p].tuned) > 0):
        if sum(_nbytes(pairs[p].tuned) for p in (*groups[-1], path)) > _GROUP and groups[-1]:
            groups.append([])
        groups[-1].append(path)
    return tuple(map(tuple, groups))


class _Work:
    """The work on one result."""

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, out: Path, recipe: Recipe, plan: OrbaxPlan
    ) -> None:
        self.base, self.tuned, self.out, self.recipe, self.plan = base, tuned, out, recipe, plan
        self.journal = out.with_name(f".{out.name}.daq")
        self.place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def begin(self, key: str, overwrite: bool) -> None:
        """Makes ready, or finds what the same work left."""
        work = self.journal / _WORK_FILE
        found = read_json(work, "the record of earlier work").get("fingerprint") if work.is_file() else None
        if overwrite or found is None:
            leftovers = [self.journal, *self.out.parent.glob(f"{self.out.name}.partial_save*")]
            for path in [self.out, *leftovers] if overwrite else leftovers:
                shutil.rmtree(path, ignore_errors=True)
        elif found != key:
            raise DaqError(
                f"{self.out}: begun with other inputs, settings or versions; pass another folder, or "
                "--overwrite."
            )
        self.journal.mkdir(parents=True, exist_ok=True)
        write_text(work, json.dumps({"fingerprint": key}))

    def read(self, paths: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The leaves of a group, before and after; where there is no base, the tuned ones are that too."""
        tuned = self.tuned.read(dict.fromkeys(paths, self.place))
        paired = [p for p in paths if self.plan.pairs[p].decision.quantize and p not in self.plan.no_base]
        return tuned | (self.base.read(dict.fromkeys(paired, self.place)) if paired else {}), tuned

    def do(self, paths: Sequence[str], base: Any, tuned: Any, before: Mapping[str, Any]) -> dict[str, Any]:
        """Quantizes and writes a group; returns its record."""
        quantized = quantize(base, tuned, self.recipe)
        found = compare(base, tuned, quantized).leaves
        records, arrays = dict(before), {}
        for path in paths:
            record, named = record_of(quantized[path])
            records[path] = {**record, "keys": self.tuned.records[path]["keys"], "arrays": list(named)}
            arrays |= {words: named[name] for words, name in array_names(records[path]).items()}
        metadata: Any = {OURS: {"version": VERSION, "leaves": records}}
        if arrays:
            try:
                ocp.partial.save(str(self.out), _nested(arrays), custom_metadata=metadata)
            except Exception as error:
                # Killed after this was written and before it was recorded: the same bytes are there already.
                if type(error).__name__ != "PartialSaveReplacementError":  # which Orbax does not export
                    raise
        figures = {p: f.plain_sums() for p, f in found.items() if p not in self.plan.no_base}
        sums = {p: _sum(quantized[p]) for p in paths}
        return {"records": records, "figures": figures, "crc32": sums}

    def verify(self, record: Mapping[str, Any]) -> None:
        """Reads what is on the disk back and holds it to what was written."""
        written = Checkpoint.open(self.out)
        found = written.read(dict.fromkeys(record["crc32"], self.place))
        for path, expected in record["crc32"].items():
            if _sum(found[path]) != expected:
                raise OSError(f"{self.out}: leaf {path!r} is not what was written; check the disk.")


def _sum(leaf: Any) -> int:
    found = 0
    for x in jax.tree.leaves(leaf):
        if isinstance(x, (jax.Array, np.ndarray)) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            found = zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, found)
    return found


def _nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for words, array in arrays.items():
        node = tree
        for word in words[:-1]:
            node = node.setdefault(word, {})
        node[words[-1]] = array
    return tree


def quantize_orbax(
    base: Path,
    tuned: Path,
    out: Path,
    recipe: Recipe,
    about: Mapping[str, Any],
    *,
    memory: int,
    missing_base: MissingBase,
    overwrite: bool,
    plan_only: bool,
    console: Console,
) -> dict[str, Any]:
    """As `quantize_folder`, of two Orbax checkpoints; format and tiling are those of the recipe.

    Raises:
        DaqError, OSError: as `quantize_folder`.
    """
    before, after = (Checkpoint.open(path.absolute()) for path in (base, tuned))
    plan = plan_orbax(before, after, recipe, memory=memory, missing_base=missing_base)
    chosen = [p for p, pair in plan.pairs.items() if pair.decision.quantize]
    summary = {**about, "quantized": chosen, "memory_bytes": plan.memory}
    console.print(
        f"{len(chosen)} of {len(plan.pairs)} leaves are quantized, {plan.nbytes(chosen) / 1e9:.2f} of "
        f"{plan.nbytes(list(plan.pairs)) / 1e9:.2f} GB; needs {plan.memory / 1e9:.2f} GB of memory",
        highlight=False,
    )
    if plan_only:
        return summary
    work = _Work(before, after, out.absolute(), recipe, plan)
    files = [p for folder in (base, tuned) for p in sorted(folder.rglob("*")) if p.is_file()]
    key = fingerprint(files, about)
    if out.exists() and not overwrite:
        done = read_json(out / REPORT, "the report") if (out / REPORT).is_file() else {}
        if done.get("fingerprint") != key:
            raise DaqError(f"{out}: is there already; pass another folder, or --overwrite to replace it.")
        return done
    work.begin(key, overwrite)
    records = _carry_out(work, console)
    ocp.partial.finalize(str(work.out))
    for record in records:
        work.verify(record)
    figures = {p: Figures.from_sums(s) for record in records for p, s in record["figures"].items()}
    total = pool(figures.values()) if figures else None
    report = {"fingerprint": key, **summary, "total": total and total.to_dict()}
    report["leaves"] = {p: f.to_dict() for p, f in figures.items()}
    write_text(out / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(work.journal)
    return report


def _carry_out(work: _Work, console: Console) -> list[dict[str, Any]]:
    """Every group, in order, the next one read ahead; those with a record are done."""
    plan, records, known = work.plan, [], {}
    total = plan.nbytes(list(plan.pairs))
    with progress_on(console, total) as running, ThreadPoolExecutor(1) as reader:
        paths = [work.journal / f"{i:05}.json" for i in range(len(plan.groups))]
        todo = collections.deque(
            group for group, path in zip(plan.groups, paths, strict=True) if not path.is_file()
        )
        ahead = reader.submit(work.read, todo[0]) if todo else None
        for group, path in zip(plan.groups, paths, strict=True):
            if path.is_file():
                record = read_json(path, "the record of finished leaves")
            else:
                todo.popleft()
                assert ahead is not None
                pair = ahead.result()
                ahead = reader.submit(work.read, todo[0]) if todo else None
                record = work.do(group, *pair, known)
                write_text(path, json.dumps(record))
            known = record["records"]
            records.append(record)
            figures = [Figures.from_sums(s) for s in record["figures"].values()]
            running.tell(group[0], plan.nbytes(group), pool(figures) if figures else None)
    return records
