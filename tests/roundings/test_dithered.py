"""A dither on the grid of the base, by the weights with small steps, corrected where the change acts."""

import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import rounding_oracles as ro
from tests.cases import slow_after

GRIDS = {
    "fp8": (daq.fp8_e4m3fn, daq.Block(128, 128)),
    "int8": (daq.int8, daq.Channel()),
    "int4": (daq.int4, daq.Group(32)),
    "fp4": (daq.fp4_e2m1, daq.Group(16)),
}


def base_on(name, shape=(256, 384), seed=0):
    """Codes drawn at random under random scales, as a QTensor; the largest code of each tile is used."""
    number, tiling = GRIDS[name]
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.02, shape).astype(np.float32)
    return daq.quantize({"w": w}, {"w": w}, daq.Recipe(format=number, tiling=tiling), rules=())["w"]


def change_of(size, shape=(256, 384), seed=1, directions=8):
    """Float64 `[R, C]`, of root mean square `size`: a few directions and a tenth of noise; or noise alone."""
    rng = np.random.default_rng(seed)
    d = 0.3 * rng.normal(0, 1, shape)
    for k in range(directions):
        d += (2 - k / 8) / 2 * np.outer(rng.normal(0, 1, shape[0]), rng.normal(0, 1, shape[1]))
    return d * size / np.sqrt(np.mean(d * d))


def rounded(base, tuned, name, rounding):
    number, tiling = GRIDS[name]
    recipe = daq.Recipe(format=number, tiling=tiling, rounding=rounding, search=lambda trials: trials.base)
    return daq.quantize({"w": base}, {"w": tuned}, recipe, rules=())["w"]


def kept(q):
    return np.asarray(q.dequantize(jnp.float32), np.float64)


@pytest.mark.parametrize("name", slow_after(2, list(GRIDS)))
def test_no_change_gives_the_codes_of_the_base(name):
    base = base_on(name)
    q = rounded(base, base.dequantize(), name, daq.DitheredFeedback())
    assert np.array_equal(kept(q), kept(base))


@pytest.mark.parametrize(("name", "size"), slow_after(2, [(n, s) for s in (1e-4, 1e-3) for n in GRIDS]))
def test_a_tune_is_kept_at_its_size_by_rows_and_by_columns(name, size):
    base = base_on(name)
    before = kept(base)
    tuned = (before + change_of(size)).astype(np.float32)
    change, q = tuned - before, kept(rounded(base, tuned, name, daq.DitheredFeedback()))
    noise = change * (q - tuned)
    for axes in ((0, 1), (0,), (1,)):
        projection = 1 + np.sum(noise, axes) / np.sum(change**2, axes)
        deviation = np.sqrt(np.sum(noise**2, axes)) / np.sum(change**2, axes)
        deviation = np.maximum(deviation, np.mean(deviation))  # where few weights move it is itself a draw
        assert np.mean(np.abs(projection - 1) < 3.5 * deviation + 0.02) > 0.97


@pytest.mark.parametrize("name", slow_after(1, list(GRIDS)))
def test_a_change_without_directions_is_rounded_to_nearest(name):
    base = base_on(name)
    tuned = (kept(base) + change_of(2e-4, directions=0)).astype(np.float32)
    q, plain = (rounded(base, tuned, name, r) for r in (daq.DitheredFeedback(), daq.Nearest()))
    assert np.array_equal(kept(q), kept(plain))


@pytest.mark.parametrize("name", slow_after(2, list(GRIDS)))
def test_it_errs_little_more_than_a_draw_and_less_along_the_change(name):
    base = base_on(name)
    tuned = (kept(base) + change_of(4e-4)).astype(np.float32)
    change = tuned - kept(base)
    along = np.linalg.svd(change)[0][:, :8].T
    errors = [kept(rounded(base, tuned, name, r)) - tuned for r in (daq.DitheredFeedback(), daq.Stochastic())]
    sizes, leading = (
        [np.mean(e**2) for e in errors],
        [np.mean((along @ e) ** 2) for e in errors],
    )
    assert sizes[0] < 1.15 * sizes[1]  # where all steps are alike no weight carries the change at less noise
    assert leading[0] < 0.8 * leading[1]


@pytest.mark.parametrize("size", [3e-5, 1e-4, 1e-3])
def test_of_a_tune_stored_in_bfloat16_beside_an_exact_base_what_was_tuned_is_kept_at_its_size(size):
    """Codes times powers of two are exact in bfloat16: small changes are lost, or become a whole unit."""
    shape = (512, 512)
    recipe = daq.Recipe(
        format=daq.fp8_e4m3fn,
        tiling=daq.Block(128, 128),
        scales=daq.PowerOfTwo(),
        rounding=daq.DitheredFeedback(),
        search=daq.BaseScale(),
    )
    w = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    q = daq.quantize({"w": w}, {"w": w}, recipe, rules=())["w"]
    base, d = kept(q), change_of(size, shape)
    tuned = jnp.asarray(base + d, jnp.bfloat16)
    stored = np.asarray(tuned, np.float64) - base
    left, _, right = np.linalg.svd(d)
    along = [left[:, k] @ stored @ right[k] for k in range(8)]  # what is left of the tune when it is stored
    for pair in ((q, tuned), (jnp.asarray(base, jnp.bfloat16), tuned)):
        found = kept(daq.quantize({"w": pair[0]}, {"w": pair[1]}, recipe, rules=())["w"]) - base
        share = [left[:, k] @ found @ right[k] for k in range(8)]
        assert abs(np.mean(np.divide(share, along)) - 1) < 0.05


def test_a_weight_moves_by_one_step_towards_its_change_or_not_at_all():
    base, grid = base_on("fp4"), ro.grids()["fp4_e2m1"]
    tuned = (kept(base) + change_of(2e-4)).astype(np.float32)
    q = rounded(base, tuned, "fp4", daq.DitheredFeedback())
    before, after = (np.searchsorted(grid, np.asarray(x.codes, np.float64)) for x in (base, q))
    steps = after - before
    assert set(np.unique(steps)) <= {-1, 0, 1}
    moved = steps != 0
    assert np.all(np.sign(steps[moved]) == np.sign(tuned - kept(base))[moved])


def test_off_the_grid_of_the_base_codes_are_corrected_where_the_change_acts():
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.02, (256, 384)).astype(np.float32)
    tuned = (base + change_of(4e-4)).astype(np.float32)
    errors = [
        kept(daq.quantize({"w": base}, {"w": tuned}, daq.Recipe(rounding=r), rules=())["w"]) - tuned
        for r in (daq.DitheredFeedback(), daq.Nearest())
    ]
    along = np.linalg.svd(tuned - base)[0][:, :8].T
    assert np.mean((along @ errors[0]) ** 2) < np.mean((along @ errors[1]) ** 2) / 4
    assert np.mean(errors[0] ** 2) < 1.6 * np.mean(errors[1] ** 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "`rank` must be a whole number above 0; got 0"),
        ({"damping": 0.0}, "`damping` must be a number above 0; got 0.0"),
        ({"reach": float("nan")}, "`reach` must be a number above 0; got nan"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        daq.DitheredFeedback(**settings)


@pytest.mark.parametrize("shape", slow_after(1, [((2, 40),), ((1, 1),), ((131, 70),)]))
def test_odd_shapes_are_rounded_too(shape):
    rng = np.random.default_rng(4)
    base = rng.normal(0, 0.02, shape).astype(np.float32)
    q = daq.quantize(
        base, base * np.float32(1.01), daq.Recipe(rounding=daq.DitheredFeedback()), rules=[daq.use("")]
    )
    assert np.isfinite(kept(q)).all()
