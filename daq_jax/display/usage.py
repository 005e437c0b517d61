"""What is misspelt in a command line, said shortly: what came, what is nearest, and where to look."""

import difflib
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

_OPTION = re.compile("--?[A-Za-z]")  # no negative number


def fault_of(words: Sequence[str], commands: Mapping[str, Callable[..., None]], program: str) -> str:
    """What is misspelt, with the nearest names and the command that prints the help; "" if nothing is.

    Args:
        words: the arguments of the program.
        commands: the subcommands by name. The options of a subcommand are its keyword-only arguments.
        program: name of the program.

    >>> print(fault_of(["show", "--smal"], {"show": lambda *, small=False: None}, "prog"))
    prog show: there is no option --smal; did you mean --small?
    See `prog show --help`.
    """
    command, *others = words or ["--help"]
    if command in ("-h", "--help"):
        return ""
    if command not in commands:
        near = _nearest(command, list(commands)) or f"; there are {', '.join(commands)}."
        return f"{program}: there is no subcommand {command!r}{near}\nSee `{program} --help`."
    parameters = inspect.signature(commands[command]).parameters.values()
    known = ["-h", "--help", *(_long(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY)]
    options = itertools.takewhile(lambda word: word != "--", others)  # behind which words are no options
    given = dict.fromkeys(word.partition("=")[0] for word in options if _OPTION.match(word))
    unknown = [x for x in given if x not in known and not (x.startswith("--") and _long(x) in known)]
    lines = [
        f"{program} {command}: there is no option {x}{_nearest(_long(x), known) or '.'}" for x in unknown
    ]
    return "\n".join([*lines, f"See `{program} {command} --help`."]) if lines else ""


def _long(option: str) -> str:
    return "--" + option.lstrip("-").replace("_", "-")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""
