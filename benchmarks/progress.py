"""What a long benchmark is doing: bars on a terminal, lines elsewhere, and nothing silent for long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from daq_jax.demo.report import progress_on
from daq_jax.demo.study import Tell

EVERY = 1.5  # seconds without a line, after which one comes

Say = Callable[[str], None]


@contextlib.contextmanager
def telling(console: Console, every: float = EVERY) -> Iterator[tuple[Tell, Say]]:
    """Yields a function that takes what is being done, and one that takes a line of results.

    On a terminal each task has a bar with its elapsed time, and lines are above the bars. Elsewhere each call
    is a line with the seconds so far. What is being done is said again `every` seconds while nothing else is.
    """
    if console.is_terminal:
        with progress_on(console) as tell:
            yield tell, lambda line: console.print(line, highlight=False, markup=False)
        return
    start, lock, ended = time.monotonic(), threading.Lock(), threading.Event()
    now, last = "begin", start

    def say(line: str) -> None:
        nonlocal last
        with lock:
            last = time.monotonic()
            console.print(f"{last - start:4.0f} s  {line}", highlight=False, markup=False)

    def tell(task: str, done: int, total: int) -> None:
        nonlocal now
        now = f"{task}: {done}/{total}"
        say(now)

    def repeat() -> None:
        while not ended.wait(max(0.01, last + every - time.monotonic())):
            if time.monotonic() - last >= every:
                say(f"{now} ...")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield tell, say
    finally:
        ended.set()
        thread.join()
