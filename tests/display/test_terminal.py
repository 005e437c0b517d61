"""Tables in a terminal: numbers are whole or left out, however narrow it is."""

import csv
import io
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

import daq_jax as daq
from daq_jax.analysis import sheets
from daq_jax.analysis.comparison import Comparison
from daq_jax.display import terminal

LEAF = "model.layers.0.self_attn.o_proj.weight"
SHEETS = {
    name: sheets.Sheet([], list(columns), [(row, ["123.4567"] * len(columns)) for row in ("total", LEAF)], [])
    for name, columns in {"compared": sheets.COLUMNS, "inspected": sheets.INSPECTED}.items()
}


def shown(sheet, width):
    console = Console(file=io.StringIO(), width=width)
    terminal.show(sheet, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 150, 200, 260])
@pytest.mark.parametrize("name", SHEETS)
def test_numbers_are_never_cut_and_projections_always_there(name, width):
    sheet = SHEETS[name]
    said = shown(sheet, width)
    assert max(map(len, said.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    fitting = said.count("123.4567") // 2
    projections = [column for column in sheet.header if "projection" in column.figure]
    assert len(projections) <= fitting <= len(sheet.header)
    assert "".join(said.split()).count("projection") >= len(projections)
    hidden = len(sheet.header) - fitting
    assert (f"{hidden} columns do not fit" in said) == bool(hidden)
    assert hidden == 0 or width < 200


@pytest.mark.parametrize("name", SHEETS)
def test_in_a_wide_terminal_every_row_is_a_line(name):
    said = shown(SHEETS[name], 260)
    assert all(any(column.title in line for line in said.splitlines()) for column in SHEETS[name].header)
    assert sum(LEAF in line for line in said.splitlines()) == 1


def named(*names: str) -> Comparison:
    base = {name: jnp.zeros((4, 4)) for name in names}
    tuned = {name: jnp.ones((4, 4)) for name in names}
    return daq.compare(base, tuned, daq.quantize(base, tuned, daq.recipes.absmax))


HOSTILE = ("=cmd|' /C calc'!A1", "@SUM(1)", "+1", "-1", "\t=1", "a\x1b[2Jb", "right\u202eleft", "$\\frac{$")


def test_no_cell_of_csv_is_a_formula_and_plain_names_stay():
    written = terminal.comma_separated(named(*HOSTILE, "model.up_proj"))
    names = [row[0] for row in csv.reader(io.StringIO(written))]
    assert "model.up_proj" in names
    assert not [name for name in names if name.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert len(names) == 2 + len(HOSTILE) + 1


def test_no_name_steers_the_terminal():
    said = shown(named(*HOSTILE).sheet(99), 260)
    assert not {c for c in said if c in "\x1b\u202e\t\x07"}
    assert r"a\x1b[2Jb" in said


def test_what_is_being_done_is_said_unless_it_ends_soon(capsys):
    with terminal.working("looking at a [sample]", after=0.01):
        time.sleep(0.5)
    assert capsys.readouterr() == ("", "looking at a [sample] ...\n")
    with pytest.raises(OSError, match="gone"), terminal.working("looking", after=60.0):
        raise OSError("gone")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_time_that_it_takes_is_shown_and_removed(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as rich takes a terminal for granted
    with terminal.working("looking at a [sample]"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "looking at a [sample]" in err
    assert "0:00:00" in err
