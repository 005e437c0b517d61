"""The two texts of the demo, shipped with the package: a style to learn first and a style to tune to.

Both are in the public domain; `texts/SOURCES.txt` says where they come from and what was removed.
"""

from importlib.resources import files
from typing import NamedTuple

import numpy as np

from daq_jax.errors import DaqError


class Text(NamedTuple):
    """One style, cut in two: what a model may learn from, and what it is judged on."""

    name: str
    train: np.ndarray  # [bytes] uint8
    held_out: np.ndarray  # [bytes] uint8, the end of the text


def load_text(name: str, *, held_out: int) -> Text:
    """Reads `texts/{name}.txt` and holds out its last `held_out` bytes."""
    data = np.frombuffer(files("daq_jax.demo").joinpath("texts", f"{name}.txt").read_bytes(), np.uint8)
    if not 0 < held_out < len(data):
        raise DaqError(f"{name} has {len(data)} bytes; cannot hold out {held_out}.")
    return Text(name.capitalize(), data[:-held_out], data[-held_out:])
