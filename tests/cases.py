"""Weights and settings that several tests share: layers of real models made small, and tiles that are hard.

`pair` draws a base and a tuned weight; the seed is a hash of the case's name, so each case stands alone.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import daq_jax as daq
from tests import oracles

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bf16": BF16, "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}

FORMATS = [
    (daq.fp8_e4m3fn, oracles.FORMATS["fp8_e4m3fn"]),
    (daq.fp8_e5m2, oracles.FORMATS["fp8_e5m2"]),
    (daq.int8, oracles.FORMATS["int8"]),
]
TILINGS = [
    (daq.Block(16, 32), (16, 32)),
    (daq.Channel(), (None, 1)),
    (daq.PerTensor(), (None, None)),
    (daq.Group(16), (16, 1)),
]
METRICS = [(daq.cosine, oracles.cosine), (daq.SignRate(), oracles.sign_rate), (daq.neg_mse, oracles.neg_mse)]
SEARCHES = [
    (daq.AbsMax(), oracles.absmax()),
    (daq.Grid(0.75, 1.4, 7), oracles.grid(0.75, 1.4, 7)),
    (daq.CoarseToFine(0.8, 1.5, 5, 10), oracles.coarse_to_fine(0.8, 1.5, 5, 10)),
]

# Layers of known models, every size divided by 32 or so; the quotients need not divide into tiles.
LAYERS: dict[str, tuple[tuple[int, ...], oracles.Matrix | None]] = {
    "deepseek_v3 kv_a_proj": ((224, 18), None),
    "llama_3_8b gate_proj, stored [out, in]": ((112, 32), ((1,), (0,))),
    "qwen3_moe experts": ((3, 40, 24), None),
    "linen DenseGeneral query": ((48, 4, 10), ((-3,), (-2, -1))),
    "linen DenseGeneral out": ((4, 10, 48), ((-3, -2), (-1,))),
    "maxtext scanned query": ((24, 3, 4, 10), ((0,), (2, 3))),
    "odd": ((33, 70), None),
    "column": ((48, 1), None),
    "one": ((1, 1), None),
}


def rng_for(name: str) -> np.random.Generator:
    """The generator of a case, from its name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def pair(
    name: str, shape: tuple[int, ...], dtype: np.dtype = BF16, change: float = 0.02
) -> tuple[NDArray, NDArray]:
    """A base weight of standard deviation 0.02, and one whose change is `change` times as large."""
    rng = rng_for(name)
    base = rng.normal(0, 0.02, shape).astype(dtype)
    tuned = (base.astype(np.float32) + rng.normal(0, 0.02 * change, shape).astype(np.float32)).astype(dtype)
    return base, tuned


def native(name: str, shape: tuple[int, int], change: float = 0.02) -> tuple[NDArray, NDArray]:
    """Float32 pair: the base is e4m3 codes times one scale, and the change is under half a step.

    The largest weight does not change, so the AbsMax scale of the whole is the base's own.
    """
    rng = rng_for(name)
    number = oracles.FORMATS["fp8_e4m3fn"]
    codes = number.round(rng.normal(0, 100, shape))
    codes[0, 0] = number.largest
    base = codes.astype(np.float32) * np.float32(
        2.0**-12 * 1.125
    )  # few bits, so that absmax / 448 is this very scale
    tuned = base + (rng.normal(0, change, shape) * np.abs(base)).astype(np.float32)
    tuned[0, 0] = base[0, 0]
    return base, tuned


def hard_tiles(side: int = 16) -> dict[str, tuple[NDArray, NDArray]]:
    """Float32 `[side, side]` pairs, each a case that a careless search or rounding gets wrong."""
    shape = (side, side)
    base, tuned = pair("hard", shape, DTYPES["f32"])
    outlier_base, outlier_tuned = base.copy(), tuned.copy()
    outlier_base[3, 5] = outlier_tuned[3, 5] = 200.0
    number = oracles.FORMATS["fp8_e4m3fn"]
    middle = rng_for("ties").choice(number.midpoints(), shape)
    middle[0, 0] = number.largest
    single = base.copy()
    single[2, 2] += np.float32(1e-3)
    return {
        "all zero": (np.zeros(shape, np.float32), np.zeros(shape, np.float32)),
        "tuned to zero": (base, np.zeros(shape, np.float32)),
        "base zero": (np.zeros(shape, np.float32), tuned),
        "frozen": (base, base.copy()),
        "subnormal": (base * np.float32(1e-37), tuned * np.float32(1e-37)),
        "native": native("native", shape),
        "outlier": (outlier_base, outlier_tuned),
        "half-way": ((middle * 0.99 * 2.0**-14).astype(np.float32), (middle * 2.0**-14).astype(np.float32)),
        "below threshold": (base, base + np.float32(1e-3) * (tuned - base)),
        "one change": (base, single),
        "constant": (np.full(shape, 0.5, np.float32), np.full(shape, 0.51, np.float32)),
    }


def hard_matrix(side: int = 16) -> tuple[NDArray, NDArray, list[str]]:
    """All hard tiles side by side: `[side, side * T]` base and tuned, and their names."""
    cases = hard_tiles(side)
    bases, tuneds = zip(*cases.values(), strict=True)
    return np.concatenate(bases, 1), np.concatenate(tuneds, 1), list(cases)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a QTensor stores, as NumPy arrays."""

    codes: NDArray  # the weight's shape, one byte a code
    scale: NDArray  # float32, in the matrix view

    @classmethod
    def of(cls, q: daq.QTensor) -> Stored:
        return cls(np.asarray(q.codes), np.asarray(q.scale))


def is_qtensor(x: object) -> bool:
    return isinstance(x, daq.QTensor)


def leaves_of(tree: object) -> list:
    """Leaves with QTensors whole."""
    return jax.tree.leaves(tree, is_leaf=is_qtensor)


def assert_same_bits(got: object, wanted: object) -> None:
    """Two results have the same structure, dtypes and bytes."""
    got_leaves, got_tree = jax.tree.flatten(got)
    wanted_leaves, wanted_tree = jax.tree.flatten(wanted)
    assert got_tree == wanted_tree
    for a, b in zip(got_leaves, wanted_leaves, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def slow_after(n: int, cases: Iterable) -> list:
    """Cases of a parametrized test, of which the first `n` are plain and the others slow.

    A tuple is a value for each of several parameters.
    """
    whole = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow if i >= n else ()) for i, case in enumerate(whole)]
