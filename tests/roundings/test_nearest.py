"""The two plain roundings, and the neighbours that they choose between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import oracles, rounding_oracles
from tests.cases import DTYPES, assert_same_bits, native, pair, slow_after

NAMES = ["fp8_e4m3fn", "fp8_e5m2", "int8", "int4", "fp4_e2m1", "nf4", "fp4_bnb"]
EVERY_FORMAT = pytest.mark.parametrize("name", NAMES)
E4M3 = oracles.FORMATS["fp8_e4m3fn"]
WHOLE = (None, None)


def grid_of(name):
    """The format and all its values, float64, once those are known to be what the definition says."""
    fmt, wanted = getattr(daq, name), rounding_oracles.grids()[name]
    if name != "nf4":
        return fmt, wanted
    # Published to seven digits: the definition can check them, not replace them.
    levels = np.asarray(fmt.decode(jnp.arange(16, dtype=jnp.uint8)), np.float64)
    np.testing.assert_allclose(levels, wanted, atol=1e-6)
    return fmt, levels


def numbers(grid):
    """Float32: all values and midpoints with both neighbours, numbers in between, and some far beyond."""
    special = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    around = [np.nextafter(special, np.float32(way)) for way in (-np.inf, np.inf)]
    size = np.float32(np.max(np.abs(grid)))
    rng = np.random.default_rng(0)
    flat, octaves = rng.uniform(-1.1, 1.1, 4000) * size, size * np.exp2(rng.uniform(-25, 1, 4000))
    far = size * np.float32([1.001, 2, 1e6])
    x = np.concatenate([special, *around, flat, octaves, -octaves, far, -far]).astype(np.float32)
    return x[(x == 0) | (np.abs(x) >= oracles.SMALLEST_NORMAL)]  # hardware may flush what is smaller


# --- Neighbours ---------------------------------------------------------------------------------------------


@EVERY_FORMAT
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_floor_and_ceil_are_the_neighbours_in_the_table_of_all_values(name, run):
    fmt, grid = grid_of(name)
    x = numbers(grid)
    below, above = (np.asarray(run(f)(jnp.asarray(x))) for f in (fmt.floor, fmt.ceil))
    assert below.dtype == above.dtype == np.float32
    np.testing.assert_array_equal(below, rounding_oracles.floor(x.astype(np.float64), grid))
    np.testing.assert_array_equal(above, rounding_oracles.ceil(x.astype(np.float64), grid))


@EVERY_FORMAT
def test_every_value_is_its_own_floor_and_ceil(name):
    fmt, grid = grid_of(name)
    values = jnp.asarray(grid, jnp.float32)
    np.testing.assert_array_equal(fmt.floor(values), values)
    np.testing.assert_array_equal(fmt.ceil(values), values)


@EVERY_FORMAT
def test_the_nearest_value_is_the_floor_or_the_ceil_and_not_the_farther(name):
    fmt, grid = grid_of(name)
    x = numbers(grid)
    low, near, high = (np.asarray(f(jnp.asarray(x)), np.float64) for f in (fmt.floor, fmt.round, fmt.ceil))
    assert np.all((near == low) | (near == high))
    # A level is a float32 number, and so is the midpoint to which a number is compared.
    assert np.all(np.abs(near - x) <= np.minimum(np.abs(low - x), np.abs(high - x)) * (1 + 1e-5) + 1e-7)


@EVERY_FORMAT
def test_infinities_are_clipped_and_nan_stays(name):
    fmt, grid = grid_of(name)
    for f in (fmt.floor, fmt.ceil, fmt.round):
        low, high, nan = np.asarray(f(jnp.array([-jnp.inf, jnp.inf, jnp.nan], jnp.float32)))
        assert (low, high) == (np.float32(grid[0]), np.float32(grid[-1]))
        assert np.isnan(nan)


# --- Nearest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "int8"])
def test_nearest_is_the_code_nearest_to_the_tuned_weight_and_the_default(name):
    base, tuned = pair("nearest", (96, 80))
    number = oracles.FORMATS[name]
    recipe = daq.Recipe(format=getattr(daq, name), tiling=daq.PerTensor(), rounding=daq.Nearest())
    q = daq.quantize(base, tuned, recipe)
    scale = oracles.absmax_scales(tuned, number, WHOLE)
    np.testing.assert_array_equal(q.scale, scale)
    wanted = number.round(tuned.astype(np.float32) / scale)
    np.testing.assert_array_equal(number.decode(np.asarray(q.codes)), wanted)
    assert daq.Recipe().rounding == daq.Nearest()


# --- Stochastic ---------------------------------------------------------------------------------------------


def stochastic(base, tuned, seed=0, fmt=daq.fp8_e4m3fn, **settings):
    recipe = daq.Recipe(format=fmt, tiling=daq.PerTensor(), rounding=daq.Stochastic(seed), **settings)
    return daq.quantize(base, tuned, recipe)


def code_bytes(q):
    return np.asarray(q.codes).view(np.uint8)


@pytest.mark.parametrize("name", slow_after(1, ["fp8_e4m3fn", "fp8_e5m2", "int8"]))
def test_stochastic_takes_one_of_the_two_neighbours_each_as_often_as_it_is_near(name):
    base, tuned = pair("neighbours", (256, 256), DTYPES["f32"])
    number, grid = oracles.FORMATS[name], rounding_oracles.grids()[name]
    q = stochastic(base, tuned, fmt=getattr(daq, name))
    values = number.decode(np.asarray(q.codes))
    x = (tuned / np.asarray(q.scale)).astype(np.float64)
    low, high = rounding_oracles.floor(x, grid), rounding_oracles.ceil(x, grid)
    assert np.all((values == low) | (values == high))
    inside = high > low
    share = ((x - low) / np.where(inside, high - low, 1))[inside]
    up = (values == high)[inside]
    for tenth in range(10):
        here = (share >= tenth / 10) & (share < (tenth + 1) / 10)
        noise = np.sqrt(np.sum(share[here] * (1 - share[here])))
        assert abs(np.sum(up[here]) - np.sum(share[here])) <= 4.5 * noise + 1


@pytest.mark.parametrize("drawn", ["with NumPy", "with the very key of the noise"])
@pytest.mark.parametrize("seed", [0, 3])
def test_stochastic_errors_average_out(drawn, seed):
    if drawn == "with NumPy":
        base, tuned = native("average", (512, 256))
    else:  # a bare array has the path "", and this key is what a careless seed would be
        key = jax.random.key(0)
        base = np.asarray(jax.random.normal(key, (512, 256))) * np.float32(0.02)
        tuned = base + np.asarray(jax.random.uniform(key, (512, 256))) * np.float32(1e-3)
    kept = np.asarray(stochastic(base, tuned, seed).dequantize(jnp.float32), np.float64)
    error = kept - tuned
    d = tuned.astype(np.float64) - base
    assert abs(np.mean(error)) <= 4 * np.std(error) / np.sqrt(error.size)
    assert abs(np.sum(d * error)) <= 4 * np.sqrt(np.sum((d * error) ** 2))
    by_column = np.sum(d * error, 0) / np.sqrt(np.sum((d * error) ** 2, 0))
    assert 0.7 < np.std(by_column) < 1.3  # columns err apart from one another


def test_stochastic_draws_depend_on_seed_path_and_place_alone():
    base, tuned = pair("draws", (64, 96), DTYPES["f32"])
    first = code_bytes(stochastic(base, tuned, 1))
    np.testing.assert_array_equal(first, code_bytes(stochastic(base, tuned, 1)))
    assert np.mean(first != code_bytes(stochastic(base, tuned, 2))) > 0.1

    tree = {"a": base, "b": base}, {"a": tuned, "b": tuned}
    both = stochastic(*tree, 1)
    assert np.mean(code_bytes(both["a"]) != code_bytes(both["b"])) > 0.1
    alone = stochastic({"b": base}, {"b": tuned}, 1)
    np.testing.assert_array_equal(code_bytes(alone["b"]), code_bytes(both["b"]))
    other_base = stochastic(base * np.float32(0.5), tuned, 1)
    np.testing.assert_array_equal(code_bytes(other_base), first)


def test_stochastic_gives_two_equal_layers_of_a_stack_other_noise():
    base, tuned = pair("stack", (64, 96), DTYPES["f32"])
    q = stochastic(np.stack([base, base]), np.stack([tuned, tuned]))
    assert np.mean(code_bytes(q)[0] != code_bytes(q)[1]) > 0.1


def test_stochastic_leaves_values_of_the_grid_alone():
    base, _ = native("on grid", (64, 64))
    kept = stochastic(base, base).dequantize(jnp.float32)
    np.testing.assert_array_equal(kept, base)


def test_stochastic_is_the_same_under_jit():
    base, tuned = pair("jit", (64, 96))
    recipe = daq.Recipe(rounding=daq.Stochastic(5), tiling=daq.Block(32, 32))
    run = lambda b, t: daq.quantize(b, t, recipe)  # noqa: E731
    assert_same_bits(jax.jit(run)(jnp.asarray(base), jnp.asarray(tuned)), run(base, tuned))


@pytest.mark.parametrize("name", slow_after(1, NAMES))
@pytest.mark.parametrize("rounding", [daq.Nearest(), daq.Stochastic(0)], ids=["nearest", "stochastic"])
def test_an_all_zero_weight_stays_zero(name, rounding):
    zero = np.zeros((3, 5), np.float32)
    q = daq.quantize(zero, zero, daq.Recipe(format=getattr(daq, name), rounding=rounding))
    np.testing.assert_array_equal(q.dequantize(), zero)
