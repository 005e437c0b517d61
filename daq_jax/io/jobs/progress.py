"""What people see of the work on a folder: the plan as a table, progress, and what was kept at the end."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.box import HORIZONTALS
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from daq_jax.analysis.figures import Figures, pool
from daq_jax.analysis.names import printable
from daq_jax.io.jobs.pace import Pace
from daq_jax.io.jobs.planning import Plan

_LOW_SHARE = 0.5  # of the elements: fewer quantized is worth a warning
_SECONDS = 10.0  # between two plain lines


class Expected(NamedTuple):
    """What is to come of a job."""

    nbytes: int  # of weights that are quantized
    programs: int  # that are compiled for them


# (tensor, bytes of it that were done just now, its figures so far)
Tell = Callable[[str, int, Figures | None], None]


def _size(nbytes: float | int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def table_of(plan: Plan, note: str) -> Table:
    """A plan as a table: what is quantized, what is kept and why, bytes and memory."""
    tasks = [task for task in plan.tasks if task.quantize]
    table = Table("what", "tensors", "stored now", "example", box=HORIZONTALS)
    groups = {f"quantize to {plan.format}": [task for task in tasks if task.base]}
    groups["quantize without base"] = [task for task in tasks if not task.base]
    groups |= {f"keep: {why}": kept for why, kept in plan.kept.items()}
    for what, group in groups.items():
        if group:
            now = sum(task.tuned.nbytes for task in group)
            table.add_row(escape(what), str(len(group)), _size(now), escape(group[0].name))
    for name, why in plan.dropped.items():
        table.add_row(escape(f"leave out: {why}"), "1", "", escape(name))
    now = sum(task.tuned.nbytes for task in plan.tasks)
    table.add_section()
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    table.add_row("all", str(len(plan.tasks)), _size(now), files)
    table.caption = (
        f"writes {_size(plan.nbytes)}, needs {_size(plan.memory)} of memory; "
        f"{plan.share:.1%} of the elements are quantized\n{note}"
    )
    return table


def warning_of(plan: Plan) -> str:
    """A sentence where little is quantized; "" otherwise."""
    if plan.share >= _LOW_SHARE:
        return ""
    return (
        f"warning: only {plan.share:.1%} of the elements are quantized; the table says why others are kept."
    )


class Running:
    """Bytes done and figures so far, told by one thread and shown by another.

    Args:
        total: bytes that the work takes in all.
        show: called with this object after each change.
        expected: bytes of the weights that are quantized, and programs that are compiled for them; None if
            it is not known, and then no time is estimated.
    """

    def __init__(self, total: int, show: Callable[["Running"], None], expected: Expected | None) -> None:
        self.total, self.done = total, 0
        self._show = show
        self._now = ""
        self._programs = 0 if expected is None else expected.programs
        self._compiled = 0
        self._pace = None if expected is None else Pace(*expected, time.monotonic)
        self._finished: Figures | None = None  # of all tensors but the one at hand
        self._at_hand: tuple[str, Figures] | None = None

    def begin(self, name: str, nbytes: int, programs: int) -> None:
        """Takes note that work on a tensor begins.

        Args:
            name: of the tensor.
            nbytes: bytes of it that are quantized now.
            programs: programs that are compiled first.
        """
        self._now = printable(name)
        if programs:
            first, self._compiled = self._compiled + 1, self._compiled + programs
            which = f"shape {first}" if programs == 1 else f"shapes {first} to {self._compiled}"
            self._now += f" (compiling {which} of {max(self._programs, self._compiled)})"
        if self._pace:
            self._pace.begin(nbytes, programs)
        self._show(self)

    def tell(self, name: str, nbytes: int, figures: Figures | None) -> None:
        """Takes note that more of a tensor is done; `figures` are the figures of all its bands so far."""
        self.done += nbytes
        if figures is not None:
            if self._at_hand and self._at_hand[0] != name:
                self._finished = self.pooled
            self._at_hand = name, figures
        self._show(self)

    @property
    def left(self) -> str:
        """How long the rest takes, if that is known."""
        seconds = self._pace.seconds_left if self._pace and self.done < self.total else None
        if seconds is None:
            return ""
        return (
            f"about {max(seconds, 1):.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"
        )

    @property
    def pooled(self) -> Figures | None:
        """Figures of everything so far."""
        parts = [x for x in (self._finished, self._at_hand and self._at_hand[1]) if x is not None]
        return pool(parts) if parts else None

    @property
    def words(self) -> str:
        """Sign rate and projection so far, and the tensor at hand."""
        found = self.pooled
        kept = ""
        if found is not None:
            kept = f"sign rate {float(found.sign_rate):.1%}, projection {float(found.projection):.3f}"
            kept = kept if float(found.dd) else "no change so far"
        return ", ".join(filter(None, (kept, self._now)))


class _Bar(Progress):
    """A bar with times, and below it the figures so far and the tensor at hand."""

    def __init__(self, running: Running, console: Console) -> None:
        self._words = ""
        left = TextColumn("{task.fields[running].left}", style="progress.remaining")
        times = TimeElapsedColumn(), left, TransferSpeedColumn()
        super().__init__(BarColumn(20), TaskProgressColumn(), *times, console=console)
        self._task = self.add_task("", total=running.total, running=running)

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn, again and again: the time left goes down between two steps too."""
        yield from super().get_renderables()
        yield Text(self._words)

    def show(self, running: Running) -> None:
        """Moves the bar, and takes the words below it."""
        self._words = running.words
        self.update(self._task, completed=running.done)


@contextlib.contextmanager
def progress_on(console: Console, total: int, expected: Expected | None = None) -> Iterator[Running]:
    """Yields what takes note of progress: a bar on a terminal, plain lines elsewhere.

    Arguments are as for `Running`.
    """
    start, last = time.monotonic(), -math.inf  # the first line comes at once

    def plain(running: Running) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS or running.done >= running.total:
            last = now
            share = running.done / max(running.total, 1)
            speed = f"{_size(running.done / max(now - start, 1e-9))}/s" if running.done else ""
            words = f"{share:.0%} of {_size(total)}", speed, running.left, running.words
            console.print(", ".join(filter(None, words)), highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield Running(total, plain, expected)
        return
    running = Running(total, lambda running: bar.show(running), expected)
    with _Bar(running, console) as bar:
        yield running


def result_of(total: Figures | None, nbytes: int, seconds: float, peak: int, promised: int) -> str:
    """What was done, in one line, with the memory that it took beside what the plan said."""
    kept = ""
    if total is not None and not float(total.dd):
        kept = "; tuned does not differ from base in these weights"
    elif total is not None:
        kept = (
            f"; of the change, sign rate {float(total.sign_rate):.1%}, cosine {float(total.cosine):.3f}, "
            f"projection {float(total.projection):.3f}"
        )
    memory = f"at most {_size(peak)} of memory (of {_size(promised)} planned)"
    return f"wrote {_size(nbytes)} in {seconds:.1f} s, {memory}{kept}"
