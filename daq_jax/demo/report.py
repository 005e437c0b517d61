"""A study in words: progress while it runs, then a table and one sentence on what its figures mean."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.box import HORIZONTALS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from daq_jax.demo.study import Result, Row, Tell


@contextlib.contextmanager
def progress_on(console: Console) -> Iterator[Tell]:
    """Yields a function that shows progress: as bars on a terminal, as plain lines elsewhere."""
    if not console.is_terminal:
        yield lambda task, done, total: console.print(f"{task}: {done}/{total}", highlight=False)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as progress:

        def tell(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = progress.add_task(task, total=total)
            progress.update(tasks[task], completed=done)

        yield tell


def _show(pattern: str, figure: float | None) -> str:
    return "" if figure is None else pattern.format(figure)


def kept(result: Result, row: Row) -> float:
    """The share of the tuning's effect on the loss on the second text that a model keeps; NaN without one."""
    gain = result.base.second_loss - result.tuned.second_loss
    return (result.base.second_loss - row.second_loss) / gain + 0.0 if gain else float("nan")  # no -0.0


def table_of(results: Sequence[Result]) -> Table:
    """One row for the bases, one for the tuned models, one for each recipe; the bases side by side."""
    table = Table(
        box=HORIZONTALS,  # without vertical lines all columns fit in a terminal of 80
        padding=0,
        title="What quantization to the grid of the base keeps of a tune",
        caption=f"kept: of what the tune gained on {results[0].second}\n"
        "KL: nats per byte, from the tuned model\n"
        "projection: 1 keeps the change at its size, 0 erases it",
    )
    table.add_column("recipe", no_wrap=True)
    headers: list[tuple[str, Callable[[Result, Row], str]]] = [
        ("sign\nrate", lambda result, row: _show("{:.0%}", row.sign_rate)),
        ("pro-\njection", lambda result, row: _show("{:.2f}", row.projection)),
        ("\nkept", lambda result, row: _show("{:.0%}", kept(result, row))),
        ("\nKL", lambda result, row: f"{row.divergence:.1e}"),
    ]
    for result in results:
        for i, (header, _) in enumerate(headers):
            table.add_column(f"{'' if i else result.grid}\n{header}", justify="right")
    for rows in zip(*((r.base, r.tuned, *r.recipes) for r in results), strict=True):
        cells = (show(r, row) for r, row in zip(results, rows, strict=True) for _, show in headers)
        table.add_row(rows[0].name, *cells, end_section=rows[0] == results[0].tuned)
    return table


def sentence_of(result: Result) -> str:
    """What the figures mean for the first and the last recipe, in one sentence."""
    gain = result.base.second_loss - result.tuned.second_loss
    if gain <= 0:
        return f"{result.grid}: tuning gained nothing on {result.second}, so there was nothing to keep."
    first, last = result.recipes[0], result.recipes[-1]
    low, high = sorted((first.divergence, last.divergence))
    word = "less" if last.divergence == low else "more"
    times = f", {high / low:.1f} times {word}" if low > 0 else ""
    return (
        f"{result.grid}: tuning moved the weights by {result.relative_change:.2%} and gained {gain:.3f} nats "
        f"per byte on {result.second}: "
        f"{first.name} keeps {kept(result, first):.0%} of that gain at a KL of {first.divergence:.1e} "
        f"from the tuned model, {last.name} keeps {kept(result, last):.0%} "
        f"at {last.divergence:.1e}{times}."
    )
