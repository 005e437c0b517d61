"""Sheets drawn in a terminal, and comparisons as CSV."""

import contextlib
import csv
import io
import threading
from collections.abc import Iterator

from rich.box import HORIZONTALS
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from daq_jax.analysis import sheets
from daq_jax.analysis.comparison import Comparison
from daq_jax.analysis.figures import FIGURES
from daq_jax.analysis.names import on_one_line, without_formula

_WIDE = 200  # characters, where no terminal says how many there are
_NAME = 24  # characters of a leaf's path on a line, at least, before columns are left out
_BETWEEN, _EDGES = 2, 3  # characters around a column, and around the table and its first column


def console() -> Console:
    """A console of the width of the terminal, or of 200 characters if the output is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDE)


@contextlib.contextmanager
def working(what: str, *, after: float = 1.0) -> Iterator[None]:
    """Says on stderr what is being done: on a terminal with the time that it takes, elsewhere in one line.

    Args:
        what: is being done.
        after: seconds, within which work that ends, or fails, prints no line.
    """
    on = Console(stderr=True)
    if not on.is_terminal:
        how = {"highlight": False, "markup": False, "soft_wrap": True}
        later = threading.Timer(after, on.print, [f"{what} ..."], how)
        later.start()
        try:
            yield
        finally:
            later.cancel()
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=on, transient=True) as bar:
        bar.add_task(what, total=None)
        yield


def show(sheet: sheets.Sheet, on: Console) -> None:
    """Prints a sheet. Columns that do not fit into the console are left out as a whole, and counted below."""
    fitting = _fitting(sheet, on.width)
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0))
    table.add_column("leaf", overflow="fold")
    for i, width in fitting.items():
        table.add_column(sheet.header[i].title, justify="right", width=width)
    totals = sum(name in sheets.TOTALS for name, _ in sheet.rows)
    for number, (name, row) in enumerate(sheet.rows, 1):
        table.add_row(Text(on_one_line(name)), *(row[i] for i in fitting), end_section=number == totals)
    for line in sheet.before:
        on.print(Text(line, style="bold"))
    on.print(table)
    hidden = len(sheet.header) - len(fitting)
    missing = [f"{hidden} columns do not fit into this terminal; `--json` gives all"] if hidden else []
    for line in [*missing, *sheet.after]:
        on.print(Text(line))


def _fitting(sheet: sheets.Sheet, width: int) -> dict[int, int]:
    """The columns that fit beside the names, and their widths. Columns of projections are left out last."""
    columns = range(len(sheet.header))
    titles = [column.title for column in sheet.header]
    cells = [max(len(row[i]) for _, row in sheet.rows) for i in columns]
    name = max(len(name) for name, _ in sheet.rows)
    whole = [max(len(titles[i]), cells[i]) for i in columns]
    if name + sum(n + _BETWEEN for n in whole) + _EDGES <= width:
        return dict(enumerate(whole))
    wrapped = [max(cells[i], *map(len, titles[i].split())) for i in columns]
    room, found = width - min(name, _NAME) - _EDGES, {}
    for i in sorted(columns, key=lambda i: "projection" not in sheet.header[i].figure):
        room -= wrapped[i] + _BETWEEN
        if room < 0:
            break
        found[i] = wrapped[i]
    return dict(sorted(found.items()))


def comma_separated(table: Comparison) -> str:
    """A comparison as CSV: a row for the total, then one for each leaf. A figure that is NaN is empty.

    A path that a spreadsheet would take for a formula has an apostrophe before it.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["leaf", *FIGURES])
    for path, figures in [("total", table.total), *table.leaves.items()]:
        plain = figures.to_dict()
        writer.writerow(
            [
                without_formula(on_one_line(path)),
                *("" if plain[name] is None else plain[name] for name in FIGURES),
            ]
        )
    return file.getvalue()
