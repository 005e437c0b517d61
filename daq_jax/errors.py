"""Faults of a caller: one class to catch, and one way to word them."""

import inspect
from collections.abc import Callable, Sequence
from typing import NoReturn

import ml_dtypes
import numpy as np

_ON_A_LINE = 8  # problems listed in full where all stand on one line


class DaqError(ValueError):
    """What was passed in cannot be used. The message names it, what was needed, and a way out.

    Raised by every function of daq_jax for a fault of its caller: a wrong value, trees that do not fit, a
    file that cannot be read as what it claims to be. Any other exception is a fault of daq_jax, of a library
    below it, or of the machine.
    """


class CannotJudge(DaqError):
    """There are no figures to hold against a gate."""


def refuse(headline: str, problems: Sequence[str], way_out: str = "", *, one_line: bool = False) -> NoReturn:
    """Raises one DaqError for several problems of one kind.

    Args:
        headline: what is wrong, without a full stop.
        problems: one phrase for each, beginning with the name of what is at fault; at least one.
        way_out: a sentence that says what to do.
        one_line: put everything on one line, as the messages of folders are; of more than eight problems
            the others are then counted.

    Raises:
        DaqError: always.

    >>> refuse("two leaves do not fit", ["'a' is (2,)", "'b' is (3,)"], "Pass one model.", one_line=True)
    Traceback (most recent call last):
    daq_jax.errors.DaqError: two leaves do not fit: 'a' is (2,); 'b' is (3,). Pass one model.
    """
    if one_line:
        more = [f"and {len(problems) - _ON_A_LINE} more"] if len(problems) > _ON_A_LINE else []
        raise DaqError(f"{headline}: {'; '.join([*problems[:_ON_A_LINE], *more])}. {way_out}".strip())
    lines = "".join(f"\n  {p}" for p in problems)
    raise DaqError(f"{headline}:{lines}" + (f"\n{way_out}" if way_out else ""))


def check_takes(part: str, function: Callable[..., object], *arguments: str) -> None:
    """Raises DaqError unless a function may be called with as many arguments by position.

    Args:
        part: what the function is to be, such as "Recipe: `metric`".
        function: any callable; one whose signature is not known passes.
        arguments: what it is called with, for the message.
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise DaqError(
            f"{part} is called with ({given}), which {function!r} does not take: {error}."
        ) from None
    except ValueError:  # of C code
        return


def check_dtype(name: str, dtype: str) -> None:
    """Raises DaqError unless NumPy or ml_dtypes has a dtype of this name, which is to be that of `name`."""
    if not hasattr(ml_dtypes, dtype) and not hasattr(np, dtype):
        example = "such as 'float8_e4m3fn'"
        raise DaqError(f"{name}: `dtype` must be one of NumPy or ml_dtypes, {example}; got {dtype!r}.")


def check_whole_numbers(owner: object, *, least: int = 1, **values: object) -> None:
    """Raises DaqError unless every value is an int of at least `least`; bools are none.

    Args:
        owner: the value whose fields these are, named by its type in the message.
        least: smallest number allowed.
        values: by the name of the field.
    """
    needed = "above 0" if least == 1 else f"of at least {least}"
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = type(owner).__name__
            raise DaqError(f"{kind}: `{name}` must be a whole number {needed}; got {value!r}.")
