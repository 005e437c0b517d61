import json
import os
import signal
import subprocess
import sys
import time

import pytest

import daq_jax as daq
from daq_jax import cli, demo
from daq_jax.io.jobs import quantize_folders


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


def raising(error):
    def run(*_, **__):
        raise error

    return run


@pytest.mark.parametrize("error", [daq.DaqError("no such thing"), OSError("no such thing")])
def test_a_failure_is_status_1_and_one_line_on_stderr(error, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", raising(error))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "daq-jax: no such thing\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), ImportError("a bug")])
def test_a_fault_of_the_library_is_shown_whole(error, monkeypatch):
    monkeypatch.setattr(demo, "run", raising(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["demo"])


GOES_ON = "daq-jax: stopped by Ctrl-C.\nRun the same command again: it goes on where it stopped.\n"
STARTS_OVER = "daq-jax: stopped by Ctrl-C.\nRun the same command again: it starts over.\n"


def test_ctrl_c_is_status_130_and_two_lines_that_say_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", raising(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == STARTS_OVER
    monkeypatch.setattr(quantize_folders, "quantize_folder", raising(KeyboardInterrupt()))
    assert cli.main(["quantize", "base", "tuned", "out"]) == 130
    assert capsys.readouterr().err == GOES_ON


def test_ctrl_c_that_another_library_turns_into_something_else_is_two_lines_too(monkeypatch, capsys):
    def run(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise SystemError("initialization raised unreported exception") from error

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == STARTS_OVER
    assert signal.getsignal(signal.SIGINT) is before


# As pip writes it, but that the module of the command says when it begins.
SCRIPT = """\
import sys
print("begun", flush=True)
{before}
from daq_jax.cli import main
{after}
sys.exit(main())
"""


@pytest.fixture
def interrupted(tmp_path):
    """Runs the command as an installed script in a process of its own, and sends it Ctrl-C."""

    def run(words, delays, before="", after=""):
        script = tmp_path / "daq-jax"
        script.write_text(SCRIPT.format(before=before, after=after))
        process = subprocess.Popen(
            [sys.executable, str(script), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        for delay in delays:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    return run


def test_ctrl_c_while_libraries_are_imported_is_two_lines(interrupted):
    # Before jax, whose import takes a second or more.
    assert interrupted(["quantize", "base", "tuned", "out"], [0.4]) == (130, GOES_ON)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2, 0.7, 1.2, 1.7, 2.2, 3, 4, 6, 9])
def test_ctrl_c_at_any_time_is_two_lines(interrupted, delay):
    assert interrupted(["demo"], [delay]) == (130, STARTS_OVER)


SLOW_TO_STOP = """
from daq_jax import demo
def run(*_, **__):
    import time
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)
import signal
demo.run = run
"""


def test_a_second_ctrl_c_ends_the_process_at_once(interrupted):
    assert interrupted(["demo"], [], after=SLOW_TO_STOP) == (130, STARTS_OVER)


IGNORED_ONCE = """
import signal, time
from daq_jax import demo
class Last:
    def __del__(self):  # what is raised here is ignored
        signal.raise_signal(signal.SIGINT)
def run(*_, **__):
    Last()
    time.sleep(60)
demo.run = run
"""


def test_ctrl_c_in_a_callback_whose_exceptions_are_ignored_is_heard(interrupted):
    assert interrupted(["demo"], [], after=IGNORED_ONCE) == (130, STARTS_OVER)


DROPPED = """
import signal, time
from daq_jax import demo
def run(*_, **__):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    time.sleep(60)
demo.run = run
"""


def test_ctrl_c_that_is_dropped_without_a_word_is_heard(interrupted):
    assert interrupted(["demo"], [], after=DROPPED) == (130, STARTS_OVER)


def test_a_process_that_ignores_ctrl_c_goes_on_doing_so(interrupted):
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert interrupted(["--version"], [0.4], before=ignore) == (0, "")


def test_importing_the_package_leaves_ctrl_c_as_it_is():
    call = "import signal, daq_jax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", call]).returncode == 0


def refused(words, capsys) -> str:
    """What wrong usage of `compare` is told, before any folder is looked for."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "nowhere", "nowhere", "nowhere", *map(str, words)])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


def test_a_page_without_its_extra_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "daq_jax.display.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install 'daq-jax[plot]'" in refused(["--html", tmp_path / "page.html"], capsys)


def test_a_page_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    assert "is not a folder; make it first" in refused(["--html", tmp_path / "not/there.html"], capsys)
    assert "is a folder; needed the name of a file" in refused(["--html", tmp_path], capsys)


def test_letters_that_the_terminal_lacks_are_escaped():
    call = (
        "from daq_jax import cli, demo; demo.run = lambda *_, **__: print('caf\\u00e9'); cli.main(['demo'])"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")


def test_the_exit_status_of_the_process_is_that_of_main():
    call = "import sys; from daq_jax.cli import main; sys.exit(main(['{}']))"
    for word, status in (("--version", 0), ("nothing-of-the-kind", 2)):
        assert (
            subprocess.run([sys.executable, "-c", call.format(word)], capture_output=True).returncode
            == status
        )


# A misspelt option of each subcommand, and the option that is meant.
TYPOS = {
    "demo": (["--sed", "1"], "--seed"),
    "quantize": (["base", "tuned", "out", "--recpie", "absmax"], "--recipe"),
    "inspect": (["base", "tuned", "--fromat=fp8-block"], "--format"),
    "compare": (["base", "tuned", "out", "--fail-undr", "projection=0.9"], "--fail-under"),
    "doctor": (["--jsno"], "--json"),
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_typo_is_two_lines_with_what_is_meant_and_status_2(command, capsys):
    words, meant = TYPOS[command]
    typo = next(word.partition("=")[0] for word in words if word.startswith("--"))
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *words])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.splitlines() == [
        f"daq-jax {command}: there is no option {typo}; did you mean {meant}?",
        f"See `daq-jax {command} --help`.",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantze", "a", "b"], "there is no subcommand 'quantze'; did you mean quantize?"),
        (["zzz"], "there is no subcommand 'zzz'; there are demo, quantize, inspect, compare, doctor."),
        (["--json", "demo"], "there is no subcommand '--json'"),
        (["demo", "-seed", "1"], "demo: there is no option -seed; did you mean --seed?"),
        (["demo", "--xyzzy"], "demo: there is no option --xyzzy.\n"),
    ],
)
def test_words_that_are_unknown_are_named(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 2


def test_an_option_is_read_with_underscores_too_and_a_negative_number_is_no_option(ran):
    assert cli.main(["demo", "--seed", "-7"]) == 0
    with pytest.raises(SystemExit, match="2"):  # a floor that says nothing, not an unknown option
        cli.main(["compare", "base", "tuned", "out", "--fail_under", "projection"])
    assert ran == [{"seed": -7, "json": False}]
