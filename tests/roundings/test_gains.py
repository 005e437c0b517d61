"""Unbiased rounding: a gain for each set, a kept change of the true size, and nearest codes where it must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import daq_jax as daq
from tests import oracles
from tests import rounding_oracles as ro
from tests.cases import BF16, assert_same_bits, pair, slow_after

PER = ("column", "row", "tile")
EVERY_PER = pytest.mark.parametrize("per", PER)
E4M3 = oracles.FORMATS["fp8_e4m3fn"]
BLOCK = (daq.Block(128, 128), (128, 128))
NARROW = {
    "channel": (daq.Channel(), (None, 1)),
    "group": (daq.Group(32), (32, 1)),
    "tall group": (daq.Group(32), (32, 1)),
    "small blocks": (daq.Block(16, 16), (16, 16)),
}


def gain(per="column", tiling=BLOCK[0], **settings):
    return daq.Recipe(rounding=daq.UnbiasedGain(per), tiling=tiling, **settings)


def subspace(rank=32, per="column", turns=12, tiling=BLOCK[0], **settings):
    return daq.Recipe(rounding=daq.UnbiasedSubspace(rank, per, turns), tiling=tiling, **settings)


def nearest(recipe):
    return dataclasses.replace(recipe, rounding=daq.Nearest())


def same_codes(a, b):
    """Share of equal codes; zeros of either sign are one."""
    a, b = (np.asarray(q.format.decode(jnp.asarray(q.codes))) for q in (a, b))
    return np.mean(a == b)


def kept(q):
    return np.asarray(q.dequantize(jnp.float32), np.float64)


def all_of(q, tile, number=E4M3):
    """Values of the codes and scales spread over them, `[R, C]`, by the oracle."""
    values = number.decode(np.asarray(q.codes))
    return values, oracles.spread(np.asarray(q.scale), values.shape, tile)


# --- One gain for each set ----------------------------------------------------------------------------------


def assert_gains(base, tuned, q, tile, per, number=E4M3):
    """Each set has one gain that explains its codes, and is at most one jump from a projection of 1.

    Where plain rounding is unbiased within two standard deviations over the tile, the codes are the nearest.
    """
    values, scale = all_of(q, tile, number)
    labels = ro.set_labels(base.shape, tile, per)
    low, high = ro.shared_gains(*ro.gain_intervals(base, tuned, values, scale, number.grid()[0]), labels)
    assert np.all(low <= high), f"{np.sum(low > high)} of {len(low)} sets have no one gain"
    assert np.all((low <= ro.LARGEST_GAIN) & (high >= 1 / ro.LARGEST_GAIN))

    plain = number.round(tuned / scale.astype(np.float32))
    is_plain = ro.over_sets(values != plain, labels) == 0
    tiles = ro.set_labels(base.shape, tile, "tile")
    noise = ro.bias_in_noise(
        base, tuned, plain * scale, tiles
    )  # NaN without change, infinite for <d, e> alone
    noise_of = np.full(labels.max() + 1, np.nan)
    noise_of[labels] = noise[tiles]  # meant for sets that lie inside one tile
    assert np.all(is_plain[noise_of < 1.99])

    first, step = ro.projection_at(np.ones_like(low), base, tuned, scale, number, labels), 1.002
    at_ends = [
        ro.projection_at(g, base, tuned, scale, number, labels)
        for g in (np.maximum(low / step, 0), np.minimum(high * step, ro.LARGEST_GAIN))
    ]
    now = ro.over_sets((tuned.astype(np.float64) - base) * (values * scale - base), labels)
    with np.errstate(invalid="ignore"):
        now = now / ro.over_sets((tuned.astype(np.float64) - base) ** 2, labels)
    biased = (noise_of > 2.01) & np.isfinite(now)
    reached = at_ends[1] >= 1 - 1e-4
    fell_back = is_plain & (first < 1)
    assert np.all((reached | fell_back)[biased & (now < 1)])
    assert np.all((at_ends[0] <= 1 + 1e-4)[biased & (now > 1)])
    return now[biased]


@EVERY_PER
@pytest.mark.parametrize("change", [0.003, 0.03])
def test_every_set_has_one_gain_and_a_projection_within_a_jump_of_one(per, change):
    base, tuned = ro.native(1, (256, 384), change)
    q = daq.quantize(base, tuned, gain(per))
    projections = assert_gains(base, tuned, q, BLOCK[1], per)
    assert len(projections) >= 6


@pytest.mark.parametrize(
    ("name", "per"),
    slow_after(
        3,
        [
            ("group", "column"),
            ("channel", "row"),
            ("small blocks", "row"),
            ("group", "row"),
            ("tall group", "column"),
        ],
    ),
)
def test_every_set_of_narrow_tiles_has_one_gain(name, per):
    tiling, tile = NARROW[name]
    base, tuned = ro.native(2, (2048, 16) if name == "tall group" else (192, 80), 0.02, tile=tile)
    q = daq.quantize(base, tuned, gain(per, tiling))
    values, scale = all_of(q, tile)
    labels = ro.set_labels(base.shape, tile, per)
    low, high = ro.shared_gains(*ro.gain_intervals(base, tuned, values, scale, E4M3.grid()[0]), labels)
    assert np.all(low <= high), f"{np.sum(low > high)} of {len(low)} sets have no one gain"
    assert 0.97 < ro.projection(base, tuned, kept(q)) < 1.03


@pytest.mark.slow
def test_every_set_has_one_gain_in_int8():
    per = "row"
    number = oracles.FORMATS["int8"]
    base, tuned = ro.native(3, (256, 384), 0.01, number=number)
    q = daq.quantize(base, tuned, gain(per, format=daq.int8))
    assert_gains(base, tuned, q, BLOCK[1], per, number)
    assert 0.97 < ro.projection(base, tuned, kept(q)) < 1.03


# --- Projection ---------------------------------------------------------------------------------------------


@EVERY_PER
@pytest.mark.parametrize("change", [0.001, 0.003, 0.01, 0.03, 0.1])
def test_gain_keeps_the_size_of_the_change_of_a_native_base(per, change):
    base, tuned = ro.native(4, (256, 384), change)
    if change < 0.1:  # the case at hand: the nearest codes erase the change, or a part of it
        assert ro.projection(base, tuned, kept(daq.quantize(base, tuned, nearest(gain())))) < 0.97
    q = daq.quantize(base, tuned, gain(per))
    assert 0.97 <= ro.projection(base, tuned, kept(q)) <= 1.03


@pytest.mark.parametrize("structure", [None, 8])
@pytest.mark.parametrize("change", slow_after(1, [0.01, 0.001, 0.1]))
def test_subspace_keeps_the_size_of_the_change_of_a_native_base(change, structure):
    base, tuned = ro.native(5, (256, 384), change, rank=structure)
    q = daq.quantize(base, tuned, subspace())
    assert 0.9 <= ro.projection(base, tuned, kept(q)) <= 1.1


@pytest.mark.parametrize("change", [0.003, 0.03])
def test_subspace_leaves_no_error_in_the_directions_of_the_change(change):
    base, tuned = ro.native(6, (256, 384), change, rank=8)
    d = tuned.astype(np.float64) - base
    u, _, vt = np.linalg.svd(d, full_matrices=False)

    def inside(recipe):
        return np.linalg.norm(u[:, :8].T @ (kept(daq.quantize(base, tuned, recipe)) - tuned) @ vt[:8].T)

    # What the gain alone leaves is about the size of noise spread at random: the room below it is small.
    assert inside(subspace()) <= inside(gain())
    assert inside(subspace()) <= inside(nearest(subspace())) / 8


@EVERY_PER
@pytest.mark.parametrize("change", [0.003, 0.05])
def test_gain_leaves_a_base_alone_that_was_never_on_the_grid(per, change):
    base, tuned = (x.astype(np.float32) for x in pair("bf16 base", (256, 384), BF16, change))
    q = daq.quantize(base, tuned, gain(per))
    assert same_codes(q, daq.quantize(base, tuned, nearest(gain()))) >= 0.97


# --- Back to the nearest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*map(gain, PER), subspace()], ids=[*PER, "subspace"])
def test_a_tile_without_change_gets_the_nearest_codes(recipe):
    base, tuned = (x.copy() for x in ro.native(7, (256, 384), 0.01))
    base[:128, :128] += np.float32(3e-4)  # off the grid, so that a gain or a correction would show
    tuned[:128, :128] = base[:128, :128]
    got, wanted = daq.quantize(base, tuned, recipe), daq.quantize(base, tuned, nearest(recipe))
    bits = [np.asarray(q.codes).view(np.uint8)[:128, :128] for q in (got, wanted)]
    np.testing.assert_array_equal(*bits)
    assert same_codes(got, wanted) < 0.999  # elsewhere it does something


@pytest.mark.parametrize("recipe", [*map(gain, PER), subspace()], ids=[*PER, "subspace"])
def test_no_change_at_all_gives_the_nearest_codes(recipe):
    base, _ = pair("frozen", (256, 384), np.dtype(np.float32))
    assert_same_bits(daq.quantize(base, base, recipe).codes, daq.quantize(base, base, nearest(recipe)).codes)
    zero = np.zeros((256, 384), np.float32)
    np.testing.assert_array_equal(daq.quantize(zero, zero, recipe).dequantize(), zero)


@dataclasses.dataclass(frozen=True)
class Share:
    """A search that always gives one share of the AbsMax scale."""

    ratio: float

    def __call__(self, trials):
        return trials.absmax * jnp.float32(self.ratio)


def test_a_change_that_no_gain_reaches_gets_the_nearest_codes():
    per = "row"
    too_small = np.full((256, 384), 0.25, np.float32)
    too_small[:, ::128] = too_small[::128] = 1.0  # holds the scale of each tile
    changed = too_small.copy()
    changed[changed == 0.25] += np.float32(2.0**-24)  # the grid has 0.25, and its step there is 2^-6 or so
    saturated = np.full((256, 384), 0.5, np.float32)
    for base, tuned, search in [
        (too_small, changed, daq.AbsMax()),
        (saturated, 2 * saturated, Share(0.25)),  # the largest code stands for less than the base
    ]:
        recipe = gain(per, search=search)
        got, wanted = daq.quantize(base, tuned, recipe), daq.quantize(base, tuned, nearest(recipe))
        assert_same_bits(got, wanted)
        assert ro.projection(base, tuned, kept(got)) <= 0


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e25])
@pytest.mark.parametrize("recipe", [gain(), subspace()], ids=["gain", "subspace"])
def test_codes_are_numbers_for_weights_of_any_size(recipe, size):
    base, tuned = (x * np.float32(size) for x in ro.native(8, (256, 384), 0.02))
    values = E4M3.decode(np.asarray(daq.quantize(base, tuned, recipe).codes))
    assert np.all(np.isfinite(values))


# --- Shapes, formats, scales --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", slow_after(1, [((3, 5),), ((1, 1),), ((130, 257),)]))
@pytest.mark.parametrize("recipe", [gain("row"), subspace(per="row")], ids=["gain", "subspace"])
def test_odd_and_tiny_matrices(shape, recipe):
    one = np.full((1, 1), 0.5, np.float32)
    base, tuned = (one, one * np.float32(1.01)) if shape == (1, 1) else ro.native(9, shape, 0.02)
    q, plain = (daq.quantize(base, tuned, r, rules=[daq.use("")]) for r in (recipe, nearest(recipe)))
    assert_same_bits(q.scale, plain.scale)
    assert q.codes.shape == shape
    assert np.all(np.isfinite(kept(q)))
    if shape == (130, 257):
        assert 0.95 < ro.projection(base, tuned, kept(q)) < 1.05
    elif isinstance(recipe.rounding, daq.UnbiasedGain):
        _, scale = all_of(q, BLOCK[1])
        step = 2.0**-3 * np.maximum(np.abs(tuned), scale * 2.0**-6)  # a code's step, at most
        assert np.all(np.abs(kept(q) - tuned) <= step * 1.01 + ro.LARGEST_GAIN * np.abs(tuned - base))


KINDS = {
    "e5m2 gain": gain("row", format=daq.fp8_e5m2),
    "nf4 group subspace": subspace(8, "row", tiling=daq.Group(32), format=daq.nf4, scales=daq.PowerOfTwo()),
    "int8 channel gain": gain("row", daq.Channel(), format=daq.int8),
    "int4 group gain": gain("row", daq.Group(32), format=daq.int4),
    "power of two gain": gain("tile", scales=daq.PowerOfTwo()),
    "int8 tensor subspace": subspace(8, "row", tiling=daq.PerTensor(), format=daq.int8),
}


@pytest.mark.parametrize("name", slow_after(2, KINDS))
def test_any_format_tiling_and_scale_gives_what_nearest_gives_in_kind(name):
    base, tuned = pair("kinds", (96, 80), BF16)
    got = daq.quantize(base, tuned, KINDS[name])
    wanted = daq.quantize(base, tuned, nearest(KINDS[name]))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert (got.codes.shape, got.codes.dtype) == (wanted.codes.shape, wanted.codes.dtype)
    assert_same_bits(got.scale, wanted.scale)  # both AbsMax
    error, plain = (np.abs(kept(q) - tuned.astype(np.float32)) for q in (got, wanted))
    assert np.mean(error) < 2.5 * np.mean(plain)


def test_powers_of_two_lose_no_size():
    base, tuned = ro.native(10, (256, 384), 0.01)
    q = daq.quantize(base, tuned, gain("row", scales=daq.PowerOfTwo()))
    mantissa, _ = np.frexp(np.asarray(q.scale))
    assert np.all(mantissa == 0.5)
    assert 0.95 < ro.projection(base, tuned, kept(q)) < 1.05


# Sets that are whole tiles, or reach over several: their neighbours decide which side of a jump they take.
LAYOUTS = {
    "blocks, tile": (daq.Block(32, 32), "tile"),
    "group, column": (daq.Group(32), "column"),
}
EVERY_LAYOUT = pytest.mark.parametrize(("tiling", "per"), slow_after(1, LAYOUTS.values()), ids=LAYOUTS)


@EVERY_LAYOUT
def test_stacked_matrices_are_rounded_as_each_alone(tiling, per):
    pairs = [ro.native(20 + i, (64, 128), 0.02, tile=(32, 32)) for i in range(5)]
    base, tuned = (np.stack(x) for x in zip(*pairs, strict=True))
    stacked = daq.quantize(base, tuned, gain(per, tiling))
    for i, (b, t) in enumerate(pairs):
        alone = daq.quantize(b, t, gain(per, tiling))
        np.testing.assert_array_equal(np.asarray(stacked.scale)[i], alone.scale)
        assert same_codes(dataclasses.replace(stacked, codes=stacked.codes[i]), alone) == 1


@pytest.mark.slow
def test_a_stack_has_a_subspace_for_each_matrix():
    pairs = [ro.native(20 + i, (128, 256), 0.02, rank=4) for i in range(3)]
    base, tuned = (np.stack(x) for x in zip(*pairs, strict=True))
    stacked = kept(daq.quantize(base, tuned, subspace(16)))
    for whole, (b, t) in zip(stacked, pairs, strict=True):
        alone = kept(daq.quantize(b, t, subspace(16)))
        np.testing.assert_allclose(ro.projection(b, t, whole), ro.projection(b, t, alone), atol=1e-3)
        np.testing.assert_allclose(np.mean((whole - t) ** 2), np.mean((alone - t) ** 2), rtol=1e-3)


@EVERY_LAYOUT
def test_rows_and_columns_follow_the_matrix_view(tiling, per):
    base, tuned = ro.native(11, (128, 128), 0.02, tile=(32, 32))
    flax = daq.quantize(base, tuned, gain(per, tiling))
    rules = [daq.use("", matrix=((1,), (0,)))]
    hf = daq.quantize(base.T.copy(), tuned.T.copy(), gain(per, tiling), rules=rules)
    np.testing.assert_array_equal(hf.scale, flax.scale)
    assert same_codes(dataclasses.replace(hf, codes=hf.codes.T), flax) == 1


# --- With a search ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OfBase:
    """A search that always gives the scale of the base."""

    def __call__(self, trials):
        return trials.base


@pytest.mark.slow
def test_the_stored_scale_of_the_base_is_chosen_where_it_is_better():
    first = ro.native(12, (256, 256), 0.01)[0]
    base = daq.quantize(first, first, daq.Recipe())
    on_grid = kept(base).astype(np.float32)
    rng = np.random.default_rng(12)
    tuned = (on_grid * (1 + 0.03 * (np.abs(on_grid) > 0.05)) + rng.normal(0, 2e-4, first.shape)).astype(
        np.float32
    )
    recipe = gain("row", search=daq.WithBaseScale(daq.AbsMax()), metric=daq.neg_mse)
    chosen = daq.quantize(base, tuned, recipe)

    def scores(search):
        q = daq.quantize(base, tuned, gain("row", search=search))
        d, e = tuned - on_grid, kept(q) - on_grid
        tiles = [
            (d[w].ravel().astype(np.float64), e[w].ravel()) for _, w in oracles.tiles(first.shape, BLOCK[1])
        ]
        return np.array([oracles.neg_mse(a, b[None])[0] for a, b in tiles]).reshape(2, 2), np.asarray(q.scale)

    (with_base, base_scale), (with_absmax, absmax_scale) = scores(OfBase()), scores(daq.AbsMax())
    np.testing.assert_array_equal(base_scale, base.scale)
    assert not np.any(base_scale == absmax_scale)
    assert np.any(with_base > with_absmax)
    wanted = np.where(with_base > with_absmax, base_scale, absmax_scale)
    np.testing.assert_array_equal(chosen.scale, wanted)
    assert 0.97 < ro.projection(on_grid, tuned, kept(chosen)) < 1.03


@pytest.mark.slow
def test_a_search_scores_the_codes_that_the_gain_would_store():
    base, tuned = ro.native(13, (128, 128), 0.01)
    ratios = (0.9, 1.0, 1.25)
    scores = []
    for ratio in ratios:
        q = daq.quantize(base, tuned, gain("row", search=Share(ratio)))
        d, e = (tuned - base).ravel().astype(np.float64), (kept(q) - base).ravel()
        scores.append(oracles.neg_mse(d, e[None])[0])
    found = daq.quantize(base, tuned, gain("row", search=daq.Grid(0.9, 1.25, 2), metric=daq.neg_mse))
    best = np.float32(ratios[int(np.argmax(scores))]) * oracles.absmax_scale(tuned, E4M3)
    np.testing.assert_array_equal(found.scale, [[best]])


# --- One result however it runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [gain(), subspace()], ids=["gain", "subspace"])
def test_two_runs_give_the_same_bits(recipe):
    base, tuned = ro.native(14, (256, 384), 0.02)
    first = daq.quantize(base, tuned, recipe)
    assert_same_bits(daq.quantize(base, tuned, recipe), first)


# Shapes of which a CPU takes the tiles in parts when it can, beside tilings whose sets reach over tiles.
PARTS = {
    "blocks, column": ((1024, 640), BLOCK[0], "column"),
    "blocks, tile": ((1024, 640), BLOCK[0], "tile"),
    "channel, row": ((4096, 100), daq.Channel(), "row"),
    "group, tile": ((3264, 90), daq.Group(32), "tile"),
}


@pytest.mark.parametrize("name", slow_after(1, PARTS))
def test_a_cpu_finds_the_same_codes_part_by_part(name):
    shape, tiling, per = PARTS[name]
    base, tuned = pair("parts", shape, np.dtype(np.float32))
    base = base.astype("float8_e4m3fn").astype(np.float32)
    tuned = base + np.float32(0.02) * (tuned - base)
    run = lambda b, t: daq.quantize(b, t, gain(per, tiling))  # noqa: E731
    in_parts, whole = run(base, tuned), jax.jit(run)(jnp.asarray(base), jnp.asarray(tuned))
    assert same_codes(in_parts, whole) == 1


def assert_alike(base, tuned, got, wanted):
    got, wanted = kept(got), kept(wanted)
    np.testing.assert_allclose(ro.projection(base, tuned, got), ro.projection(base, tuned, wanted), atol=1e-3)
    np.testing.assert_allclose(np.mean((got - tuned) ** 2), np.mean((wanted - tuned) ** 2), rtol=1e-3)


def test_subspace_under_jit_agrees_with_eager():
    base, tuned = ro.native(15, (256, 384), 0.01)
    run = lambda b, t: daq.quantize(b, t, subspace())  # noqa: E731
    assert_alike(base, tuned, jax.jit(run)(jnp.asarray(base), jnp.asarray(tuned)), run(base, tuned))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SHARDED = {
    "gain": (gain(), AUTO),
    "gain per tile": (gain("tile"), EXPLICIT),
    "subspace": (subspace(), EXPLICIT),
}


@pytest.mark.parametrize(("recipe", "axis_type"), slow_after(1, SHARDED.values()), ids=SHARDED)
def test_sharded_weights_are_rounded_as_whole_ones(recipe, axis_type):
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    base, tuned = ro.native(16, (256, 384), 0.01)
    sharding = NamedSharding(mesh, P("x", "y"))
    got = daq.quantize(*jax.device_put((base, tuned), sharding), recipe)
    wanted = daq.quantize(base, tuned, recipe)
    assert got.codes.sharding.is_equivalent_to(sharding, 2)
    assert_alike(base, tuned, got, wanted)
    if isinstance(recipe.rounding, daq.UnbiasedGain):
        assert same_codes(got, wanted) >= 0.999


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [daq.UnbiasedGain, lambda per: daq.UnbiasedSubspace(8, per)])
@pytest.mark.parametrize("per", ["rows", "", None, 1])
def test_a_wrong_per_is_refused(make, per):
    with pytest.raises(Exception, match=r"'row', 'column' or 'tile'|per"):
        make(per)


@pytest.mark.parametrize("word", ["rank", "turns"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_a_rank_or_a_number_of_turns_below_one_is_refused(word, value):
    with pytest.raises(ValueError, match=rf"`{word}` must be a whole number above 0; got {value}"):
        daq.UnbiasedSubspace(**{word: value})


def test_roundings_are_values():
    assert daq.UnbiasedGain() == daq.UnbiasedGain("column")
    assert daq.UnbiasedSubspace() == daq.UnbiasedSubspace(128, "column", 12)
    assert len({daq.UnbiasedGain(p) for p in PER} | {daq.UnbiasedSubspace(8, p) for p in PER}) == 6
