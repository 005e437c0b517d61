"""What a long benchmark says while it works."""

import io
import re
import time

from rich.console import Console

from benchmarks.progress import telling


def test_what_is_done_is_said_again_while_nothing_else_is():
    said = io.StringIO()
    with telling(Console(file=said, width=100), every=0.05) as (tell, say):
        tell("train", 50, 500)
        time.sleep(0.4)
        say("block, sign: projection 1.43")
    lines = [re.sub(r"^ *\d+ s  ", "", line) for line in said.getvalue().splitlines()]
    assert lines[0] == "train: 50/500"
    assert 3 <= lines.count("train: 50/500 ...") <= 8
    assert lines[-1] == "block, sign: projection 1.43"


def test_nothing_is_silent_before_the_first_task():
    said = io.StringIO()
    with telling(Console(file=said, width=100), every=0.05):
        time.sleep(0.2)
    assert "begin ..." in said.getvalue()


def test_a_terminal_has_a_bar_for_each_task():
    said = io.StringIO()
    with telling(Console(file=said, width=100, force_terminal=True)) as (tell, say):
        tell("train", 0, 500)
        tell("judge", 1, 22)
        say("block, [sign]: projection 1.43")
        tell("train", 500, 500)
    assert "500/500" in said.getvalue()
    assert "1/22" in said.getvalue()
    assert "block, [sign]: projection 1.43" in said.getvalue()
