"""Names from files where people and programs read them: names are anybody's, and some are made to mislead."""

import unicodedata

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # control, format, surrogate, private use; line separators


def printable(words: str) -> str:
    r"""Words in which no character moves a cursor, changes a colour or hides what is read; lines stay lines.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(_escaped(c) if unicodedata.category(c) in _HIDDEN and c != "\n" else c for c in words)


def on_one_line(name: str) -> str:
    """A name as `printable`, without line breaks."""
    return printable(name).replace("\n", "\\n")


def without_formula(cell: str) -> str:
    """A cell of a table that a spreadsheet takes for text, after an apostrophe if it has to be.

    >>> without_formula("=SUM(A1)")
    "'=SUM(A1)"
    """
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
