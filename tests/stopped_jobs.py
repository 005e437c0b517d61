"""Jobs of every kind on tiny models, stopped at any file operation and run again.

The date in model cards is that of SOURCE_DATE_EPOCH, which a caller sets: results are compared byte by byte.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console

import daq_jax as daq
from daq_jax.io.disk import swap
from daq_jax.io.jobs.options import Output, Run, in_layout
from daq_jax.io.jobs.orbax import open_orbax_job
from tests import adapters
from tests.hf_folders import CONFIG, in_shards, llama, to_fp8, tuned_from, write_folder
from tests.stops import Disk, Killed, Operation, When

ABSMAX = daq.recipes.absmax
FOLDER_JOBS = ("folder", "folder over an older one", "folder in two shares", "as-base", "adapter")
ORBAX_JOBS = ("Orbax", "Orbax over an older one", "Orbax over an older one by two renames", "save")
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
State = dict[str, Any]  # bytes or arrays, by name


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that can be run again.

    Attributes:
        name: what it is.
        run: does it, or what is left of it, below a folder.
        result: what a loader finds below that folder; None if it takes nothing there for a result.
        before: makes what is there before the job.
    """

    name: str
    run: Callable[[pathlib.Path], None]
    result: Callable[[pathlib.Path], State | None]
    before: Callable[[pathlib.Path], None] = lambda root: None


def names(root: pathlib.Path) -> list[str]:
    """Names directly below a folder."""
    return sorted(os.listdir(root))


def files(root: pathlib.Path) -> State:
    """The bytes of all files below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def folder_result(root: pathlib.Path) -> State | None:
    """Files of a Hugging Face folder, without those that loaders do not look at: hidden ones."""
    if not (root / "out" / "config.json").exists():
        return None
    return {n: data for n, data in files(root).items() if not any(p[0] == "." for p in n.split(os.sep))}


def orbax_result(root: pathlib.Path) -> State | None:
    """Arrays of an Orbax checkpoint; names of the files that hold them are drawn at random."""
    if not (root / "out").exists():
        return None
    leaves = jax.tree_util.tree_leaves_with_path(daq.load(root / "out"))
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


def folder_jobs(here: pathlib.Path) -> Iterator[Job]:
    """Jobs on Hugging Face folders, whose inputs are made below `here`."""
    plain = {n: x for n, x in llama(layers=1).items() if "mlp" not in n}
    tuned = write_folder(here / "tuned", in_shards(tuned_from(plain), 2))
    (tuned / "tokenizer.json").write_text("{}")
    base = write_folder(here / "base", [plain])
    coded = {}
    for name, x in plain.items():
        coded[name] = x
        if "_proj" in name:
            coded[name], coded[f"{name}_scale_inv"] = to_fp8(x.astype(np.float32))
    native = write_folder(here / "native", in_shards(coded, 2), CONFIG | FP8)
    modules = {n.removesuffix(".weight"): (128, 128) for n in plain if "_proj" in n}
    adapter = adapters.write_adapter(here / "adapter", adapters.lora(modules))

    def job(
        name: str, base: pathlib.Path, tuned: pathlib.Path, *shares: tuple[int, int], **options: Any
    ) -> Job:
        def run(root: pathlib.Path) -> None:
            for share in shares or ((1, 1),):
                daq.quantize_folder(base, tuned, root / "out", ABSMAX, memory_gb=2, shard=share, **options)

        def older(root: pathlib.Path) -> None:
            daq.quantize_folder(base, tuned, root / "out", ABSMAX, format="fp8-channel", memory_gb=2)

        return Job(name, run, folder_result, older if options.get("overwrite") else Job.before)

    one, over, shared, as_base, of_adapter = FOLDER_JOBS
    yield job(one, base, tuned)
    yield job(over, base, tuned, overwrite=True)
    yield job(shared, base, tuned, (1, 2), (2, 2))
    yield job(as_base, native, tuned)
    yield job(of_adapter, base, adapter)


def orbax_jobs(here: pathlib.Path) -> Iterator[Job]:
    """Jobs on Orbax checkpoints, whose inputs are made below `here`."""
    keys = jax.random.split(jax.random.key(0), 3)
    before = {f"w{i}": jax.random.normal(key, (128, 128)).astype(jnp.bfloat16) for i, key in enumerate(keys)}
    after = {name: x + (0.02 * x).astype(x.dtype) for name, x in before.items()}
    ocp.save(here / "orbax_base", before)
    ocp.save(here / "orbax_tuned", after)
    recipe = in_layout(ABSMAX, Output().layout)

    def run(root: pathlib.Path, *, overwrite: bool = False, tuned: str = "orbax_tuned") -> None:
        pair, how = (here / "orbax_base", here / tuned), Run(memory_gb=4, overwrite=overwrite)
        opened = open_orbax_job(
            *pair, root / "out", recipe, Output(), how, Console(quiet=True), unit_bytes=2**16
        )
        with opened as job:
            job.run()

    def older(root: pathlib.Path) -> None:
        run(root, tuned="orbax_base")

    def without_exchange(root: pathlib.Path) -> None:
        with mock.patch.object(swap, "_exchanged", return_value=False):
            run(root, overwrite=True)

    def save(root: pathlib.Path, tree: State) -> None:
        daq.save(root / "out", tree, overwrite=True)

    one, over, renamed, saved = ORBAX_JOBS
    yield Job(one, run, orbax_result)
    yield Job(over, lambda root: run(root, overwrite=True), orbax_result, older)
    yield Job(renamed, without_exchange, orbax_result, older)
    yield Job(saved, lambda root: save(root, after), orbax_result, lambda root: save(root, before))


@dataclasses.dataclass
class Trial:
    """A job, what it gives undisturbed, and what it is stopped at.

    Args:
        job: the job.
        root: a folder that may be emptied.
    """

    job: Job
    root: pathlib.Path

    def __post_init__(self) -> None:
        self.fresh()
        self.older = self.job.result(self.root)
        disk = Disk(self.root)
        with disk.watched():
            self.job.run(self.root)
        self.operations = disk.done
        self.wanted, self.names, self.files = self.seen()

    def fresh(self) -> None:
        """Makes the folder what it was before the job."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        self.job.before(self.root)

    def seen(self) -> tuple[State | None, list[str], State]:
        """What the job is held to: what loads, names beside it and, but for Orbax, every byte."""
        return self.job.result(self.root), names(self.root), {} if self.is_orbax else files(self.root)

    @property
    def is_orbax(self) -> bool:
        """Whether Orbax writes the files."""
        return self.job.result is orbax_result

    @property
    def own(self) -> list[Operation]:
        """The operations that are not Orbax's, which syncs none of its files; `put_in_place` does."""
        return [step for step in self.operations if ".partial_save" not in step.path]

    def points(self) -> Iterator[tuple[int, When]]:
        """All places at which the job can end."""
        for i, operation in enumerate(self.operations):
            yield i, "before"
            if operation.kind == "write":
                yield i, "halfway"
            yield i, "after"

    def stop(self, *points: tuple[int, When], power: bool = False) -> list[str]:
        """Runs the job, which ends at each of some points in turn, and once more to its end.

        Args:
            points: where it ends, counted in each run anew; a point past the end lets it end by itself.
            power: whether the disk loses all that was not synced.

        Returns:
            What went wrong, in words.
        """
        self.fresh()
        found = []
        for point in points:
            disk = Disk(self.root, *point)
            try:
                with disk.watched():
                    self.job.run(self.root)
            except Killed:
                pass
            except BaseException as error:
                found.append(f"{point}: {type(error).__name__}: {error}")
            if power:
                shutil.rmtree(self.root)
                disk.durable.write(self.root)
            result = self.job.result(self.root)
            if result not in (None, self.older, self.wanted):
                found.append(f"{point}: looks complete and is not")
        try:
            self.job.run(self.root)
        except Exception as error:
            found.append(f"{points}: run again: {type(error).__name__}: {error}")
        else:
            if self.seen() != (self.wanted, self.names, self.files):
                found.append(f"{points}: run again: not what an undisturbed run gives: {names(self.root)}")
        return found
