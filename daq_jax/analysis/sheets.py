"""Tables of words: what a comparison and an inspection show of themselves.

A `Sheet` is data. `text` and `html` write it for notebooks, and `daq_jax.display` draws it in terminals and
on pages. The total comes first. Then come leaves, the leaf of which least is kept first.
"""

import html as html_format
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from daq_jax.analysis.estimates import Findings
from daq_jax.analysis.figures import ON_GRID, Figures
from daq_jax.analysis.verdicts import verdict_of_result

TOTALS = ("total", "give or take")  # rows that are not leaves
SHOWN = 10  # leaves in a table that shows itself

ABOUT = "projection: 1 keeps the change at its size, 0 erases it; cosine and sign rate do not see its size"
ON_GRID_NOTE = (
    "The base lies on the grid of the codes, where the sign rate misleads: a small change that is kept on "
    "average, by moving few weights a whole step, counts as lost in every weight that did not move. "
    "Go by the projection."
)
PATCHES_NOTE = (
    "The recipe works on whole matrices: its cosine and sign rate here are those of the patches alone."
)


class Column(NamedTuple):
    """A column of a table: which figure it shows, and how.

    Attributes:
        figure: name of an attribute of `Figures`, or of `Findings`.
        title: heading of the column.
        pattern: how a number is written, for `str.format`.
        about: what the figure says, with its unit.
    """

    figure: str
    title: str
    pattern: str
    about: str


COLUMNS = (
    Column(
        "projection", "projection", "{:.3f}", "<d, q> / <d, d>: 1 keeps the change at its size, 0 erases it"
    ),
    Column("cosine", "cosine", "{:.3f}", "direction of the kept change against the true one; blind to size"),
    Column("sign_rate", "sign rate", "{:.1%}", "of the |d| > 1e-5, share whose q has the sign of d"),
    Column("flipped", "flipped", "{:.1%}", "of the |d| > 1e-5, share whose q has the opposite sign"),
    Column("lost", "lost", "{:.1%}", "of the |d| > 1e-5, share with q = 0"),
    Column("unchanged", "unchanged", "{:.1%}", "of all elements, share with q = 0"),
    Column("norm_ratio", "|q| / |d|", "{:.3f}", "size of the kept change over that of the true one"),
    Column("mse", "mse", "{:.1e}", "mean squared error of the weights, weight units squared"),
    Column("snr_db", "SNR dB", "{:.1f}", "change over error, decibels"),
    Column("on_grid", "on grid", "{:.1%}", "share of the base on the grid of its scale"),
    Column("elements", "elements", "{:,.0f}", "number of weights"),
)


# Of an inspection: first those of the change and the base, then what AbsMax and the recipe would keep.
INSPECTED = (
    Column("change", "|d| / |base|", "{:.2%}", "size of the change"),
    Column("unmoved", "unmoved", "{:.1%}", "share of the elements with d = 0"),
    Column(
        "below_half_step", "< half step", "{:.1%}", "of the elements that moved, by less than half a step"
    ),
    Column("on_grid", "on grid", "{:.1%}", "share of the base on the grid of its AbsMax scale"),
    Column("on_fitted_grid", "fitted", "{:.1%}", "share of the base on the grid that fits each tile best"),
    Column("on_stored_grid", "stored", "{:.1%}", "share of the base on the grid that it is stored with"),
    Column("absmax_projection", "AbsMax projection", "{:.3f}", "projection that AbsMax would give"),
    Column("absmax_cosine", "cosine", "{:.3f}", "cosine that AbsMax would give"),
    Column("absmax_sign_rate", "sign rate", "{:.1%}", "sign rate that AbsMax would give"),
    Column("projection", "recipe's projection", "{:.3f}", "projection that the recipe would give"),
    Column("cosine", "cosine", "{:.3f}", "cosine that the recipe would give"),
    Column("sign_rate", "sign rate", "{:.1%}", "sign rate that the recipe would give"),
)


class Sheet(NamedTuple):
    """A table of words.

    Attributes:
        before: lines above the table.
        header: columns, without the first one, which names the row.
        rows: name of each row, a path or one of `TOTALS`, and its cells.
        after: lines below the table.
    """

    before: list[str]
    header: list[Column]
    rows: list[tuple[str, list[str]]]
    after: list[str]


def _cell(column: Column, value: float) -> str:
    return "" if np.isnan(value) else column.pattern.format(value)


def cells(figures: Figures) -> list[str]:
    """The cells of a row of `COLUMNS`; a cell is empty where its figure is NaN."""
    return [_cell(column, float(np.asarray(getattr(figures, column.figure)))) for column in COLUMNS]


def compared(total: Figures, worst: Mapping[str, Figures], *, hidden: int = 0, doubt: str = "") -> Sheet:
    """The table of a comparison.

    Args:
        total: figures of all leaves together.
        worst: figures of the leaves to show, by path, those with projections farthest from 1 first.
        hidden: number of leaves that are not shown.
        doubt: stands above the table; without one, the verdict.
    """
    before = doubt or verdict_of_result(total, worst)
    after = [f"{hidden} more leaves, with projections nearer 1"] if hidden else []
    after += [ABOUT, *([ON_GRID_NOTE] if total.on_grid > ON_GRID else [])]
    rows = [(TOTALS[0], total), *worst.items()]
    cells_of = [(path, cells(figures)) for path, figures in rows]
    return Sheet([before], list(COLUMNS), cells_of, after)


def inspected(verdict: str, total: Findings, worst: Mapping[str, Findings], *, leaves: int) -> Sheet:
    """The table of an inspection.

    Args:
        verdict: what stands above the table.
        total: findings over all leaves together; a row of its own shows their bounds.
        worst: findings of the leaves to show, by path, the leaf of which AbsMax would keep least first.
        leaves: number of leaves that were looked at.
    """

    def row(of: Findings, part: str) -> list[str]:
        return [_cell(column, getattr(getattr(of, column.figure), part)) for column in INSPECTED]

    rows = list(zip(TOTALS, (row(total, "value"), row(total, "bound")), strict=True))
    rows += [(path, row(leaf, "value")) for path, leaf in worst.items()]
    looked = (
        f"{total.sampled:,} of {total.elements:,} weights looked at ({total.sampled / total.elements:.2g}), "
        f"in {total.patches:,} patches of {leaves:,} leaves. Bounds are three standard errors."
    )
    after = [looked, ABOUT, *([PATCHES_NOTE] if total.is_patchwise else [])]
    on_grid = max(np.nan_to_num([total.on_fitted_grid.value, total.on_stored_grid.value])) > ON_GRID
    return Sheet([verdict], list(INSPECTED), rows, [*after, *([ON_GRID_NOTE] if on_grid else [])])


def text(sheet: Sheet) -> str:
    """A sheet in plain characters, in columns of equal width."""
    lines = [("leaf", [column.title for column in sheet.header]), *sheet.rows]
    first = max(len(name) for name, _ in lines)
    widths = [max(len(row[i]) for _, row in lines) for i in range(len(sheet.header))]
    written = [
        "  ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(row, widths, strict=True))])
        for name, row in lines
    ]
    return "\n".join([*sheet.before, written[0], "-" * len(written[0]), *written[1:], *sheet.after])


def html(sheet: Sheet) -> str:
    """A sheet as an HTML fragment. Paths and other words are escaped."""
    escape = html_format.escape
    header = "".join(f'<th title="{escape(c.about)}">{escape(c.title)}</th>' for c in sheet.header)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{x}</td>' for x in row)}</tr>" for name, row in sheet.rows
    )
    above, below = ("".join(f"<p>{escape(x)}</p>" for x in lines) for lines in (sheet.before, sheet.after))
    return f"{above}<table><thead><tr><th>leaf</th>{header}</tr></thead><tbody>{body}</tbody></table>{below}"
