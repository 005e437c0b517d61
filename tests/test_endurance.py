"""Many calls, and calls from many threads: the same codes, and no growth but that of compiled programs."""

import gc
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests.cases import rng_for
from tests.compilations import compilations

THREADS = 8
RECIPES = (
    daq.recipes.absmax,
    daq.Recipe(search=daq.Grid(0.9, 1.1, 3)),
    daq.Recipe(rounding=daq.UnbiasedGain()),
)


def pair_of(*shape: int) -> tuple[jax.Array, jax.Array]:
    rng = rng_for(str(shape))
    base = (0.02 * rng.normal(size=shape)).astype(np.float32)
    return jnp.asarray(base), jnp.asarray(base + 5e-4 * rng.normal(size=shape).astype(np.float32))


def bytes_of(recipe: daq.Recipe, pair: tuple[jax.Array, jax.Array]) -> bytes:
    q = daq.quantize({"kernel": pair[0]}, {"kernel": pair[1]}, recipe)["kernel"]
    return np.asarray(q.codes).tobytes() + np.asarray(q.scale).tobytes()


def in_threads(calls: list[list[int]], recipes, pair) -> list[list[bytes]]:
    """What each thread gets for its recipes, all of which begin at one moment."""
    begin = threading.Barrier(len(calls))

    def one(order: list[int]) -> list[bytes]:
        begin.wait(60)
        return [bytes_of(recipes[i], pair) for i in order]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result(240) for done in [pool.submit(one, order) for order in calls]]


@pytest.mark.parametrize("recipes", ["one", pytest.param("many", marks=pytest.mark.slow)])
def test_threads_get_the_codes_of_one(recipes):
    """Also where all of them ask first, so that all compile."""
    chosen = RECIPES[:1] if recipes == "one" else RECIPES
    pair = pair_of(128, 144) if recipes == "one" else pair_of(128, 272)
    n = len(chosen)
    calls = [[(thread + i) % n for i in range(n)] * 3 for thread in range(THREADS)]
    found = in_threads(calls, chosen, pair)
    wanted = [bytes_of(recipe, pair) for recipe in chosen]
    assert found == [[wanted[i] for i in order] for order in calls]


def caches() -> dict[str, int]:
    """Entries of every cache of a function of this package."""
    found = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("daq_jax")]:
        for name, value in vars(module).items():
            if isinstance(value, types.ModuleType):  # its own entries come in their turn
                continue
            if hasattr(value, "cache_info"):
                found[f"{module.__name__}.{name}"] = value.cache_info().currsize
            elif hasattr(value, "_cache_size"):
                found[f"{module.__name__}.{name}"] = value._cache_size()
    return found


def kept() -> tuple[int, int, int]:
    """Objects, arrays and threads that are there."""
    gc.collect()
    return len(gc.get_objects()), len(jax.live_arrays()), threading.active_count()


@pytest.mark.parametrize("n", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_calls_with_one_shape_keep_nothing(n):
    recipe, pair = RECIPES[0], pair_of(16, 128)
    for _ in range(20):
        bytes_of(recipe, pair)
    before, sizes = kept(), caches()
    assert sizes["daq_jax.leaves._quantize"] > 0

    def calls() -> None:
        for _ in range(n):
            bytes_of(recipe, pair)

    assert compilations(calls) == 0
    objects, arrays, threads = np.subtract(kept(), before)
    assert objects < n
    assert arrays <= 0
    assert threads <= 0
    assert caches() == sizes


@pytest.mark.slow
def test_new_shapes_keep_their_programs_and_no_more():
    recipe = RECIPES[0]
    bytes_of(recipe, pair_of(16, 128))
    sizes, before = caches(), kept()
    for rows in range(17, 17 + 25):
        for _ in range(20):
            bytes_of(recipe, pair_of(rows, 128))
    grown = {name: size - sizes.get(name, 0) for name, size in caches().items() if size != sizes.get(name, 0)}
    assert grown.pop("daq_jax.rules.shapes._own_axes", 0) <= 16  # the trees of the last calls
    assert grown == {"daq_jax.leaves._quantize": 25}
    jax.clear_caches()
    objects, arrays, _ = np.subtract(kept(), before)
    assert objects < 25 * 200  # of types and places of arrays, which JAX keeps; a program has thousands
    assert arrays <= 0
