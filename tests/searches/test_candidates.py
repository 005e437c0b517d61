"""A search finds the best scale that its definition allows, judged by what is stored.

Scores are recomputed in float64 from the stored codes and scales. They may differ from the oracle's best by
1e-6 relative, because the library takes its sums in float32.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import oracles
from tests.cases import (
    DTYPES,
    FORMATS,
    METRICS,
    SEARCHES,
    TILINGS,
    Stored,
    hard_matrix,
    native,
    pair,
    rng_for,
    slow_after,
)

TOLERANCE = 1e-6  # relative
E4M3 = oracles.FORMATS["fp8_e4m3fn"]
COARSE_TO_FINE = (daq.CoarseToFine(0.8, 1.5, 5, 10), oracles.coarse_to_fine(0.8, 1.5, 5, 10))


def quantized(base, tuned, recipe, matrix=None):
    return Stored.of(daq.quantize(base, tuned, recipe, rules=[daq.use("", matrix=matrix)]))


def assert_at_least(score, floor):
    """Not below `floor` by more than the tolerance; tiles that did not change are NaN in both."""
    assert np.array_equal(np.isnan(score), np.isnan(floor))
    short = floor - score > TOLERANCE * np.abs(floor)
    assert not short.any(), (
        f"{short.sum()} of {short.size} tiles; {score[short][:5]} below {floor[short][:5]}"
    )


def check(base, tuned, recipe, number, tile, metric, search, matrix=None, **options):
    """Quantize one leaf, and hold its scores and scales against the oracle's."""
    stored = quantized(base, tuned, recipe, matrix)
    best = oracles.search_leaf(base, tuned, number, tile, metric, search, matrix=matrix, **options)
    score = oracles.stored_scores(
        base, tuned, stored.codes, stored.scale, number, tile, metric, matrix=matrix
    )
    assert_at_least(score, best.absmax)
    np.testing.assert_allclose(score, best.score, rtol=TOLERANCE)
    unchanged = np.isnan(best.score)
    np.testing.assert_array_equal(stored.scale[unchanged], best.scale[unchanged])
    if metric is oracles.sign_rate:  # counts are exact, so the very scale is known
        np.testing.assert_array_equal(stored.scale, best.scale)
    return stored, best


def product():
    """Metric x search x tiling; formats, dtypes and layers take turns, so that each pair of them occurs.

    Half of them are slow; every search, metric, tiling, format, dtype and layer is in either half.
    """
    layers = [
        ((33, 50), None),
        ((2, 20, 36), None),
        ((24, 3, 4, 10), ((0,), (2, 3))),
        ((40, 33), ((1,), (0,))),
    ]
    for i, (metric, search, tiling) in enumerate(itertools.product(METRICS, SEARCHES[1:], TILINGS)):
        fmt, dtype, layer = FORMATS[i % len(FORMATS)], list(DTYPES)[i // 3 % 3], layers[(i + i // 4) % 4]
        parts = [metric[1].__name__, type(search[0]).__name__, type(tiling[0]).__name__]
        yield pytest.param(
            metric,
            search,
            tiling,
            fmt,
            dtype,
            layer,
            id="-".join([*parts, fmt[1].name, dtype]),
            marks=pytest.mark.slow if (i + i // 12) % 2 else (),
        )


@pytest.mark.parametrize(("metric", "search", "tiling", "fmt", "dtype", "layer"), list(product()))
def test_search_finds_the_best_of_its_candidates(metric, search, tiling, fmt, dtype, layer):
    shape, matrix = layer
    base, tuned = pair(f"search {dtype} {shape}", shape, DTYPES[dtype])
    recipe = daq.Recipe(format=fmt[0], tiling=tiling[0], metric=metric[0], search=search[0])
    check(base, tuned, recipe, fmt[1], tiling[1], metric[1], search[1], matrix)


@pytest.mark.parametrize(("metric", "oracle"), slow_after(1, METRICS), ids=["cosine", "sign_rate", "neg_mse"])
def test_full_size_blocks_of_a_native_base(metric, oracle):
    base, tuned = native("native blocks", (130, 257))
    search, spec = COARSE_TO_FINE
    recipe = daq.Recipe(metric=metric, search=search)
    _stored, best = check(base, tuned, recipe, E4M3, (128, 128), oracle, spec)
    if metric is not daq.neg_mse:
        assert (
            best.score[:, :2] > best.absmax[:, :2]
        ).all()  # the case is one where there is something to gain


@pytest.mark.parametrize(("metric", "oracle"), METRICS, ids=["cosine", "sign_rate", "neg_mse"])
@pytest.mark.parametrize(("fmt", "number"), slow_after(1, FORMATS), ids=lambda f: getattr(f, "name", None))
def test_hard_tiles(fmt, number, metric, oracle):
    base, tuned, names = hard_matrix()
    search, spec = COARSE_TO_FINE
    recipe = daq.Recipe(format=fmt, tiling=daq.Block(16, 16), metric=metric, search=search)
    stored, _best = check(base, tuned, recipe, number, (16, 16), oracle, spec)
    scale = dict(zip(names, stored.scale[0], strict=True))
    absmax = dict(zip(names, oracles.absmax_scales(tuned, number, (16, 16))[0], strict=True))
    for name in ("all zero", "frozen", "tuned to zero", "subnormal"):
        assert scale[name] == absmax[name], name
    assert absmax["all zero"] == absmax["tuned to zero"] == absmax["subnormal"] == 1
    if metric is not daq.neg_mse:
        assert np.isfinite(stored.scale).all()
    if metric == daq.SignRate():
        assert scale["below threshold"] == absmax["below threshold"]  # every ratio scores 1


@pytest.mark.parametrize("size", [1e-12, 1e15])
def test_cosine_search_does_not_depend_on_the_size_of_the_weights(size):
    base, tuned = (x * np.float32(size) for x in native("far", (32, 48)))
    search, spec = COARSE_TO_FINE
    recipe = daq.Recipe(tiling=daq.Block(16, 16), search=search)
    check(base, tuned, recipe, E4M3, (16, 16), oracles.cosine, spec)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_where_squares_leave_float32_a_search_is_still_not_below_absmax(size):
    base, tuned = (x * np.float32(size) for x in native("farther", (32, 48)))
    recipe = daq.Recipe(tiling=daq.Block(16, 16), search=COARSE_TO_FINE[0])
    stored = quantized(base, tuned, recipe)
    best = oracles.search_leaf(base, tuned, E4M3, (16, 16), oracles.cosine, oracles.absmax())
    score = oracles.stored_scores(base, tuned, stored.codes, stored.scale, E4M3, (16, 16), oracles.cosine)
    assert_at_least(score, best.absmax)


@pytest.mark.parametrize(
    ("search", "spec"),
    [
        COARSE_TO_FINE,
        (daq.Grid(0.5, 2.0, 13), oracles.grid(0.5, 2.0, 13)),
        (daq.Grid(0.75, 1.25, 2), oracles.grid(0.75, 1.25, 2)),
        (daq.CoarseToFine(0.5, 1.5, 3, 2), oracles.coarse_to_fine(0.5, 1.5, 3, 2)),
    ],
    ids=lambda x: str(x) if dataclasses.is_dataclass(x) else "",
)
def test_ties_go_to_the_ratio_nearest_one_then_to_the_smaller(search, spec):
    """Tiles of six elements have seven possible sign rates, so that most picks are ties."""
    base, tuned = native("many ties", (48, 60), change=0.3)
    recipe = daq.Recipe(tiling=daq.Block(2, 3), metric=daq.SignRate(), search=search)
    stored, _best = check(base, tuned, recipe, E4M3, (2, 3), oracles.sign_rate, spec)
    ratio = stored.scale / oracles.absmax_scales(tuned, E4M3, (2, 3))
    assert len(np.unique(np.round(ratio, 4))) > 1


def test_where_all_ratios_tie_absmax_is_kept():
    rng = rng_for("all tie")
    base = rng.normal(0, 0.02, (32, 32)).astype(np.float32)
    tuned = base + rng.choice([-5e-6, 5e-6], base.shape).astype(np.float32)  # under the threshold
    recipe = daq.Recipe(tiling=daq.Block(8, 8), metric=daq.SignRate(), search=COARSE_TO_FINE[0])
    stored = quantized(base, tuned, recipe)
    np.testing.assert_array_equal(stored.scale, oracles.absmax_scales(tuned, E4M3, (8, 8)))


@pytest.mark.parametrize(("search", "spec"), SEARCHES, ids=lambda s: type(s).__name__)
def test_power_of_two_scales_are_rounded_up(search, spec):
    base, tuned = pair("powers", (48, 40))
    recipe = daq.Recipe(tiling=daq.Block(16, 16), search=search, scales=daq.PowerOfTwo())
    options = {"finish": oracles.power_of_two_above}
    stored, _ = check(base, tuned, recipe, E4M3, (16, 16), oracles.cosine, spec, **options)
    assert (np.frexp(stored.scale)[0] == 0.5).all()


def test_an_absmax_scale_that_is_a_power_of_two_stays():
    tuned = np.full((4, 4), 448 * 2.0**-9, np.float32)
    recipe = daq.Recipe(tiling=daq.PerTensor(), search=daq.AbsMax(), scales=daq.PowerOfTwo())
    assert float(quantized(0.9 * tuned.astype(np.float32), tuned, recipe).scale[0, 0]) == 2.0**-9
    above = np.nextafter(tuned, np.float32(1e9))
    assert float(quantized(0.9 * tuned.astype(np.float32), above, recipe).scale[0, 0]) == 2.0**-8


# --- The base's own scale -----------------------------------------------------------------------------------


def test_with_base_scale_adds_the_absmax_scale_of_the_base():
    base, tuned = native("base scale", (48, 64), change=0.1)
    tile, oracle = (16, 16), oracles.cosine
    for search in (daq.AbsMax(), COARSE_TO_FINE[0]):
        recipe = daq.Recipe(tiling=daq.Block(*tile), search=daq.WithBaseScale(search))
        plain = daq.Recipe(tiling=daq.Block(*tile), search=search)
        scores = []
        for scale in (quantized(base, tuned, recipe), quantized(base, tuned, plain)):
            scores.append(oracles.stored_scores(base, tuned, scale.codes, scale.scale, E4M3, tile, oracle))
        own = oracles.absmax_scales(base, E4M3, tile)
        codes = E4M3.round(tuned / oracles.spread(own, tuned.shape, tile))
        kept = codes.astype(np.float32) * oracles.spread(own, tuned.shape, tile)
        wanted = scores[1].copy()
        for index, where in oracles.tiles(tuned.shape, tile):
            d, q = ((x[where] - base[where]).astype(np.float64).ravel() for x in (tuned, kept))
            wanted[index] = max(wanted[index], oracle(d, q[None])[0])
        np.testing.assert_allclose(scores[0], wanted, rtol=TOLERANCE)


def test_with_base_scale_tries_the_scale_that_the_base_stores():
    """A tuned weight of exact steps on the base's grid is kept whole by the stored scale alone."""
    stored_scale = np.array([[2.0**-10 * 1.3]], np.float32)
    codes = rng_for("stored").integers(-64, 64, (16, 16)).astype(np.float32)
    make = daq.Recipe(format=daq.int8, tiling=daq.PerTensor(), search=daq.AbsMax())
    codes[0, 0] = 127
    base = daq.quantize(codes * stored_scale * np.float32(0.9), codes * stored_scale, make)
    moved = codes.copy()
    moved[0, 0] = 100  # so that AbsMax of the tuned weight is another scale
    moved[1:4] += 1
    tuned = moved * np.float32(base.scale)
    recipe = daq.Recipe(format=daq.int8, tiling=daq.PerTensor(), search=daq.WithBaseScale(daq.AbsMax()))
    q = daq.quantize(base, tuned, recipe)
    np.testing.assert_array_equal(q.scale, base.scale)
    np.testing.assert_array_equal(q.dequantize(), tuned)


# --- A caller's own metric, and settings as values ----------------------------------------------------------


def worst_element(d, q):
    return -jnp.max(jnp.abs(d - q), axis=-1)


def cautious(d, q):
    return jnp.minimum(daq.cosine(d, q), daq.SignRate()(d, q))


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        (worst_element, lambda d, q: -np.max(np.abs(d - q), -1)),
        (cautious, lambda d, q: np.minimum(oracles.cosine(d, q), oracles.sign_rate(d, q))),
    ],
    ids=["worst_element", "cautious"],
)
def test_a_callers_own_metric(metric, oracle):
    base, tuned = native("own metric", (40, 50))
    recipe = daq.Recipe(tiling=daq.Block(16, 16), metric=metric, search=COARSE_TO_FINE[0])
    check(base, tuned, recipe, E4M3, (16, 16), oracle, COARSE_TO_FINE[1])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: daq.Grid(1.5, 0.8, 5),
        lambda: daq.Grid(0.0, 1.0, 5),
        lambda: daq.Grid(0.8, 1.5, 0),
        lambda: daq.Grid(0.8, float("nan"), 3),
        lambda: daq.CoarseToFine(0.8, 1.5, 0, 10),
        lambda: daq.CoarseToFine(0.8, 1.5, 5, -1),
        lambda: daq.CoarseToFine(-0.8, 1.5, 5, 10),
    ],
)
def test_searches_are_checked_when_made(wrong):
    with pytest.raises(ValueError, match="must"):
        wrong()


def test_searches_and_recipes_are_values():
    assert daq.CoarseToFine(0.8, 1.5, 5, 10) == daq.CoarseToFine(0.8, 1.5, 5, 10)
    assert daq.WithBaseScale(daq.AbsMax()) == daq.WithBaseScale(daq.AbsMax()) != daq.AbsMax()
    assert daq.Recipe() == daq.Recipe(format=daq.fp8_e4m3fn, tiling=daq.Block(128, 128), search=daq.AbsMax())
    assert hash(daq.Recipe()) == hash(daq.Recipe())
    with pytest.raises(TypeError):
        daq.Recipe(daq.int8)  # keywords only
