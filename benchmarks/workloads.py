"""The weights that benchmarks run on: shapes of real layers by name, and a random pair for each shape.

A shape is `[in, out]`, or `[experts, in, out]`. Needs only NumPy, so that the reference can run without JAX.
"""

import dataclasses
import functools
import math

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
_MOST_DRAWN = 16_777_213  # a prime


@dataclasses.dataclass(frozen=True)
class Workload:
    """The matrices of one layer, by name, and how many such layers there are."""

    matrices: tuple[tuple[str, Shape], ...]
    layers: int = 1

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every leaf by path."""
        return {f"{i}/{name}": shape for i in range(self.layers) for name, shape in self.matrices}

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.layers * sum(math.prod(shape) for _, shape in self.matrices)

    @property
    def counts(self) -> dict[Shape, int]:
        """How many `[in, out]` matrices there are of each shape; experts count one by one."""
        found: dict[Shape, int] = {}
        for shape in self.shapes.values():
            found[shape[-2:]] = found.get(shape[-2:], 0) + math.prod(shape[:-2])
        return found


def _one(*shape: int) -> Workload:
    return Workload((("weight", shape),))


_ATTENTION, _UP, _DOWN = (4096, 4096), (4096, 11008), (11008, 4096)

WORKLOADS: dict[str, Workload] = {
    "square_1024": _one(1024, 1024),
    "square_4096": _one(4096, 4096),
    "square_8192": _one(8192, 8192),
    "square_16384": _one(16384, 16384),
    "square_32768": _one(32768, 32768),
    "llama_7b_attention": _one(*_ATTENTION),
    "llama_7b_up": _one(*_UP),
    "llama_7b_down": _one(*_DOWN),
    "llama_8b_up": _one(4096, 14336),
    "deepseek_v3_up": _one(7168, 18432),
    "deepseek_v3_down": _one(18432, 7168),
    "deepseek_v3_expert": _one(7168, 2048),
    "moe_experts": _one(64, 2048, 1408),
    "llama_7b": Workload(
        (
            *((name, _ATTENTION) for name in ("query", "key", "value", "out")),
            ("gate", _UP),
            ("up", _UP),
            ("down", _DOWN),
        ),
        layers=32,
    ),
}


@functools.lru_cache(maxsize=3)
def pair(shape: Shape) -> tuple[NDArray, NDArray]:
    """Base and tuned bfloat16 weights: standard deviation 0.02, and a change of 2 % of that.

    Large ones repeat after a prime number of elements, so that no two tiles are alike.
    """
    rng = np.random.default_rng(list(shape))
    drawn = min(math.prod(shape), _MOST_DRAWN)
    base = (rng.standard_normal(drawn, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    change = rng.standard_normal(drawn, np.float32) * np.float32(0.0004)
    tuned = (base.astype(np.float32) + change).astype(ml_dtypes.bfloat16)
    base, tuned = (np.resize(x, shape) for x in (base, tuned))
    return base, tuned
