"""Names that are made to mislead come out as harmless text, and harmless names as they are."""

import unicodedata

import pytest

from daq_jax.analysis.names import on_one_line, printable, without_formula


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "größe", "层.weight", "a b\nc", "$x_1$"]
)
def test_plain_words_stay(name):
    assert printable(name) == name


def test_no_character_of_unicode_steers_a_terminal():
    for number in range(0x110000):
        if number == 10:
            continue
        shown = printable(chr(number))
        kinds = {unicodedata.category(c) for c in shown}
        assert not kinds & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}, hex(number)


def test_escapes_say_which_character_it_was():
    assert printable("\x1b]0;title\x07") == r"\x1b]0;title\x07"
    assert printable("safe\u202egnp") == r"safe\u202egnp"
    assert printable("\ud800") == r"\ud800"
    assert on_one_line("a\nb\r\nc") == r"a\nb\r\nc"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(start):
    assert without_formula(f"{start}1+1") == f"'{start}1+1"
    assert without_formula(f"a{start}1") == f"a{start}1"
