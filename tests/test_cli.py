import json
import subprocess
import sys

import pytest

import daq_jax as daq
from daq_jax import cli, demo


@pytest.fixture
def ran(monkeypatch):
    """The calls of `demo.run`, which does nothing."""
    calls = []

    def run(console, *, seed, json):
        calls.append({"seed": seed, "json": json})
        return {"seed": seed, "sentence": "said"}

    monkeypatch.setattr(demo, "run", run)
    return calls


def test_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"daq-jax {daq.__version__}\n"


def test_demo_passes_its_options_on_and_prints_nothing_of_its_own(ran, capsys):
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--seed", "7"]) == 0
    assert ran == [{"seed": 0, "json": False}, {"seed": 7, "json": False}]
    assert capsys.readouterr().out == ""


def test_json_is_one_object_and_nothing_else(ran, capsys):
    assert cli.main(["demo", "--json", "--seed", "3"]) == 0
    assert ran == [{"seed": 3, "json": True}]
    assert json.loads(capsys.readouterr().out) == {"seed": 3, "sentence": "said"}


@pytest.mark.parametrize(
    "words", [[], ["quantise"], ["demo", "--seed"], ["demo", "--seed", "x"], ["demo", "x"]]
)
def test_wrong_usage_is_status_2_and_says_why_on_stderr(words, ran, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, ran) == (2, "", [])
    assert err


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"]])
def test_help_is_status_0(words, ran, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert not stopped.value.code
    assert ran == []
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("error", [daq.DaqError("no such thing"), OSError("no such thing")])
def test_a_failure_is_status_1_and_one_line_on_stderr(error, monkeypatch, capsys):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "daq-jax: no such thing\n"


def test_the_exit_status_of_the_process_is_that_of_main():
    call = "import sys; from daq_jax.cli import main; sys.exit(main(['{}']))"
    for word, status in (("--version", 0), ("nothing-of-the-kind", 2)):
        assert (
            subprocess.run([sys.executable, "-c", call.format(word)], capture_output=True).returncode
            == status
        )
