"""Carries out a plan: reads, quantizes and writes at the same time, a few matrices in memory at once.

Two threads read the next pair of matrices while this one quantizes, and another writes the last. Nothing
waits in a queue, so memory does not depend on the size of the checkpoint.
"""

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from daq_jax.analysis.figures import Figures, pool
from daq_jax.errors import DaqError
from daq_jax.io.hf.folders import Folder
from daq_jax.io.hf.tensor_files import TensorReader, TensorWriter
from daq_jax.io.jobs.bands import Leaf, figures_in_bands
from daq_jax.io.jobs.journal import Journal
from daq_jax.io.jobs.planning import Job, Plan, Shard
from daq_jax.leaves import quantize_leaf
from daq_jax.qtensor import QTensor

Tell = Callable[[str, int, Figures | None], None]  # (tensor, bytes of tuned done, its figures)


def carry_out(
    plan: Plan, base: Folder, tuned: Folder, journal: Journal, shards: list[Shard], tell: Tell
) -> None:
    """Writes those of the plan's shards that are not finished yet.

    Raises:
        DaqError: naming the tensor, if one holds NaN or infinity.
        OSError: if what is on the disk is not what was written.
    """
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as writer:
        for shard in shards:
            with journal.alone(shard.file, wait=False):
                done = journal.record(shard.file)
                if done is None:
                    _Work(plan, base, tuned, journal, tell).do(shard, readers, writer)
                else:
                    figures = [Figures.from_sums(sums) for sums in done["figures"].values()]
                    tell(shard.file, shard.tuned_bytes, pool(figures) if figures else None)


class _Work:
    """The work on one shard."""

    def __init__(self, plan: Plan, base: Folder, tuned: Folder, journal: Journal, tell: Tell) -> None:
        self.plan, self.base, self.tuned, self.journal, self.tell = plan, base, tuned, journal, tell
        self.sums: dict[str, int] = {}  # crc32 of each written tensor
        self.written: dict[str, int] = {}  # bytes of each so far
        self.figures: dict[str, Figures] = {}

    def do(self, shard: Shard, readers: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> None:
        """Writes one shard, reads it back and records it."""
        with TensorWriter(self.journal.out / shard.file, shard.outputs) as file:
            self.fill(file, shard, readers, writer)
            file.finish()
            verify(file, self.sums)
        figures = {name: found.plain_sums() for name, found in self.figures.items()}
        self.journal.finish(shard.file, {"crc32": self.sums, "figures": figures})

    def fill(
        self, file: TensorWriter, shard: Shard, readers: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> None:
        """Reads, quantizes and writes all tensors of a shard."""
        units = _units(shard)
        unit = next(units, None)
        ahead = self.read(readers, *unit) if unit else []
        writing: Future[None] | None = None
        while unit:
            (job, part), pair = unit, [leaf.result() for leaf in ahead]
            unit = next(units, None)
            ahead = self.read(readers, *unit) if unit else []
            result = self.quantize(job, part, pair[-1], pair[0]) if pair else None
            del pair
            if writing:
                writing.result()
            writing = writer.submit(self.write, file, job, part, result)
        if writing:
            writing.result()

    def read(self, readers: ThreadPoolExecutor, job: Job, part: slice) -> list[Future[Leaf]]:
        """The tuned matrix, and its base if there is one, on their way; none for a tensor that is copied."""

        def one(folder: Folder, name: str) -> Leaf:
            leaf = folder.read(name, part, self.plan.dtype)
            return leaf if isinstance(leaf, QTensor) else jnp.asarray(leaf)  # sent to the device only once

        sources = [(self.tuned, job.name)] if job.quantize else []
        if job.quantize and job.base is not None:
            sources.append((self.base, job.base.name))
        return [readers.submit(one, *source) for source in sources]

    def quantize(self, job: Job, part: slice, base: Leaf, tuned: Leaf) -> QTensor:
        """Codes and scales of a pair."""
        stream = zlib.crc32(f"{job.name}:{part.start}".encode())
        q = quantize_leaf(base, tuned, recipe=self.plan.recipe, matrix=job.tuned.matrix, stream=stream)
        if not bool(jnp.isfinite(q.scale).all()):  # what a tile that holds NaN or infinity gets
            raise DaqError(
                f"{job.tuned.file}: tensor {job.name!r} holds NaN or infinity in base or tuned; every weight "
                "must be finite: mend the checkpoint."
            )
        if job.base is not None:
            found = figures_in_bands(base, tuned, q)
            before = self.figures.get(job.name)
            self.figures[job.name] = found if before is None else jax.tree.map(_add, before, found)
        return q

    def write(self, file: TensorWriter, job: Job, part: slice, q: QTensor | None) -> None:
        """Writes what one unit gives."""
        if q is None:
            for data in self.kept(job):
                self.put(file, job.name, data)
        else:
            found = self.plan.layout.arrays(job.name, q)
            if part.start == 0:
                found |= self.plan.layout.constants(job.name, job.tuned.shape)
            for name, data in found.items():
                self.put(file, name, data)
        rows = job.tuned.shape[0] if job.tuned.shape else 1
        share = (part.stop - part.start) / max(rows, 1)
        self.tell(job.name, int(job.tuned.nbytes * share), self.figures.get(job.name))

    def kept(self, job: Job) -> Iterator[np.ndarray]:
        """A tensor that is not quantized, piece by piece: as it is stored, or dequantized."""
        if job.tuned.coding is None:
            yield from self.tuned.chunks(job.name)
            return
        for part in job.parts:
            q = self.tuned.read(job.name, part, self.plan.dtype)
            assert isinstance(q, QTensor)
            yield np.asarray(q.dequantize())

    def put(self, file: TensorWriter, name: str, data: np.ndarray) -> None:
        """Writes the next bytes of a tensor: bands of a matrix, and matrices of a stack, come in order."""
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        at = self.written.get(name, 0)
        file.write(name, data, at)
        self.written[name] = at + data.nbytes
        self.sums[name] = zlib.crc32(data.data, self.sums.get(name, 0))


def _units(shard: Shard) -> Iterator[tuple[Job, slice]]:
    for job in shard.jobs:
        whole = slice(0, job.tuned.shape[0] if job.tuned.shape else 1)
        yield from ((job, part) for part in (job.parts if job.quantize else [whole]))


def _add(a: Any, b: Any) -> Any:
    return a + b


def verify(file: TensorWriter, sums: dict[str, int]) -> None:
    """Reads a finished file back and holds each tensor to the sum of what was meant to be written.

    Raises:
        OSError: naming the tensor that differs.
    """
    reader = TensorReader(file.path)
    try:
        for name, entry in file.entries.items():
            found = 0
            for chunk in reader.chunks(name) if reader.entries.get(name) == entry else ():
                found = zlib.crc32(chunk.data, found)
            if found != sums.get(name, 0):
                raise OSError(f"{file.path}: tensor {name!r} is not what was written; check the disk.")
    finally:
        reader.close()
