"""One reader under atheris: `python -m benchmarks.fuzzing.engine READER FOLDER [options of libFuzzer]`.

FOLDER gets `corpus`, the inputs that reached something new; `findings`, the inputs whose outcome was neither
a result nor a `DaqError`, or came late; and `counts.json`.
"""

import hashlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import atheris
import jax
import jax.numpy as jnp

jax.block_until_ready(jnp.zeros(1))  # all of JAX that is used is loaded, and not instrumented
with atheris.instrument_imports(include=["daq_jax.io"], enable_loader_override=False):
    import daq_jax as daq
    from benchmarks.fuzzing.changes import change, words_of_readers
    from tests.readers import CORPUS, READERS

SLOW = 1.0  # seconds of this thread, not of the clock: others may be at work beside it
EVERY = 0.5  # seconds between two notes of the counts


class Engine:
    """A reader, and what came of the inputs that it was given."""

    def __init__(self, reader: str, folder: Path, scratch: Path) -> None:
        self.reader, self.folder = READERS[reader](scratch / reader), folder
        self.counts = {"executions": 0, "read": 0, "refused": 0, "crashes": 0, "hangs": 0, "slowest_s": 0.0}
        self.words, self.seen, self.noted = words_of_readers(), set[str](), 0.0
        for word in ("corpus", "findings"):
            (folder / word).mkdir(parents=True, exist_ok=True)

    def sow(self) -> None:
        """Writes the inputs to begin with."""
        kept = CORPUS / f"{self.reader.name}.json"
        texts = json.loads(kept.read_text()) if kept.is_file() else []
        for data in [*self.reader.seeds(), *(text.encode("latin-1") for text in texts)]:
            (self.folder / "corpus" / hashlib.sha1(data).hexdigest()).write_bytes(data)

    def try_one(self, data: bytes) -> None:
        """Gives the reader an input, and notes what came of it."""
        start = time.thread_time()
        try:
            said = self.reader.read(data)
            outcome = "refused" if said else "read"
        except daq.DaqError:
            raise
        except (Exception, SystemExit) as error:
            outcome = "crashes"
            frames = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if f"{os.sep}daq_jax{os.sep}" in f.filename
            ]
            where = frames[-1] if frames else None
            file = (
                "daq_jax" + where.filename.rpartition(f"{os.sep}daq_jax")[2]
                if where
                else "outside of daq_jax"
            )
            self._note(data, f"{type(error).__name__} in {file}, line {where.lineno if where else 0}")
        seconds = time.thread_time() - start
        if seconds > SLOW:
            self.counts["hangs"] += 1
            self._note(data, f"{outcome} after more than {SLOW:g} s")
        self.counts[outcome] += 1
        self.counts["executions"] += 1
        self.counts["slowest_s"] = max(self.counts["slowest_s"], round(seconds, 3))
        if time.monotonic() > self.noted + EVERY:
            self.noted = time.monotonic()
            (self.folder / "counts.json").write_text(json.dumps(self.counts))

    def _note(self, data: bytes, kind: str) -> None:
        """Keeps the first input of a kind."""
        if kind not in self.seen:
            self.seen.add(kind)
            path = self.folder / "findings" / hashlib.sha1(kind.encode()).hexdigest()[:12]
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(kind)

    def change(self, data: bytes, most: int, seed: int) -> bytes:
        """A new input, made from one before."""
        return change(bytes(data), most, random.Random(seed), self.words, atheris.Mutate)


def main() -> None:
    """Sets the reader up and does not return."""
    reader, folder, *options = sys.argv[1:]
    fast = Path("/dev/shm")
    scratch = tempfile.mkdtemp(dir=fast if fast.is_dir() else None)
    engine = Engine(reader, Path(folder), Path(scratch))
    engine.sow()
    how = {"custom_mutator": engine.change, "internal_libfuzzer": True}
    atheris.Setup([sys.argv[0], *options, str(engine.folder / "corpus")], engine.try_one, **how)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
