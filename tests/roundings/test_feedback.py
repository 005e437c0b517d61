"""Error feedback: rows make up for the errors of rows before them where the change says that it matters."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import daq_jax as daq
from daq_jax.roundings import feedback as feedback_module
from daq_jax.roundings.row_blocks import RowBlocks
from tests import oracles
from tests import rounding_oracles as ro
from tests.cases import BF16, slow_after

E4M3 = oracles.FORMATS["fp8_e4m3fn"]
BLOCK = (128, 128)
DAMPING, LEAST_WEIGHT = 10.0, 0.03


WITH_OFF_GRID = daq.Recipe(search=daq.OffGrid(), rounding=daq.UnbiasedFeedback())


def feedback(rank=16, tiling=daq.recipes.absmax.tiling, **settings):
    own = {k: settings.pop(k) for k in ("per", "damping") if k in settings}
    return daq.Recipe(rounding=daq.UnbiasedFeedback(rank, **own), tiling=tiling, **settings)


def plain_pair(seed, shape, change=0.02, rank=8, batch=()):
    """A base on no grid, and a change of `rank` directions of falling size and a tenth as much of noise."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, (*batch, *shape)).astype(np.float32)
    u, v = (rng.normal(0, 1, (*batch, n, rank)) for n in shape)
    d = (u * np.linspace(2, 0.5, rank)) @ v.swapaxes(-1, -2) + 0.3 * rng.normal(0, 1, base.shape)
    return base, (base + d * change * 0.02 / np.std(d)).astype(np.float32)


def kept(q):
    return np.asarray(q.dequantize(jnp.float32), np.float64)


def directions_of(base, tuned, rank):
    """Leading left singular directions of the change; its squared size along them, and on average beside."""
    d = tuned.astype(np.float64) - base
    u, sizes, _ = np.linalg.svd(d, full_matrices=False)
    rest = np.sum(sizes[rank:] ** 2) / (d.shape[0] - rank)
    return u[:, :rank], sizes[:rank] ** 2, rest


def error_seen(base, tuned, q, rank=8):
    """Mean square of the error along the leading directions of the change, and of all of it."""
    u, _, _ = directions_of(base, tuned, rank)
    e = kept(q) - tuned
    return np.mean((u.T @ e) ** 2), np.mean(e**2)


def by_least_squares(base, tuned, scale, rank, block):
    """Values rounded block by block to the first rows of what would be best for all rows left.

    What is best comes from a least squares solver, on the error of every row left (weight 1) and the error
    along each direction (its own weight), given the errors made so far.
    """
    u, sizes, rest = directions_of(base, tuned, rank)
    cost = 1 / np.sqrt(DAMPING * rest / sizes + LEAST_WEIGHT)  # of a unit of error along a direction
    values, seen = np.zeros(base.shape), np.zeros((rank, base.shape[1]))
    for start in range(0, len(base), block):
        left, now = u[start:], slice(start, start + block)
        rows = np.vstack([np.eye(len(left)), cost[:, None] * left.T])
        wanted = np.vstack([np.zeros((len(left), base.shape[1])), -cost[:, None] * seen])
        best = np.linalg.lstsq(rows, wanted, rcond=None)[0][:block]
        target = (tuned[now] + best).astype(np.float32)
        values[now] = E4M3.round(target / scale[now].astype(np.float32))
        seen += u[now].T @ (values[now] * scale[now] - tuned[now])
    return values


def test_it_does_what_least_squares_over_the_rows_left_would_do():
    base, tuned = plain_pair(0, (256, 128))
    q = daq.quantize(base, tuned, feedback(rank=8))
    scale = oracles.spread(np.asarray(q.scale), base.shape, BLOCK)
    wanted = by_least_squares(base, tuned, scale, rank=8, block=8)
    values = E4M3.decode(np.asarray(q.codes))
    assert np.mean(values == wanted) > 0.9  # the randomized directions are not quite the singular ones
    u, sizes, rest = directions_of(base, tuned, 8)
    losses = [
        np.sum(e**2) + np.sum((u.T @ e) ** 2 / (DAMPING * rest / sizes + LEAST_WEIGHT)[:, None])
        for e in (v * scale - tuned for v in (values, wanted))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("native", [False, True])
def test_little_error_is_left_along_the_change_for_little_more_in_all(native):
    base, tuned = ro.native(1, (512, 256), 0.02, rank=8) if native else plain_pair(1, (512, 256))
    gain = dataclasses.replace(feedback(), rounding=daq.UnbiasedGain("row"))
    along, everywhere = error_seen(base, tuned, daq.quantize(base, tuned, feedback()))
    along_before, everywhere_before = error_seen(base, tuned, daq.quantize(base, tuned, gain))
    assert along < along_before / 8
    assert everywhere < 1.25 * everywhere_before


@pytest.mark.slow
def test_a_change_without_directions_is_left_to_the_gain():
    base, tuned = ro.native(2, (256, 256), 0.02)
    q = daq.quantize(base, tuned, feedback(64))
    gain = daq.quantize(base, tuned, daq.Recipe(rounding=daq.UnbiasedGain("row")))
    assert np.mean(kept(q) == kept(gain)) > 0.8
    assert np.mean((kept(q) - tuned) ** 2) < 1.05 * np.mean((kept(gain) - tuned) ** 2)


@pytest.mark.parametrize("rank", slow_after(1, [1, 4]))
def test_a_merged_adapter_of_few_directions_costs_little(rank):
    rng = np.random.default_rng(3)
    base = np.asarray(jnp.asarray(rng.normal(0, 0.02, (384, 256)), BF16), np.float32)
    d = rng.normal(0, 1, (384, rank)) @ rng.normal(0, 1, (rank, 256))
    tuned = (base + 4e-4 * d / np.std(d)).astype(np.float32)
    along, everywhere = error_seen(base, tuned, daq.quantize(base, tuned, feedback(64)), rank)
    before = error_seen(base, tuned, daq.quantize(base, tuned, daq.recipes.absmax), rank)
    assert along < before[0] / 10
    assert everywhere < 1.3 * before[1]


@pytest.mark.parametrize(
    ("change", "rank", "dtype"),
    slow_after(
        2,
        [
            (0.001, None, BF16),
            (0.01, 16, np.float32),
            *itertools.product((0.001, 0.003, 0.01, 0.03, 0.1), (None, 16), (np.float32, BF16)),
        ],
    ),
)
def test_with_off_grid_it_keeps_the_change_at_its_size(change, rank, dtype):
    pair = (x.astype(dtype) for x in ro.native(4, (512, 384), change, rank=rank))
    base, tuned = pair  # in bfloat16 a small change is a step of that for a few, and none for others
    q = daq.quantize(base, tuned, WITH_OFF_GRID)
    base, tuned = (x.astype(np.float32) for x in (base, tuned))
    assert 0.9 < ro.projection(base, tuned, kept(q)) < 1.1


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_small_change_of_a_base_on_another_grid_than_absmax_stays_on_that(dtype):
    rng = np.random.default_rng(6)
    power = np.exp2(rng.integers(-14, -11, (3, 2))).repeat(128, 0).repeat(128, 1)
    values = np.clip(rng.normal(0, 40, (384, 256)), -200, 200).astype(np.float32)
    base = (E4M3.round(values) * power).astype(np.float32)  # the AbsMax scale is up to twice as fine
    tuned = (base + 5e-3 * np.abs(base) * rng.normal(0, 1, base.shape)).astype(dtype)
    base = base.astype(dtype)
    whole = daq.QTensor(
        jnp.asarray(E4M3.round(values), jnp.float8_e4m3fn),
        jnp.asarray(power[::128, ::128], jnp.float32),
        daq.fp8_e4m3fn,
        daq.Block(128, 128),
        np.dtype(dtype),
    )
    q, plain = (
        daq.quantize(b, jnp.asarray(tuned), WITH_OFF_GRID, rules=()) for b in (whole, jnp.asarray(base))
    )
    base, tuned = (x.astype(np.float32) for x in (base, tuned))
    change = np.mean((tuned - base) ** 2)
    assert 0.8 < ro.projection(base, tuned, kept(q)) < 1.2  # within its noise: few, tiny changes
    np.testing.assert_array_equal(q.scale, whole.scale)
    times = 3 if dtype == np.float32 else 1.5  # a dither costs more error than a gain
    assert np.mean((kept(q) - tuned) ** 2) < np.mean((kept(plain) - tuned) ** 2) / times
    assert np.mean((kept(q) - tuned) ** 2) < 30 * change


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("rank", [None, 16])
def test_changes_of_one_step_of_bfloat16_are_kept_as_larger_ones_are(rank, dtype):
    base, tuned = ro.native(7, (512, 640), 0.003, rank=rank)
    base, tuned = base.astype(dtype), tuned.astype(BF16).astype(dtype)
    recipes = WITH_OFF_GRID, daq.Recipe(rounding=daq.UnbiasedGain())
    q, by_gain = (daq.quantize(base, tuned, recipe) for recipe in recipes)
    base, tuned = (x.astype(np.float64) for x in (base, tuned))
    step = np.spacing(tuned.astype(BF16)).astype(np.float64)
    d = tuned - base

    def share(q, steps):
        which = np.round(np.abs(d / step)) == steps
        assert which.sum() > 2000
        return np.sum(d[which] * (kept(q) - base)[which]) / np.sum(d[which] ** 2)

    assert all(0.9 < share(q, steps) < 1.1 for steps in (1, 2))
    assert share(by_gain, 1) < 0.7


@pytest.mark.parametrize("share", [0.001, 0.01])
def test_a_dither_leaves_alone_what_tuning_left_alone(share):
    base = ro.native(8, (512, 512), 0.02)[0].astype(BF16)
    rng = np.random.default_rng(8)
    step = np.spacing(base).astype(np.float32) * rng.choice([-2, 2], base.shape)
    tuned = (base.astype(np.float32) + step * (rng.random(base.shape) < share)).astype(BF16)
    q, plain = (daq.quantize(base, tuned, r) for r in (WITH_OFF_GRID, daq.recipes.absmax))
    base, tuned = (x.astype(np.float64) for x in (base, tuned))
    error, d = kept(q) - tuned, tuned - base
    assert np.mean(error**2) < 3 * np.mean((kept(plain) - tuned) ** 2)
    noise = np.sqrt(np.sum((d * error) ** 2)) / np.sum(d * d)
    assert abs(ro.projection(base, tuned, kept(q)) - 1) < 3 * noise


def test_the_default_is_the_same_where_jax_has_64_bits():
    base, tuned = ro.native(9, (256, 256), 0.01)
    q = daq.quantize(base, tuned)
    with jax.enable_x64(True):
        wide = daq.quantize(base, tuned)
    np.testing.assert_array_equal(np.asarray(wide.codes), np.asarray(q.codes))


def test_what_did_not_change_keeps_its_codes():
    base, tuned = ro.native(5, (256, 256), 0.02, rank=4)
    tuned[:128, 128:] = base[:128, 128:]
    q = daq.quantize(base, tuned, feedback())
    assert np.array_equal(kept(q)[:128, 128:], base[:128, 128:])
    same = daq.quantize(base, base, feedback())
    assert np.array_equal(
        np.asarray(same.codes), np.asarray(daq.quantize(base, base, daq.recipes.absmax).codes)
    )


@pytest.mark.parametrize(
    ("tiling", "shape"),
    slow_after(
        1,
        [
            (daq.Group(32), (200, 72)),
            (daq.Channel(), (200, 72)),
            (daq.PerTensor(), (131, 64)),
            (daq.Block(48, 80), (300, 200)),
        ],
    ),
)
@pytest.mark.parametrize("scales", [daq.AnyScale(), pytest.param(daq.PowerOfTwo(), marks=pytest.mark.slow)])
def test_every_tiling_and_scale(tiling, shape, scales):
    base, tuned = plain_pair(6, shape)
    recipe = feedback(8, tiling, scales=scales)
    q = daq.quantize(base, tuned, recipe)
    plain = daq.quantize(base, tuned, dataclasses.replace(recipe, rounding=daq.Nearest()))
    assert np.array_equal(np.asarray(q.scale), np.asarray(plain.scale))
    assert error_seen(base, tuned, q)[0] < error_seen(base, tuned, plain)[0] / 3


@pytest.mark.slow
def test_a_stack_is_rounded_matrix_by_matrix_in_any_layout():
    base, tuned = plain_pair(7, (256, 128), batch=(3,))
    stack = daq.quantize(base, tuned, feedback())
    for i in range(3):
        alone = daq.quantize(base[i], tuned[i], feedback())
        assert np.mean(kept(alone) == kept(stack)[i]) > 0.99
    turned = daq.quantize(
        {"w": base[0].T}, {"w": tuned[0].T}, feedback(), rules=[daq.use("w", matrix=((1,), (0,)))]
    )["w"]
    assert np.mean(kept(stack)[0] == kept(turned).T) > 0.99


@pytest.mark.slow
def test_products_in_bfloat16_do(monkeypatch):
    base, tuned = plain_pair(8, (512, 128))
    fine = daq.quantize(base, tuned, feedback(15))

    def short(function):
        def wrapped(*args):
            return jax.tree.map(lambda x: x.astype(BF16).astype(jnp.float32), function(*args))

        return wrapped

    places = ((feedback_module, "leading_directions"), (RowBlocks, "responses"))
    for owner, name in places:  # on a CPU, no option makes products inexact
        monkeypatch.setattr(owner, name, short(getattr(owner, name)))
    coarse = daq.quantize(base, tuned, feedback(15, damping=10.001))  # compiled anew
    assert not np.array_equal(kept(coarse), kept(fine))
    for a, b in zip(error_seen(base, tuned, coarse), error_seen(base, tuned, fine), strict=True):
        assert a < 1.1 * b


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(None, "y"), P("x", None), P("x", "y")])
def test_sharded_weights_keep_as_much(axis_type, spec):
    base, tuned = plain_pair(9, (512, 512))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (base, tuned)]
    q, alone = daq.quantize(*placed, feedback()), daq.quantize(base, tuned, feedback())
    assert q.codes.sharding.is_equivalent_to(placed[0].sharding, 2)
    assert ro.projection(base, tuned, kept(q)) == pytest.approx(
        ro.projection(base, tuned, kept(alone)), abs=1e-3
    )
    assert np.mean((kept(q) - tuned) ** 2) == pytest.approx(np.mean((kept(alone) - tuned) ** 2), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "`rank` must be a whole number above 0; got 0"),
        ({"damping": 0.0}, "`damping` must be a number above 0; got 0.0"),
        ({"damping": float("inf")}, "`damping` must be a number above 0; got inf"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        daq.UnbiasedFeedback(**settings)


@pytest.mark.parametrize("shape", slow_after(1, [((2, 40),), ((1, 1),), ((32, 8),)]))
def test_matrices_of_few_rows_are_rounded_too(shape):
    base = jax.random.normal(jax.random.key(0), shape)
    q = daq.quantize(base, base * 1.01, daq.Recipe(rounding=daq.UnbiasedFeedback()), rules=[daq.use("")])
    assert jnp.isfinite(q.dequantize()).all()
