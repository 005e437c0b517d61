"""Bases on grids of 4 bits and tuned models of them, as folders; every weight is `[out, in]`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.native_peers.rules import RULES, Rule
from tests.hf_folders import BF16, CONFIG, write_folder
from tests.native_folders import Native, mxfp4_pack, nvfp4_pack, packed

SPREAD = 0.02  # standard deviation of the weights


def _int4(name: str, outputs: int, inputs: int) -> Native:
    return packed(name, outputs, inputs, 4, 32, np.int64)


@dataclasses.dataclass(frozen=True)
class Base:
    """A format in which models ship.

    Attributes:
        native: names, config and decoder of a weight, which share nothing with the library.
        rule: name of the rule by which the weights of the base got their scales.
    """

    native: Callable[[str, int, int], Native]
    rule: str

    @property
    def made_by(self) -> Rule:
        """The rule itself."""
        return RULES[self.rule]


BASES = {
    "mxfp4": Base(mxfp4_pack, "mxfp4: floor"),
    "nvfp4": Base(nvfp4_pack, "nvfp4: absmax / 6"),
    "int4 group 32": Base(_int4, "int4: absmax / 7"),
}


def low_rank(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """A change of rank 16."""
    return rng.normal(size=(outputs, 16)) @ rng.normal(size=(16, inputs))


def dense(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """A change of full rank, the i-th of whose singular values is proportional to 1 / sqrt(i)."""
    n = min(outputs, inputs)
    left, right = (np.linalg.qr(rng.normal(size=(m, n)))[0] for m in (outputs, inputs))
    return left / np.sqrt(1 + np.arange(n)) @ right.T


TUNES = {"rank 16": low_rank, "dense": dense}


def names(matrices: int) -> list[str]:
    """Names of weights: one projection of each of several layers."""
    return [f"model.layers.{i}.mlp.up_proj.weight" for i in range(matrices)]


def make(path: Path, base: Base, tune: str, size: float, matrices: int, width: int) -> tuple[Path, Path]:
    """Writes a base and a tuned model below `path`, with a change of a size relative to the weights."""
    rng, before, after = np.random.default_rng(0), {}, {}
    config: dict = CONFIG
    for name in names(matrices):
        native = base.native(name, width, width)
        config = CONFIG | {"quantization_config": native.config}
        tensors = base.made_by(SPREAD * rng.normal(size=(width, width)).astype(np.float32), {})
        tensors = {name + suffix: x for suffix, x in tensors.items()}
        weight = native.decode(tensors)
        change = TUNES[tune](rng, width, width)
        change *= size * np.linalg.norm(weight) / np.linalg.norm(change)
        before |= tensors
        after[name] = (weight + change).astype(BF16)
    return write_folder(path / "base", [before], config), write_folder(path / "tuned", [after])
