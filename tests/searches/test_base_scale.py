"""`BaseScale` finds the scale that a base was made with, and keeps it.

A base is made here from codes and scales: of all formats and tilings, with scales of every kind that models
ship with, stored in float32 and in bfloat16. The oracle of a scale is the scale that the base was made with.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import daq_jax as daq
from daq_jax.grids.membership import distance_in_steps, is_native
from daq_jax.numerics.machine import Machine
from daq_jax.scales import InDtype
from daq_jax.tilings import DEFAULT_MATRIX, TileView
from tests import oracles
from tests.cases import BF16, DTYPES, assert_same_bits, rng_for, slow_after
from tests.rounding_oracles import ceil, floor, grids

GRIDS = grids()
BLOCK, GROUP = (daq.Block(), (128, 128)), (daq.Group(32), (32, 1))
CHANNEL = (daq.Channel(), (None, 1))


def nearest(x, values):
    """The nearest of the values to each number, none of which lies half-way."""
    low, high = floor(x, values), ceil(x, values)
    return np.where(x - low <= high - x, low, high)


def e4m3(x):
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def rule(kind, absmax, largest):
    """The scales that a tool would store for tiles of such a largest weight."""
    plain = (absmax / largest).astype(np.float32)
    if kind == "ceil":
        return np.exp2(np.ceil(np.log2(plain))).astype(np.float32)
    if kind == "floor":
        return np.exp2(np.floor(np.log2(absmax)) - np.floor(np.log2(largest))).astype(np.float32)
    if kind == "e4m3":  # NVFP4: numbers of e4m3 times one float32
        whole = np.float32(plain.max() / 448)
        return e4m3(plain / whole) * whole
    if kind == "4 or 6":
        return plain * np.where(rng_for("4 or 6").random(plain.shape) < 0.5, 1, 1.5).astype(np.float32)
    return plain.astype(BF16).astype(np.float32) if kind == "bfloat16" else plain


def native_base(fmt, tile, kind, dtype, shape=(256, 384)):
    """Weights on a grid, stored in `dtype`, and the scales that they were made with."""
    values = GRIDS[fmt.name]
    weight = rng_for(f"{fmt.name} {tile} {kind}").normal(0, 0.02, shape).astype(np.float32)
    absmax = np.zeros(oracles.grid_shape(shape, tile), np.float32)
    for index, where in oracles.tiles(shape, tile):
        absmax[index] = np.abs(weight[where]).max()
    scale = rule(kind, absmax, fmt.largest)
    spread = oracles.spread(scale, shape, tile)
    codes = nearest(np.clip(weight / spread, -fmt.largest, fmt.largest), values)
    return (codes.astype(np.float32) * spread).astype(dtype), scale, codes


def tune(base, size=0.01):
    change = rng_for("tune").normal(0, size * 0.02, base.shape).astype(np.float32)
    return (base.astype(np.float32) + change).astype(base.dtype)


def recipe_of(fmt, tiling, **parts):
    return daq.Recipe(format=fmt, tiling=tiling, search=daq.BaseScale(), **parts)


CASES = [
    (daq.fp8_e4m3fn, BLOCK, "plain"),
    (daq.fp4_e2m1, GROUP, "ceil"),
    (daq.fp8_e4m3fn, BLOCK, "ceil"),
    (daq.fp8_e4m3fn, CHANNEL, "bfloat16"),
    (daq.fp8_e5m2, BLOCK, "plain"),
    (daq.int8, CHANNEL, "plain"),
    (daq.fp4_e2m1, GROUP, "floor"),
    (daq.fp4_e2m1, (daq.Group(16), (16, 1)), "e4m3"),
    (daq.fp4_e2m1, (daq.Group(16), (16, 1)), "4 or 6"),
    (daq.int4, GROUP, "plain"),
    (daq.int4, (daq.Group(128), (128, 1)), "bfloat16"),
    (daq.nf4, (daq.Group(64), (64, 1)), "plain"),
]


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("fmt", "tiles", "kind"), slow_after(3, CASES), ids=str)
def test_the_scale_that_the_base_was_made_with_is_found(fmt, tiles, kind, dtype):
    base, scale, codes = native_base(fmt, tiles[1], kind, dtype)
    q = daq.quantize(base, tune(base), recipe_of(fmt, tiles[0]))
    found = np.asarray(q.scale)
    # A tile without the codes of the upper octave is also on the grid of half the scale.
    octaves = np.exp2(np.round(np.log2(found / scale)))
    assert np.isin(octaves, [0.5, 1]).all()
    exact = dtype == np.float32 or kind in ("ceil", "floor")
    np.testing.assert_allclose(found, scale * octaves, rtol=3e-7 if exact else 2**-8)
    own = daq.quantize(base, base, recipe_of(fmt, tiles[0]))
    values = np.asarray(own.format.decode(own.codes)) * oracles.spread(octaves, base.shape, tiles[1])
    # In bfloat16, weights of neighbouring codes of int8 above 64 differ by little more than rounding does.
    unsure = 1 if fmt == daq.int8 and dtype == BF16 else 0
    np.testing.assert_allclose(values, codes, rtol=1e-6, atol=unsure)
    assert np.mean(np.abs(values - codes) < 0.5) > 0.9999
    back = np.asarray(own.dequantize())
    np.testing.assert_allclose(
        back.astype(np.float32), base.astype(np.float32), rtol=1e-6 if exact else 2**-7
    )
    if dtype == BF16:  # the very weights, whichever of the scales that give them was found
        assert np.mean(back == base) > (0.995 if unsure else 0.999)


@pytest.mark.parametrize(
    "name", slow_after(1, ["fp4_e2m1", "fp8_e4m3fn", "fp8_e5m2", "int8", "int4", "nf4", "fp4_bnb"])
)
@pytest.mark.parametrize(
    "tiling", [daq.Block(32, 40), daq.Group(32), daq.Channel(), daq.PerTensor()], ids=str
)
def test_without_a_change_a_stored_base_comes_back_bit_for_bit(name, tiling):
    fmt = daq.formats.FORMATS[name]
    weight = rng_for("stored").normal(0, 0.02, (70, 90)).astype(BF16)
    weight[:32, :40] = 0
    off = daq.Recipe(format=fmt, tiling=tiling, search=daq.Grid(0.83, 0.9, 2), metric=daq.neg_mse)
    stored = daq.quantize(weight, tune(weight), off)  # at a scale of its own
    q = daq.quantize(stored, stored.dequantize(), recipe_of(fmt, tiling))
    assert_same_bits((q.codes, q.scale), (stored.codes, stored.scale))


def test_a_stored_scale_is_kept_where_something_changed_and_weights_beyond_are_clipped():
    base, scale, _ = native_base(daq.fp4_e2m1, (32, 1), "floor", np.float32, (64, 8))
    stored = daq.QTensor(
        jnp.asarray(nearest(base / oracles.spread(scale, base.shape, (32, 1)), GRIDS["fp4_e2m1"])).astype(
            jnp.float4_e2m1fn
        ),
        jnp.asarray(scale),
        daq.fp4_e2m1,
        daq.Group(32),
        np.dtype(np.float32),
    )
    tuned = tune(base)
    tuned[np.abs(base) == np.abs(base).max(0)] *= np.float32(1.02)
    q = daq.quantize(stored, tuned, recipe_of(daq.fp4_e2m1, daq.Group(32)))
    np.testing.assert_array_equal(q.scale, scale)
    beyond = np.abs(tuned) > 6 * oracles.spread(scale, base.shape, (32, 1))
    assert beyond.any()
    assert (np.abs(np.asarray(q.codes).astype(np.float32))[beyond] == 6).all()


@pytest.mark.parametrize(("factor", "stays"), [(1.05, True), (40, False)])
def test_a_scale_grows_only_where_clipping_alone_costs_more_than_all_of_absmax(factor, stays):
    base, scale, _ = native_base(daq.fp4_e2m1, (32, 1), "ceil", BF16, (64, 8))
    base[[6, 40]] = 6 * scale  # so that no group is on the grid of half its scale
    tuned = tune(base).astype(np.float32)
    tuned[5] = np.float32(6 * factor) * scale[0]
    q = daq.quantize(
        base.astype(np.float32), tuned, recipe_of(daq.fp4_e2m1, daq.Group(32), scales=daq.PowerOfTwo())
    )
    kept, absmax = (
        np.asarray(q.scale)[0],
        oracles.power_of_two_above(np.abs(tuned[:32]).max(0) / np.float32(6)),
    )
    np.testing.assert_array_equal(kept, scale[0] if stays else absmax)
    np.testing.assert_array_equal(q.scale[1], scale[1])


def test_a_base_off_the_grid_gets_the_absmax_scale_of_the_tuned_weights():
    base = rng_for("off grid").normal(0, 0.02, (256, 256)).astype(BF16)
    tuned = tune(base)
    for fmt, tiling in (
        (daq.fp8_e4m3fn, daq.Block()),
        (daq.int4, daq.Group(32)),
        (daq.fp4_e2m1, daq.Group(16)),
    ):
        wanted = daq.quantize(base, tuned, daq.Recipe(format=fmt, tiling=tiling))
        q = daq.quantize(base, tuned, recipe_of(fmt, tiling))
        assert_same_bits((q.codes, q.scale), (wanted.codes, wanted.scale))


def test_tile_by_tile():
    """Tiles on the grid, off it, zero before tuning, zero before and after, and zero after tuning."""
    base = np.zeros((16, 80), np.float32)
    made, scale, _ = native_base(daq.fp8_e4m3fn, (16, 16), "ceil", np.float32, (16, 80))
    base[:, :16] = made[:, :16]
    base[:, 16:32] = rng_for("one off").normal(0, 0.02, (16, 16))
    base[:, 64:] = made[:, 64:]
    tuned = tune(base)
    tuned[:, 32:48] = tuned[:, 64:] = 0
    found = np.asarray(daq.quantize(base, tuned, recipe_of(daq.fp8_e4m3fn, daq.Block(16, 16))).scale)[0]
    absmax = oracles.absmax_scales(tuned, oracles.FORMATS["fp8_e4m3fn"], (16, 16))[0]
    np.testing.assert_array_equal(found[[1, 2, 3]], absmax[[1, 2, 3]])
    assert (found[0], found[2], found[4]) == (scale[0, 0], 1, scale[0, 4])


def test_only_scales_that_may_be_stored_are_kept():
    base, scale, _ = native_base(daq.int4, (32, 1), "bfloat16", BF16)
    q = daq.quantize(base, tune(base), recipe_of(daq.int4, daq.Group(32), scales=InDtype()))
    np.testing.assert_array_equal(q.scale, scale)
    floats, _, _ = native_base(daq.int4, (32, 1), "plain", BF16)
    q = daq.quantize(floats, tune(floats), recipe_of(daq.int4, daq.Group(32), scales=daq.PowerOfTwo()))
    assert (np.frexp(q.scale)[0] == 0.5).all()


def test_not_a_number_and_infinity_give_no_scale_to_their_tile_alone():
    base, scale, _ = native_base(daq.fp8_e4m3fn, (16, 16), "ceil", np.float32, (16, 64))
    tuned = tune(base)
    base[3, 3], tuned[5, 20] = np.nan, np.inf
    q = daq.quantize(base, tuned, recipe_of(daq.fp8_e4m3fn, daq.Block(16, 16)), check_finite=False)
    assert np.isnan(q.scale[0, :2]).all()
    np.testing.assert_array_equal(q.scale[0, 2:], scale[0, 2:])


def test_a_batch_of_matrices_and_a_sharded_matrix_get_the_scales_of_each():
    tiles = (32, 32)
    made = [native_base(daq.fp8_e4m3fn, tiles, kind, BF16, (96, 128)) for kind in ("plain", "ceil")]
    bases, recipe = np.stack([base for base, _, _ in made]), recipe_of(daq.fp8_e4m3fn, daq.Block(*tiles))
    alone = [daq.quantize(base, tune(base), recipe) for base in bases]
    tuned = np.stack([tune(base) for base in bases])
    q = daq.quantize(bases, tuned, recipe)
    mapped = jax.vmap(functools.partial(daq.quantize, recipe=recipe))(jnp.asarray(bases), jnp.asarray(tuned))
    for i, x in enumerate(alone):
        assert_same_bits((q.codes[i], q.scale[i]), (x.codes, x.scale))
        assert_same_bits((mapped.codes[i], mapped.scale[i]), (x.codes, x.scale))
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
    across = NamedSharding(mesh, PartitionSpec("x"))  # 48 rows each: tiles cross devices
    q = daq.quantize(*jax.device_put((bases[0], tuned[0]), across), recipe)
    assert_same_bits(jax.device_put((q.codes, q.scale), jax.devices()[0]), (alone[0].codes, alone[0].scale))


# --- Whether a tile is native


def tiles_of(base, fmt, tiling):
    view = TileView(base.shape, DEFAULT_MATRIX, tiling)
    cut = view.cut(jnp.asarray(base))
    return view, daq.Tiles(cut, cut, None, view.tile_axes, view.grid_axes, fmt, Machine())


@pytest.mark.parametrize("name", GRIDS)
def test_distances_in_steps_are_those_to_the_nearest_value(name):
    values, fmt = GRIDS[name], daq.formats.FORMATS[name]
    x = rng_for(f"steps {name}").uniform(-fmt.largest, fmt.largest, 4000).astype(np.float32)
    x = np.concatenate([x, x * np.float32(0.01), values.astype(np.float32)])
    low, high = floor(x, values), ceil(x, values)
    wanted = np.minimum(x - low, high - x) / np.where(high > low, high - low, 1)
    np.testing.assert_allclose(distance_in_steps(jnp.asarray(x), fmt), wanted, atol=1e-5)
    last = values[-1] - values[-2]
    beyond = distance_in_steps(jnp.float32(fmt.largest + last), fmt)
    np.testing.assert_allclose(beyond, 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_tile_is_native_if_its_weights_are_codes_times_the_scale(dtype):
    base, scale, _ = native_base(daq.fp4_e2m1, (32, 1), "ceil", dtype, (64, 40))
    base[:32, :20] = rng_for("foreign").normal(0, 0.02, (32, 20)).astype(dtype)
    base[32:, 3] = 0
    view, tiles = tiles_of(base, daq.fp4_e2m1, daq.Group(32))
    found = np.asarray(view.gather(is_native(tiles, view.spread(jnp.asarray(scale)))))
    wanted = np.ones((2, 40), bool)
    wanted[0, :20] = False
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("distance", "native"), [(0.09, True), (0.11, False)])
def test_the_bound_is_a_hundredth_of_a_squared_step_and_zeros_do_not_count(distance, native):
    rng = rng_for("bound")
    base = rng.integers(-60, 60, (16, 16)) + distance * rng.choice([-1, 1], (16, 16))
    base[4:] = 0  # a tile that was cut off and filled up
    view, tiles = tiles_of(base.astype(np.float32), daq.int8, daq.PerTensor())
    assert bool(is_native(tiles, view.spread(jnp.ones((1, 1)))).all()) == native
