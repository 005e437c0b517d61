"""Sheets as people see them in a terminal, and as programs read them."""

import csv
import io
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daq_jax import tables
from daq_jax.figures import FIGURES

_WIDE = 200  # characters, where no terminal says how many there are


def console() -> Console:
    """A console whose lines do not break where nobody looks at a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDE)


def show(sheet: tables.Sheet, on: Console) -> None:
    """Prints a sheet: what stands above it, the table, what stands below."""
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0))
    table.add_column("leaf", overflow="fold")
    for column in sheet.header:
        table.add_column(column.title, justify="right")
    totals = sum(name in tables.TOTALS for name, _ in sheet.rows)
    for number, (name, row) in enumerate(sheet.rows, 1):
        table.add_row(Text(name), *row, end_section=number == totals)
    for line in sheet.before:
        on.print(Text(line, style="bold"))
    on.print(table)
    for line in sheet.after:
        on.print(Text(line))


def comma_separated(table: Any) -> str:
    """A comparison as CSV: the total, then every leaf in its order, with plain numbers."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["leaf", *FIGURES])
    for path, figures in [("total", table.total), *table.leaves.items()]:
        plain = figures.to_dict()
        writer.writerow([path, *("" if plain[name] is None else plain[name] for name in FIGURES)])
    return file.getvalue()
