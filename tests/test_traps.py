"""Code that looks right and is not: XLA rewrites it, a cast overflows, a maximum loses a NaN, a sum drifts.

Each test shows the obvious code wrong under `jax.jit` on a CPU, next to what the library does instead, so it
fails if the obvious code takes its place. What only a GPU shows is tested on the traced program.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

import daq_jax as daq
from daq_jax.numerics.arithmetic import divide, multiply
from daq_jax.numerics.reductions import total
from tests import oracles
from tests.cases import DTYPES, pair, rng_for, slow_after

F32 = DTYPES["f32"]
E4M3 = oracles.FORMATS["fp8_e4m3fn"]
BLOCK = (16, 16)
ABSMAX = daq.Recipe(tiling=daq.Block(*BLOCK))


def differing(got: jax.Array, wanted: NDArray) -> float:
    """Share of elements that are not equal."""
    return float(np.mean(np.asarray(got) != wanted))


# --- Rounding by adding a constant --------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [daq.fp8_e4m3fn, daq.fp8_e5m2, daq.int8], ids=lambda f: f.name)
def test_rounding_survives_a_compiler_that_folds_x_plus_c_minus_c(fmt):
    x = rng_for("fold").normal(0, 30, 4096).astype(F32)
    whole = np.float32(1.5 * 2**23)
    obvious = jax.jit(lambda x: (x + whole) - whole)(x)
    if jax.__version_info__ < (0, 12):  # newer ones do not fold it on CPUs
        assert differing(obvious, np.rint(x)) > 0.9
    np.testing.assert_array_equal(jax.jit(fmt.round)(x), oracles.FORMATS[fmt.name].round(x))


def narrow_casts(function, *args) -> list[str]:
    """Where a program, before XLA works on it, converts FP8 back to float32."""
    return re.findall(
        r"stablehlo.convert .*f8E\w+>\) -> tensor<.*f32>", jax.jit(function).lower(*args).as_text()
    )


@pytest.mark.parametrize("name", slow_after(1, ["paper_sign", "paper_cosine", "released_cosine"]))
def test_a_search_never_reads_weights_back_from_a_cast(name):
    """On a GPU XLA drops a cast to FP8 and back, and the search would score weights that are not rounded."""
    base, tuned = pair("cast", (256, 256))
    assert narrow_casts(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), tuned)
    assert not narrow_casts(lambda b, t: daq.quantize(b, t, daq.recipes.RECIPES[name]), base, tuned)


# --- Division -----------------------------------------------------------------------------------------------


def test_division_by_a_broadcast_is_rounded_once():
    rng = rng_for("divide")
    x, y = rng.normal(size=(512, 512)).astype(F32), rng.uniform(1, 2, (512, 1)).astype(F32)
    assert differing(jax.jit(lambda x, y: x / y)(x, y), x / y) > 0.1
    np.testing.assert_array_equal(jax.jit(divide)(x, y), x / y)


def test_codes_are_those_of_an_exact_division():
    """Targets half-way between two codes times a scale: a quotient one unit off takes the other code."""
    rng = rng_for("half-way quotients")
    scale = rng.uniform(1e-3, 2e-3, (256, 1)).astype(F32)
    tuned = (rng.choice(E4M3.midpoints(), (256, 256)) * scale).astype(F32)
    tuned[:, 0] = 448 * scale[:, 0]
    scale = np.abs(tuned).max(1, keepdims=True) / np.float32(448)
    wanted = E4M3.round(tuned / scale)
    assert differing(jax.jit(lambda x, s: daq.fp8_e4m3fn.round(x / s))(tuned, scale), wanted) > 0.01
    q = jax.jit(daq.quantize, static_argnums=2)(0 * tuned, tuned, daq.Recipe(tiling=daq.Block(1, 256)))
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(E4M3.decode(np.asarray(q.codes)), wanted)


def test_absmax_scales_are_rounded_once():
    tuned = rng_for("448").uniform(0.01, 1, (128, 128)).astype(F32)
    wanted = tuned / np.float32(448)
    assert differing(jax.jit(lambda x: x / 448)(tuned), wanted) > 0.1
    recipe = daq.Recipe(tiling=daq.Block(1, 1))
    for run in (daq.quantize, jax.jit(daq.quantize, static_argnums=2)):
        np.testing.assert_array_equal(run(0 * tuned, tuned, recipe).scale, wanted)


# --- A product and the sum after it -------------------------------------------------------------------------


def lost_change() -> tuple[NDArray, NDArray]:
    """A base whose every element is a code times its tile's scale; AbsMax loses all of the change."""
    rng = rng_for("lost")
    scale = next(
        s for s in rng.uniform(1e-3, 2e-3, 1000).astype(F32) if (s * np.float32(448)) / np.float32(448) == s
    )
    codes = E4M3.round(rng.normal(0, 100, (64, 64)))
    codes[::16, ::16] = 448
    base = codes.astype(F32) * scale
    return base, (base * np.where(np.abs(codes) == 448, 1, 1.001)).astype(F32)


def test_a_product_is_rounded_before_the_sum_that_follows():
    rng = rng_for("fused")
    x, y = rng.normal(size=(512, 512)).astype(F32), rng.uniform(1, 2, (512, 1)).astype(F32)
    z = x * y
    assert differing(jax.jit(lambda x, y, z: x * y - z)(x, y, z), 0 * z) > 0.5
    np.testing.assert_array_equal(jax.jit(lambda x, y, z: multiply(x, y) - z)(x, y, z), 0 * z)


def test_a_lost_change_looks_lost():
    base, tuned = lost_change()
    q = daq.quantize(base, tuned, ABSMAX)
    table = jax.jit(daq.compare)(base, tuned, q).total
    assert (table.unchanged, table.projection) == (1, 0)


def test_a_search_sees_that_a_change_is_lost():
    """By this metric any scale is better than one that keeps nothing; a fused sum would see residues kept."""
    base, tuned = lost_change()
    anything = lambda d, q: jnp.any(q != 0, -1).astype(jnp.float32)  # noqa: E731
    q = daq.quantize(base, tuned, dataclasses.replace(ABSMAX, search=daq.Grid(0.8, 1.5, 3), metric=anything))
    assert np.all(np.asarray(q.scale) != oracles.absmax_scales(tuned, E4M3, BLOCK))


# --- Saturation and NaN -------------------------------------------------------------------------------------


def test_numbers_beyond_the_largest_code_saturate():
    x = np.array([447.9, 448, 463.9, 464, 464.1, 480, 1e6, 1e38, np.inf], F32)
    assert np.isnan(jax.jit(lambda x: x.astype(jnp.float8_e4m3fn))(x).astype(F32)).sum() >= 4
    for sign in (1, -1):
        codes = jax.jit(lambda x: daq.fp8_e4m3fn.encode(daq.fp8_e4m3fn.round(x)))(sign * x)
        np.testing.assert_array_equal(E4M3.decode(np.asarray(codes)), sign * 448.0)


def test_a_scale_below_absmax_clips_and_makes_no_nan():
    base, tuned = pair("clip", (32, 32), F32)
    smallest = lambda d, q: -jnp.max(jnp.abs(q + d), -1)  # noqa: E731  # the more is clipped the better
    recipe = dataclasses.replace(ABSMAX, search=daq.Grid(0.5, 1.0, 3), metric=smallest)
    q = daq.quantize(np.zeros_like(base), tuned, recipe)
    np.testing.assert_allclose(q.scale, oracles.absmax_scales(tuned, E4M3, BLOCK) / 2, rtol=1e-6)
    values = E4M3.decode(np.asarray(q.codes))
    assert np.all(np.isfinite(values))
    assert np.max(np.abs(values)) == 448


@pytest.mark.parametrize(
    "name", ["absmax", *slow_after(1, ["paper_sign", "paper_cosine", "released_cosine"])]
)
def test_inside_jit_a_tile_with_nan_or_infinity_has_scale_nan_and_others_are_untouched(name):
    recipe = dataclasses.replace(daq.recipes.RECIPES[name], tiling=daq.Block(*BLOCK))
    run = jax.jit(lambda b, t: daq.quantize(b, t, recipe))
    base, tuned = pair("bad tile", (48, 48), F32)
    good = np.asarray(run(base, tuned).scale)
    broken_base, broken = base.copy(), tuned.copy()
    broken[20, 3], broken[0, 40], broken[40, 20], broken_base[47, 47] = np.nan, np.inf, -np.inf, np.nan
    scale = np.asarray(run(broken_base, broken).scale)
    bad = np.isnan(scale)
    assert np.argwhere(bad).tolist() == [[0, 2], [1, 0], [2, 1], [2, 2]]
    np.testing.assert_array_equal(scale[~bad], good[~bad])


def test_a_maximum_may_drop_a_nan():
    """Why the scale is not left to the maximum: here XLA's loses a NaN at some position or other."""
    tiles = np.ones((256, 16, 16), F32)
    tiles[np.arange(256), *np.divmod(np.arange(256), 16)] = np.nan
    obvious = jax.jit(lambda x: jnp.max(jnp.abs(x), (1, 2)))(tiles)
    recipe = daq.Recipe(tiling=daq.PerTensor())
    stack = [daq.use("")]  # 256 matrices, not attention heads
    scale = jax.jit(lambda b, t: daq.quantize(b, t, recipe, rules=stack))(np.zeros_like(tiles), tiles).scale
    assert np.all(np.isnan(scale))
    assert not np.all(np.isnan(obvious))


# --- Long sums ----------------------------------------------------------------------------------------------


def long_pair() -> tuple[NDArray, NDArray]:
    """16M elements that share one scale."""
    rng = rng_for("long")
    base = rng.standard_normal((4096, 4096), F32) * F32.type(0.02)
    return base, base + rng.standard_normal((4096, 4096), F32) * F32.type(0.0004)


def test_long_sums_hold():
    x = np.abs(long_pair()[0]).reshape(-1)
    exact = np.sum(x, dtype=np.float64)
    one_by_one = np.cumsum(x, dtype=np.float32)[-1]  # what a plain loop gives; XLA may or may not do better
    assert abs(one_by_one / exact - 1) > 1e-5
    assert abs(float(jax.jit(lambda x: total(x, (0,)))(x)[0]) / exact - 1) < 3e-7


@pytest.mark.slow
def test_the_score_of_a_tile_of_16m_elements_holds():
    """What the search compares, caught on its way, against float64."""
    seen: list[float] = []

    class Caught(type(daq.cosine)):
        def score(self, *sums: jax.Array) -> jax.Array:
            score = super().score(*sums)
            jax.debug.callback(lambda s: seen.append(float(np.ravel(s)[0])), score)
            return score

    base, tuned = long_pair()
    recipe = daq.Recipe(tiling=daq.PerTensor(), metric=Caught(), search=daq.Grid(1.25, 1.25, 2))
    jax.block_until_ready(daq.quantize(base, tuned, recipe))
    jax.effects_barrier()
    scale = np.float32(1.25) * oracles.absmax_scale(tuned, E4M3)
    kept = np.clip(tuned / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(F32) * scale
    d, q = (x.astype(np.float64).ravel() for x in (tuned - base, kept - base))
    wanted = oracles.cosine(d, q[None])[0]
    assert min(abs(s / wanted - 1) for s in seen) < 1e-6
