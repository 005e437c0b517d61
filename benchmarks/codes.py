"""Are codes and scales bit for bit what they were? A table of checksums over every recipe, format and tiling.

    python -m benchmarks codes FILE.json [--like OTHER.json] [--part NAME]

Inputs are drawn by NumPy from fixed seeds. Each case quantizes one of them and notes the CRC-32 of the codes
and of the scales. `--like` compares with a table made before, on a machine of the same kind: exit status 1
names every case that differs. A change that should move no code is checked by a table made before it.
"""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro

import daq_jax as daq
from benchmarks import common

TILINGS = (daq.Block(128, 128), daq.Block(16, 32), daq.Channel(), daq.PerTensor(), daq.Group(32))
FORMATS = (
    daq.fp8_e4m3fn,
    daq.fp8_e5m2,
    daq.int8,
    daq.int4,
    daq.fp4_e2m1,
    daq.nf4,
    daq.fp4_bnb,
)
WIDE = ("absmax", "paper_sign", "paper_cosine", "default")  # recipes tried with every format and tiling
OWN = {
    "gain row": daq.Recipe(rounding=daq.UnbiasedGain("row")),
    "gain column": daq.Recipe(rounding=daq.UnbiasedGain("column")),
    "gain tile": daq.Recipe(rounding=daq.UnbiasedGain("tile")),
    "subspace": daq.Recipe(rounding=daq.UnbiasedSubspace(rank=16, turns=4)),
    "feedback": daq.Recipe(rounding=daq.UnbiasedFeedback(rank=16)),
    "stochastic": daq.Recipe(rounding=daq.Stochastic(seed=3)),
    "grid": daq.Recipe(search=daq.Grid(0.75, 1.4, 7), metric=daq.neg_mse),
    "off grid": daq.Recipe(search=daq.OffGrid()),
    "base scale": daq.Recipe(search=daq.BaseScale()),
    "with base scale": daq.Recipe(search=daq.WithBaseScale(daq.CoarseToFine(0.8, 1.5, 5, 10))),
    "power of two": daq.Recipe(scales=daq.PowerOfTwo(), rounding=daq.UnbiasedGain()),
}
Pair = tuple[np.ndarray, np.ndarray]


def _native(seed: int, shape: tuple[int, ...], change: float, dtype: Any = np.float32) -> Pair:
    """A base on the e4m3 grid of one scale, and the base with small changes of low rank."""
    rng = np.random.default_rng(seed)
    codes = np.clip(rng.normal(0, 100, shape), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    base = codes.astype(np.float32) * np.float32(2.0**-12 * 1.125)
    left, right = rng.normal(size=(*shape[:-1], 4)), rng.normal(size=(*shape[:-2], 4, shape[-1]))
    tuned = base + (change * 0.014 * (left @ right)).astype(np.float32)
    return base.astype(dtype), tuned.astype(dtype)


def _plain(seed: int, shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> Pair:
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, shape).astype(dtype)
    return base, (base.astype(np.float32) + rng.normal(0, 4e-4, shape).astype(np.float32)).astype(dtype)


def _outlier(seed: int, shape: tuple[int, ...]) -> Pair:
    base, tuned = _plain(seed, shape, np.float32)
    tuned[5, 7] = 3.0
    tuned[:16, :32] = base[:16, :32]
    tuned[16:32, :32] = 0
    return base, tuned


INPUTS: dict[str, tuple[Pair, daq.Rule | None]] = {
    "native": (_native(0, (256, 384), 0.01), None),
    "native bf16": (_native(1, (256, 384), 0.01, ml_dtypes.bfloat16), None),
    "plain": (_plain(2, (256, 384)), None),
    "odd": (_plain(3, (133, 70), np.float16), None),
    "experts": (_native(4, (3, 160, 144), 0.02), None),
    "out in": (_plain(5, (256, 160)), daq.use("", matrix=((1,), (0,)))),
    "heads": (_plain(6, (96, 4, 40)), daq.use("", matrix=((-3,), (-2, -1)))),
    "outlier": (_outlier(7, (160, 160)), None),
}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every case by its name: "PART: ..."."""

    def run(name: str, recipe: daq.Recipe) -> Callable[[], Any]:
        (base, tuned), rule = INPUTS[name]
        rules = [] if rule is None else [rule]
        return lambda: daq.quantize(jnp.asarray(base), jnp.asarray(tuned), recipe, rules=rules)

    named = daq.recipes.RECIPES
    for recipe_name in WIDE:
        for number in FORMATS:
            for tiling in TILINGS:
                recipe = dataclasses.replace(named[recipe_name], format=number, tiling=tiling)
                yield f"wide: {recipe_name}, {number.name}, {tiling}", run("native", recipe)
    for recipe_name, recipe in (named | OWN).items():
        for name in INPUTS:
            yield f"deep: {recipe_name}, {name}", run(name, recipe)
    for name, recipe in daq.recipes.DENSITY_RECIPES.items():
        yield f"density: {name}", lambda recipe=recipe: _density(recipe)


def _density(recipe: daq.DensityRecipe) -> Any:
    rng = np.random.default_rng(8)
    weight = rng.normal(0.01, 0.02, (256, 96)).astype(np.float32)
    inputs = (rng.normal(size=(512, 256)) @ rng.normal(size=(256, 256)) / 16).astype(np.float32)
    apply = lambda params, x: x @ params["kernel"]  # noqa: E731
    params = {"kernel": jnp.asarray(weight)}
    grams = daq.calibrate_from(apply, params, [jnp.asarray(inputs)], 128, progress=False)
    return daq.quantize_density(params, grams, recipe)


def checksums(tree: Any) -> list[str]:
    """CRC-32 of every array of a tree, in its order, as hexadecimal words."""
    return [f"{zlib.crc32(np.ascontiguousarray(x).tobytes()):08x}" for x in jax.tree.leaves(tree)]


def main(
    file: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    /,
    *,
    like: Path | None = None,
    part: str = "",
    quick: bool = False,
) -> int:
    """Makes a table of checksums, and compares it with an earlier one.

    Args:
        file: where to write the table, JSON.
        like: a table to compare with.
        part: only cases whose name begins so.
        quick: only the cases of one recipe, to see that it runs.
    """
    part = "deep: absmax" if quick else part
    start, found = time.monotonic(), {}
    for name, run in cases():
        if name.startswith(part):
            found[name] = checksums(run())
    table = common.environment() | {"seconds": round(time.monotonic() - start), "cases": found}
    common.write(file, table)
    print(f"{len(found)} cases in {table['seconds']} s")
    if like is None:
        return 0
    known = json.loads(like.read_text())["cases"]
    differing = [name for name in found if found[name] != known.get(name)]
    print("\n".join(differing) or "every code and scale is the same")
    return int(bool(differing))


COMMANDS = {"codes": main}
