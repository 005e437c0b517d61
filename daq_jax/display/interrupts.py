"""Ctrl-C in the command: two lines that say how to go on, and status 130, whatever is being done.

Work is interrupted by KeyboardInterrupt, as in any Python program, so that locks are given back and journals
stay whole. While the package is being imported there is nothing to give back, and an exception may come out
of the start of another library as anything: there the process ends at once. So it does at a second Ctrl-C.
An exception that is lost on its way, as code in C may drop it, is raised again until the work ends.

The package imports this module before all others, so it imports nothing that takes time.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

COMMAND = "daq-jax"
_AGAIN = 0.05  # seconds after which an interrupt that Python told to be ignored is tried again
_LOST = 5.0  # seconds after which one is tried again that nothing was heard of
_HAS_ALARM = hasattr(signal, "setitimer")  # Windows has none
STATUS = 130  # as a shell has it for a process that SIGINT ended


def run(work: Callable[[], int], words: Sequence[str], *, whole_process: bool) -> int:
    """Does the work of the command.

    Args:
        work: returns an exit status.
        words: the arguments of the command.
        whole_process: the process does nothing else, and may be ended here after Ctrl-C.

    Returns:
        The status of the work, or 130 after Ctrl-C; the two lines are then on stderr.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, end_at_once)
        _again_after(_LOST)  # code in C may drop an exception without a word
        raise KeyboardInterrupt

    def ignored(told: Any) -> None:
        # Python ignores what is raised in some callbacks, such as JAX's after a collection of garbage.
        if not (stopped and issubclass(told.exc_type, KeyboardInterrupt)):
            return tell(told)
        _again_after(_AGAIN)

    before, tell = signal.getsignal(signal.SIGINT), sys.unraisablehook
    alarm = signal.getsignal(signal.SIGALRM) if _HAS_ALARM else None
    # Only the main thread may set handlers; a process in the background of a shell ignores Ctrl-C.
    watched = threading.current_thread() is threading.main_thread() and callable(before)
    if watched:
        signal.signal(signal.SIGINT, stop)
        sys.unraisablehook = ignored
        if _HAS_ALARM:
            signal.signal(signal.SIGALRM, stop)
    try:
        return work()
    except BaseException as error:  # of another library's making, if Ctrl-C came while it was imported
        if stopped:
            _again_after(0.0)
        if not (stopped or isinstance(error, KeyboardInterrupt)):
            raise
        print(two_lines(words), file=sys.stderr)
        if stopped and whole_process:
            # Python's own end waits for threads, and crashes where one of them was compiling.
            sys.stdout.flush()
            os._exit(STATUS)
        return STATUS
    finally:
        if stopped:
            _again_after(0.0)
        if watched:
            sys.unraisablehook = tell
            signal.signal(signal.SIGINT, before)
            if _HAS_ALARM:
                signal.signal(signal.SIGALRM, alarm)


def _again_after(seconds: float) -> None:
    """Lets a signal wake the main thread once more after some time; 0.0 for never."""
    if _HAS_ALARM:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Handler of a signal: ends the process with the two lines and status 130."""
    os.write(2, f"{two_lines(sys.argv[1:])}\n".encode())
    os._exit(STATUS)


def two_lines(words: Sequence[str]) -> str:
    """What happened, and how to go on."""
    further = "it goes on where it stopped" if words[:1] == ["quantize"] else "it starts over"
    return f"{COMMAND}: stopped by Ctrl-C.\nRun the same command again: {further}."


def _is_command() -> bool:
    name, _ = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))
    return name == COMMAND


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)  # during imports, before `run`, and while the process ends
