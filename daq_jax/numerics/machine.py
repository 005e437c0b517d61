"""How a program uses the machine that it is compiled for."""

import dataclasses
from typing import Any

import jax
from jax.core import Tracer

from daq_jax.numerics.sharding import sharding_of


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a program may do with a weight, on the devices that hold it.

    Attributes:
        one_device: the whole weight is on one device. A GPU kernel may then take it, and a CPU may work
            through it part by part; on a sharded weight either would move data between devices.
        scores_at_once: candidate scales are scored several at a time, with quotients by `divide_short`, as
            suits an accelerator; otherwise one after another, as suits a CPU.
    """

    one_device: bool = False
    scores_at_once: bool = False

    @classmethod
    def of(cls, array: Any) -> "Machine":
        """The machine of an array: concrete, traced, or only its shape and dtype."""
        # A tracer does not tell on how many devices its array is.
        known = not isinstance(array, Tracer) or jax.device_count() == 1
        return cls(one_device=known and sharding_of(array) is None)
