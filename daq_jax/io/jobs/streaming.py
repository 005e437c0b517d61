"""The work on one shard: reads, quantizes and writes at the same time, a few matrices in memory at once.

Two threads read the next pair of matrices while one pair is quantized, and a third writes the result of the
pair before it. Nothing waits in a queue, so memory does not depend on the size of the checkpoint.
"""

import dataclasses
import zlib
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from daq_jax.analysis.figures import Figures, pool
from daq_jax.errors import DaqError
from daq_jax.io.hf.bands import Leaf, figures_in_bands
from daq_jax.io.hf.folders import Folder
from daq_jax.io.hf.tensor_files import TensorReader, TensorSpec, TensorWriter, plan_file
from daq_jax.io.jobs.audit import Audit, is_untouched
from daq_jax.io.jobs.journal import Record
from daq_jax.io.jobs.memory import give_back
from daq_jax.io.jobs.planning import Plan, Shard, Task
from daq_jax.io.jobs.progress import Running
from daq_jax.leaves import lowered, quantize_leaf
from daq_jax.numerics.arithmetic import LARGEST_SQUARED
from daq_jax.qtensor import QTensor


class ShardJob:
    """The work on one shard.

    Args:
        plan: plan that the shard is part of.
        base: folder of the model before tuning.
        tuned: folder of the model after tuning.
        running: takes note of progress.
        compiled: kinds of bands that this process has done (`Task.program`), to which this shard's are added.
    """

    def __init__(
        self, plan: Plan, base: Folder, tuned: Folder, running: Running, compiled: set[Hashable]
    ) -> None:
        self.plan, self.base, self.tuned, self.running, self.compiled = plan, base, tuned, running, compiled
        self.sums: dict[str, int] = {}  # crc32 of each written tensor
        self.written: dict[str, int] = {}  # bytes of each so far
        self.figures: dict[str, Figures] = {}
        self.audits: dict[str, Audit] = {}  # of tensors in the format of their base

    def do(self, shard: Shard, out: Path) -> Record:
        """Writes the file of a shard into `out`; returns its record.

        Raises:
            DaqError: naming the tensor, if one holds NaN or infinity.
        """
        pools = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
        with TensorWriter(out / shard.file, shard.outputs) as file, pools[0] as readers, pools[1] as writer:
            self._fill(file, shard, readers, writer)
            file.finish()
        figures = {name: x.plain_sums() for name, x in self.figures.items()}
        audits = {name: dataclasses.asdict(audit) for name, audit in self.audits.items()}
        return {"crc32": self.sums, "figures": figures} | ({"audits": audits} if audits else {})

    def _fill(
        self, file: TensorWriter, shard: Shard, readers: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> None:
        """Reads, quantizes and writes all tensors of a shard, band by band."""
        bands = _bands(shard)
        band = next(bands, None)
        ahead = self._read(readers, *band) if band else []
        writing: Future[None] | None = None
        while band:
            (task, rows), pair = band, [leaf.result() for leaf in ahead]
            band = next(bands, None)
            ahead = self._read(readers, *band) if band else []
            known = len(self.compiled)
            self._announce(task, rows)
            result = self._result(task, rows, pair[-1], pair[0]) if pair else None
            del pair
            if len(self.compiled) > known:
                give_back()
            if writing:
                writing.result()
            writing = writer.submit(self._write, file, task, rows, result)
        if writing:
            writing.result()

    def _announce(self, task: Task, rows: slice) -> None:
        """Says which tensor is at hand, and whether its program has to be compiled first."""
        if not task.quantize:
            self.running.begin(task.name, 0, 0)
            return
        self.running.begin(task.name, task.nbytes_of(rows), int(self._is_new(task.program(rows))))

    def _is_new(self, kind: Hashable) -> bool:
        """Whether this process does something of a kind for the first time, so that it compiles a program."""
        is_new = kind not in self.compiled
        self.compiled.add(kind)
        return is_new

    def _read(self, readers: ThreadPoolExecutor, task: Task, rows: slice) -> list[Future[Leaf]]:
        """The tuned matrix, and its base if there is one, on their way; none for a tensor that is copied."""

        def one(folder: Folder, name: str) -> Leaf:
            leaf = folder.read(name, rows, task.dtype)
            # Sent to the device only once, and on a CPU not copied, as `jnp.asarray` would.
            return leaf if isinstance(leaf, QTensor) else jax.device_put(leaf)

        sources = [(self.tuned, task.name)] if task.quantize else []
        if task.quantize and task.base is not None:
            sources.append((self.base, task.base.name))
        return [readers.submit(one, *source) for source in sources]

    def _result(self, task: Task, rows: slice, base: Leaf, tuned: Leaf) -> QTensor | None:
        """Codes and scales of a pair; None if they are those of the base, whose bytes are kept."""
        if not task.as_base:
            return self._quantize(task, rows, base, tuned)
        assert isinstance(base, QTensor)
        assert task.coding is not None
        base = dataclasses.replace(base, format=task.coding.full_format)
        if is_untouched(base, tuned):
            self._note(task, base, tuned, base)
            self.audits[task.name] = self.audits.get(task.name, Audit()) + Audit.of_untouched(base)
            return None
        q = self._quantize(task, rows, base, tuned)
        self.audits[task.name] = self.audits.get(task.name, Audit()) + Audit.of(base, q)
        return q

    def _quantize(self, task: Task, rows: slice, base: Leaf, tuned: Leaf) -> QTensor:
        """Codes and scales of a pair."""
        stream = zlib.crc32(f"{task.name}:{rows.start}".encode())
        how = {"recipe": task.recipe, "matrix": task.tuned.matrix}
        if self._is_new(("quantize", task.program(rows))) and jax.default_backend() == "cpu":
            lowered(base, tuned, **how).compile()  # which the call below takes from JAX's own cache
            give_back()  # the compiler's memory, before the program takes its own
        q = quantize_leaf(base, tuned, **how, stream=stream)
        if not bool(jnp.isfinite(q.scale).all()):  # what a tile that holds NaN or infinity gets
            raise DaqError(
                f"{task.tuned.file}: tensor {task.name!r} holds NaN or infinity in base or tuned, or a "
                f"weight beyond {LARGEST_SQUARED:g}, whose square most recipes cannot use; every weight "
                "must be finite: mend the checkpoint."
            )
        if task.base is not None:
            self._note(task, base, tuned, q)
        return q

    def _note(self, task: Task, base: Leaf, tuned: Leaf, q: QTensor) -> None:
        """Adds the figures of a band to those of its tensor."""
        found = figures_in_bands(base, tuned, q)
        before = self.figures.get(task.name)
        self.figures[task.name] = found if before is None else pool([before, found])

    def _write(self, file: TensorWriter, task: Task, rows: slice, q: QTensor | None) -> None:
        """Writes what one band gives."""
        if not task.quantize:
            for data in self._kept(task):
                self._put(file, task.name, data)
        else:
            assert task.coding is not None
            found = self.base.stored(task.name, rows) if q is None else task.coding.encode(q)
            if rows.start == 0:
                found |= task.coding.constants
            for name, data in found.items():
                self._put(file, name, data)
        self.running.tell(task.name, task.nbytes_of(rows), self.figures.get(task.name))

    def _kept(self, task: Task) -> Iterator[np.ndarray]:
        """A tensor that is not quantized, some bytes at a time: as it is stored, or dequantized."""
        folder = self.base if task.from_base else self.tuned
        if task.tuned.coding is None:
            yield from folder.chunks(task.name)
            return
        for rows in task.bands:
            q = folder.read(task.name, rows, task.dtype)
            assert isinstance(q, QTensor)
            plain = np.asarray(q.dequantize(task.outputs[task.name].numpy_dtype))
            yield np.swapaxes(plain, -1, -2) if task.tuned.turned else plain
            if self._is_new(("kept", task.program(rows))):
                give_back()

    def _put(self, file: TensorWriter, name: str, data: np.ndarray) -> None:
        """Writes the next bytes of a tensor: bands of a matrix, and matrices of a stack, come in order."""
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        at = self.written.get(name, 0)
        file.write(name, data, at)
        self.written[name] = at + data.nbytes
        self.sums[name] = zlib.crc32(data.data, self.sums.get(name, 0))


def _bands(shard: Shard) -> Iterator[tuple[Task, slice]]:
    """The bands of all tensors of a shard, in order; a tensor that is copied is one band."""
    for task in shard.tasks:
        whole = slice(0, task.tuned.shape[0] if task.tuned.shape else 1)
        yield from ((task, rows) for rows in (task.bands if task.quantize else [whole]))


def verify(path: Path, outputs: Mapping[str, TensorSpec], sums: Mapping[str, int]) -> None:
    """Reads a finished file back and compares each tensor with the checksum of what was to be written.

    Args:
        path: path of the file.
        outputs: dtype and shape of each tensor.
        sums: crc32 of each tensor.

    Raises:
        OSError: naming the tensor that differs.
    """
    _, entries = plan_file(outputs)
    reader = TensorReader(path)
    try:
        for name, entry in entries.items():
            found = 0
            for chunk in reader.chunks(name) if reader.entries.get(name) == entry else ():
                found = zlib.crc32(chunk.data, found)
            if reader.entries.get(name) != entry or found != sums.get(name, 0):
                raise OSError(f"{path}: tensor {name!r} is not what was written; check the disk.")
    finally:
        reader.close()
