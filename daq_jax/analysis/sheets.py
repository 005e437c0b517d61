"""Comparisons and inspections as tables of words: for terminals, notebooks and whoever draws rows.

The total comes first, then the leaves that were kept worst, or would be.
"""

import html as html_format
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from daq_jax.analysis.figures import Figures

if TYPE_CHECKING:
    from daq_jax.analysis.comparison import Comparison  # these show themselves by the tables here
    from daq_jax.analysis.estimates import Findings
    from daq_jax.analysis.inspection import Inspection

TOTALS = ("total", "give or take")  # rows that are not leaves
SHOWN = 10  # leaves in a table that shows itself
ON_GRID = 0.5  # share of the base from which on it counts as lying on the grid

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
    """How a figure is headed and written."""

    figure: str
    title: str
    pattern: str  # for `str.format`
    about: str  # what it says, with its unit


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
    """A table in words."""

    before: list[str]  # lines above it
    header: list[Column]
    rows: list[tuple[str, list[str]]]  # what a row is of, and its cells
    after: list[str]  # lines below it


def _cell(column: Column, value: float) -> str:
    return "" if np.isnan(value) else column.pattern.format(value)


def cells(figures: Figures) -> list[str]:
    """A row of `COLUMNS`, empty where a figure has no meaning."""
    return [_cell(column, float(np.asarray(getattr(figures, column.figure)))) for column in COLUMNS]


def compared(table: "Comparison", n: int = SHOWN) -> Sheet:
    """The total, and the `n` leaves whose projection is farthest from 1."""
    hidden = len(table.leaves) - n
    after = [f"{hidden} more leaves, with projections nearer 1"] if hidden > 0 else []
    after += [ABOUT, *([ON_GRID_NOTE] if table.total.on_grid > ON_GRID else [])]
    rows = [(TOTALS[0], table.total), *table.worst(n).items()]
    return Sheet([], list(COLUMNS), [(path, cells(figures)) for path, figures in rows], after)


def inspected(found: "Inspection", n: int = SHOWN) -> Sheet:
    """The verdict, the total with its bounds, and the `n` leaves of which AbsMax would keep least."""
    total = found.total

    def row(of: "Findings", part: str) -> list[str]:
        return [_cell(column, getattr(getattr(of, column.figure), part)) for column in INSPECTED]

    rows = list(zip(TOTALS, (row(total, "value"), row(total, "bound")), strict=True))
    rows += [(path, row(leaf, "value")) for path, leaf in found.worst(n).items()]
    looked = (
        f"{total.sampled:,} of {total.elements:,} weights looked at ({total.sampled / total.elements:.2g}), "
        f"in {total.patches:,} patches of {len(found.leaves):,} leaves. Bounds are three standard errors."
    )
    after = [looked, ABOUT, *([PATCHES_NOTE] if total.is_patchwise else [])]
    on_grid = max(np.nan_to_num([total.on_fitted_grid.value, total.on_stored_grid.value])) > ON_GRID
    return Sheet([found.verdict], list(INSPECTED), rows, [*after, *([ON_GRID_NOTE] if on_grid else [])])


def text(sheet: Sheet) -> str:
    """A sheet in plain characters."""
    lines = [("leaf", [column.title for column in sheet.header]), *sheet.rows]
    first = max(len(name) for name, _ in lines)
    widths = [max(len(row[i]) for _, row in lines) for i in range(len(sheet.header))]
    written = [
        "  ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(row, widths, strict=True))])
        for name, row in lines
    ]
    return "\n".join([*sheet.before, written[0], "-" * len(written[0]), *written[1:], *sheet.after])


def html(sheet: Sheet) -> str:
    """A sheet as an HTML fragment, nothing in it taken for markup."""
    escape = html_format.escape
    header = "".join(f'<th title="{escape(c.about)}">{escape(c.title)}</th>' for c in sheet.header)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{x}</td>' for x in row)}</tr>" for name, row in sheet.rows
    )
    above, below = ("".join(f"<p>{escape(x)}</p>" for x in lines) for lines in (sheet.before, sheet.after))
    return f"{above}<table><thead><tr><th>leaf</th>{header}</tr></thead><tbody>{body}</tbody></table>{below}"
