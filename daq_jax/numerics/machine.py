"""How a program uses the machine that it is compiled for."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import Sharding

from daq_jax.numerics.arithmetic import is_staged
from daq_jax.numerics.sharding import sharding_of

_Result = TypeVar("_Result")


def on_tpu(tpu: Callable[..., _Result], elsewhere: Callable[..., _Result], *args: Any) -> _Result:
    """`tpu(*args)` where this is compiled for a TPU, and `elsewhere(*args)` on other machines.

    Args:
        tpu: gives what `elsewhere` gives, in a layout that a TPU's compiler makes one program of.
        elsewhere: has results of the same shapes and dtypes.
        args: arrays, and trees of them.
    """
    if is_staged():
        return lax.platform_dependent(*args, tpu=tpu, default=elsewhere)
    return (tpu if _platform_of(*jax.tree.leaves(args)) == "tpu" else elsewhere)(*args)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a program may do with a weight, on the devices that hold it.

    Attributes:
        one_device: the whole weight is on one device. A GPU kernel may then take it, and a CPU may work
            through it part by part; on a sharded weight either would move data between devices.
        scores_at_once: candidate scales are scored several at a time, with quotients by `divide_short`, as
            suits an accelerator; otherwise one after another, as suits a CPU.
        tpu: the weight is on a TPU, or is traced where TPUs are what JAX computes on.
    """

    one_device: bool = False
    scores_at_once: bool = False
    tpu: bool = False

    @classmethod
    def of(cls, array: Any) -> "Machine":
        """The machine of an array: concrete, traced, or only its shape and dtype."""
        # A tracer does not tell on how many devices its array is.
        known = not isinstance(array, Tracer) or jax.device_count() == 1
        return cls(one_device=known and sharding_of(array) is None, tpu=_platform_of(array) == "tpu")


def _platform_of(*arrays: Any) -> str:
    """Where arrays are; for what does not tell, as a traced one, where JAX computes by default."""
    for array in arrays:
        if isinstance(sharding := getattr(array, "sharding", None), Sharding) and not isinstance(
            array, Tracer
        ):
            return next(iter(sharding.device_set)).platform
    return jax.default_backend()
