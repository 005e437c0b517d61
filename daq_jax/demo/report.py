"""A study in words: progress while it runs, then a table and one sentence on what its figures mean."""

import contextlib
from collections.abc import Callable, Iterator

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


def table_of(result: Result) -> Table:
    """One row for the base, one for the tuned model, one for each recipe."""
    table = Table(
        box=HORIZONTALS,  # without vertical lines all columns fit in a terminal of 80
        padding=0,
        title=f"What quantization keeps of a tune that moved the weights by {result.relative_change:.2%}",
        caption="loss, KL: nats per byte of held-out text; KL: from the tuned model\n"
        "projection: 1 keeps the change at its size, 0 erases it",
    )
    table.add_column("recipe", no_wrap=True)
    headers: list[tuple[str, Callable[[Row], str]]] = [
        ("sign\nrate", lambda row: _show("{:.1%}", row.sign_rate)),
        ("cosine", lambda row: _show("{:.3f}", row.cosine)),
        ("projection", lambda row: _show("{:.2f}", row.projection)),
        ("mse", lambda row: _show("{:.1e}", row.mse)),
        (f"{result.first}\nloss", lambda row: f"{row.first_loss:.3f}"),
        (f"{result.second}\nloss", lambda row: f"{row.second_loss:.3f}"),
        ("KL", lambda row: f"{row.divergence:.1e}"),
    ]
    for header, _ in headers:
        table.add_column(header, justify="right")
    for row in (result.base, result.tuned, *result.recipes):
        table.add_row(
            row.name,
            *(show(row) for _, show in headers),
            end_section=row == result.tuned,
        )
    return table


def sentence_of(result: Result) -> str:
    """What the figures mean for the first and the last recipe, in one sentence."""
    gain = result.base.second_loss - result.tuned.second_loss
    if gain <= 0:
        return f"Tuning gained nothing on {result.second} here, so there was nothing to keep."

    def kept(row: Row) -> str:
        return f"{(result.base.second_loss - row.second_loss) / gain:.0%}"

    first, last = result.recipes[0], result.recipes[-1]
    low, high = sorted((first.divergence, last.divergence))
    word = "less" if last.divergence == low else "more"
    times = f", {high / low:.1f} times {word}" if low > 0 else ""
    return (
        f"Tuning gained {gain:.3f} nats per byte on {result.second}: "
        f"{first.name} keeps {kept(first)} of that gain at a KL of {first.divergence:.1e} "
        f"from the tuned model, {last.name} keeps {kept(last)} "
        f"at {last.divergence:.1e}{times}."
    )
