"""Density-aware quantization: the zero of a QTensor, the stages, the losses, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from benchmarks.density import baselines, released
from daq_jax.density.centring import align, mode
from daq_jax.density.grams import KernelInputs
from daq_jax.density.groups import AffineMap, Groups
from tests.cases import rng_for, slow_after

FORMATS = [daq.nf4, daq.fp4_e2m1, daq.fp4_bnb, daq.int4]
OFF = daq.DensityRecipe(centre=None, adjust=None, sweeps=0)


def weight_and_grams(name, shape=(300, 20), tokens=900):
    """A skewed float32 weight, and joint Gram matrices of correlated inputs that are off centre."""
    rng = rng_for(name)
    weight = (rng.standard_t(5, shape) * 0.02 + 0.01).astype(np.float32)
    mixing = np.eye(shape[0]) + rng.normal(0, 0.1, (shape[0], shape[0]))
    inputs = rng.normal(0.2, 1, (tokens, shape[0])) @ mixing
    gram = (inputs.T @ inputs / tokens).astype(np.float32)
    return weight, daq.Grams(
        {"kernel": jnp.asarray(gram)}, (KernelInputs("kernel", (0,), shape[0]),), joint=True
    )


def quantized(weight, grams=None, recipe=OFF, **options):
    return daq.quantize_density({"kernel": weight}, grams, recipe, **options)["kernel"]


def row_loss(weight, q, gram):
    """Float64 e' G e, summed over outputs."""
    error = np.float64(q.dequantize()) - np.float64(weight)
    return np.sum(error * (np.float64(gram) @ error))


def group_loss(weight, q, gram, n):
    """The same with no product between groups."""
    blocks = np.kron(np.eye(-(-len(gram) // n)), np.ones((n, n)))[: len(gram), : len(gram)]
    return row_loss(weight, q, np.float64(gram) * blocks)


@pytest.mark.parametrize("fmt", slow_after(1, FORMATS), ids=lambda f: f.name)
@pytest.mark.parametrize("group", slow_after(1, [32, None]))
def test_without_any_stage_it_is_absmax(fmt, group):
    weight, grams = weight_and_grams("off")
    q = quantized(weight, grams, dataclasses.replace(OFF, format=fmt, group=group))
    tiling = daq.Channel() if group is None else daq.Group(group)
    plain = daq.quantize(weight, weight, daq.Recipe(format=fmt, tiling=tiling))
    np.testing.assert_array_equal(q.scale, plain.scale)
    np.testing.assert_array_equal(q.dequantize(), plain.dequantize())
    assert (q.tiling, q.format, q.zero.shape) == (plain.tiling, fmt, q.scale.shape)
    assert not q.zero.any()


def test_a_weight_is_code_less_zero_times_scale_everywhere():
    weight, grams = weight_and_grams("zero", (70, 6))
    q = quantized(weight.astype(jnp.bfloat16), grams, daq.DensityRecipe(group=32, adjust=None, sweeps=1))
    levels = np.asarray(daq.nf4.levels, np.float32)[np.asarray(q.codes)]
    zero, scale = (np.repeat(np.asarray(x), 32, axis=0)[:70] for x in (q.zero, q.scale))
    wanted = ((levels - zero) * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(q.dequantize(), wanted)
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(q), wanted)
    assert len(jax.tree.leaves(q)) == 3
    assert q.nbytes == 70 * 6 + 2 * 4 * 3 * 6
    table = daq.compare(weight * 0, weight, {"": q} and q).total
    error = np.float64(np.float32(zero * 0) + (levels - zero) * scale) - weight
    np.testing.assert_allclose(table.mse, np.mean(error**2), rtol=1e-5)


@pytest.mark.slow
def test_the_base_of_a_comparison_may_have_a_zero():
    weight, grams = weight_and_grams("on grid", (64, 6))
    base = quantized(weight, grams, daq.DensityRecipe(group=32, adjust=None, sweeps=1))
    again = daq.quantize(
        base, base, daq.Recipe(format=daq.nf4, tiling=daq.Group(32), search=daq.WithBaseScale(daq.AbsMax()))
    )
    assert daq.compare(base, base, again).total.on_grid == 1


SMALL = daq.LeastSquares(coarse=2, fine=2, turns=1)


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "group"), [(daq.nf4, 32), (daq.fp4_e2m1, None)], ids=["nf4", "fp4"])
def test_each_stage_lowers_the_loss(fmt, group):
    weight, grams = weight_and_grams("stages", (96, 8))
    n, gram = group or 96, grams.products["kernel"]
    recipe = daq.DensityRecipe(format=fmt, group=group, damping=0.0, adjust=SMALL, sweeps=1)
    stages = [
        dataclasses.replace(recipe, adjust=None, sweeps=0),
        dataclasses.replace(recipe, sweeps=0),
        recipe,
    ]
    losses = [group_loss(weight, quantized(weight, grams, r), gram, n) for r in stages]
    assert losses[0] > losses[1] > losses[2]
    row = quantized(weight, grams, dataclasses.replace(recipe, loss="row"))
    assert row_loss(weight, row, gram) < losses[1]


@pytest.mark.slow
def test_the_centre_is_the_middle_of_the_quantiles_and_becomes_the_zero():
    weight = np.float32(rng_for("centre").gamma(3.0, 0.01, (2, 50, 6)))
    scale, zero = align(jnp.asarray(weight), jnp.ones((2, 50, 1), bool), daq.fp4_e2m1, "quantile", 0.9)
    low, high = np.quantile(np.float64(weight), [0.025, 0.975], axis=1)
    centre = (low + high) / 2
    reach = np.maximum(weight.max(1) - centre, centre - weight.min(1))
    np.testing.assert_allclose(scale, 0.9 * reach / 6, rtol=1e-5)
    np.testing.assert_allclose(zero, -centre / (0.9 * reach / 6), rtol=1e-4)
    padded = np.pad(weight, [(0, 0), (0, 14), (0, 0)])
    real = np.arange(64)[None, :, None] < np.full((2, 1, 1), 50)
    for got, wanted in zip(
        align(jnp.asarray(padded), jnp.asarray(real), daq.fp4_e2m1, "quantile", 0.9),
        (scale, zero),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_the_mode_of_a_group_is_where_its_density_is_greatest():
    weight = np.float32(rng_for("mode").gamma(2.0, 0.01, (1, 400, 3)))
    places = np.linspace(weight.min(1), weight.max(1), 64)
    width = 0.9 * weight.std(1) / 400**0.2
    density = np.exp(-0.5 * ((weight[0][None] - places) / width) ** 2).sum(1)
    wanted = np.take_along_axis(places[:, 0], density.argmax(0)[None], 0)
    np.testing.assert_allclose(mode(jnp.asarray(weight), jnp.ones((1, 400, 1), bool)), wanted, rtol=1e-4)


def small_groups(name):
    weight, grams = weight_and_grams(name, (48, 5))
    gram = np.asarray(grams.products["kernel"])
    grams = np.stack([gram[i : i + 16, i : i + 16] for i in (0, 16, 32)])
    return weight.reshape(3, 16, 5), grams


@pytest.mark.slow
def test_sign_steps_are_those_of_the_released_program():
    weight, grams = small_groups("released")
    levels = np.asarray(daq.fp4_bnb.levels)
    scale, zero = released.start(np.float64(weight), levels)
    groups = Groups(jnp.asarray(weight), jnp.ones((3, 16, 1), bool), jnp.asarray(grams), daq.fp4_bnb, True)
    start = AffineMap(*align(groups.weight, groups.real, daq.fp4_bnb, "none", 0.9))
    np.testing.assert_allclose(start.scale, scale, rtol=1e-5)
    assert not start.zero.any()
    wanted = released.adjust(np.float64(weight), np.float64(grams), levels, scale, zero, epochs=2, turns=30)
    affine = daq.SignSteps(epochs=2, turns=30)(groups, groups.loss, start)
    same = np.isclose(affine.scale, wanted[0], rtol=1e-4) & np.isclose(
        affine.zero, wanted[1], rtol=1e-3, atol=1e-4
    )
    assert same.mean() >= 0.8  # where two losses are all but equal, float32 and float64 may part
    assert np.all(groups.loss(groups.nearest(affine), affine) <= groups.loss(groups.nearest(start), start))


@pytest.mark.slow
def test_least_squares_find_lower_losses_than_the_released_program_in_a_tenth_of_the_evaluations():
    weight, grams = small_groups("least squares")
    levels = np.asarray(daq.fp4_bnb.levels)
    start = released.start(np.float64(weight), levels)
    *_, evaluations = found = released.adjust(np.float64(weight), np.float64(grams), levels, *start)
    groups = Groups(jnp.asarray(weight), jnp.ones((3, 16, 1), bool), jnp.asarray(grams), daq.fp4_bnb, True)
    first = AffineMap(*align(groups.weight, groups.real, daq.fp4_bnb, "quantile", 1.0))
    adjust = daq.LeastSquares()
    affine = jax.jit(lambda groups: adjust(groups, groups.loss, first))(groups)
    scale, zero = (jnp.asarray(x, jnp.float32) for x in found[:2])
    theirs = AffineMap(scale, zero)
    ours, theirs = (float(groups.loss(groups.nearest(x), x).sum()) for x in (affine, theirs))
    assert ours <= theirs
    assert 10 * adjust.evaluations <= evaluations


@pytest.mark.slow
def test_a_metric_of_the_change_can_be_the_loss():
    base, tuned = (np.float32(rng_for(x).normal(0, 0.02, (64, 6))) for x in ("before", "after"))
    tuned = base + np.float32(0.05) * tuned
    steps = daq.SignSteps(epochs=1, turns=20)
    recipe = dataclasses.replace(OFF, group=32, metric=daq.cosine, adjust=steps)
    q = quantized(tuned, None, recipe, base={"kernel": base})
    plain = quantized(tuned, None, dataclasses.replace(OFF, group=32))
    kept = [daq.compare(base, tuned, {"": x}[""]).total.cosine for x in (q, plain)]
    assert kept[0] > kept[1]
    with pytest.raises(ValueError, match="a metric of the change needs a base"):
        quantized(tuned, None, recipe)


def test_a_leaf_that_nothing_multiplies_is_kept_with_a_warning():
    def apply(params, x):
        return (x + params["prompt"][:4]) @ params["up"]

    rng = np.random.default_rng(0)
    params = {
        "prompt": rng.normal(size=(16, 64)).astype(np.float32),
        "up": rng.normal(size=(64, 48)).astype(np.float32),
    }
    grams = daq.calibrate_from(apply, params, [jnp.ones((4, 64))], 32, progress=False)
    recipe = daq.DensityRecipe(group=32)
    with pytest.warns(daq.UncalibratedWarning, match=r"^'prompt', 25\.0% of the weights"):
        q = daq.quantize_density(params, grams, recipe)
    assert q["prompt"] is params["prompt"]
    assert isinstance(q["up"], daq.QTensor)
    silenced = daq.quantize_density(params, grams, recipe, rules=[daq.keep("prompt"), *daq.DEFAULT_RULES])
    assert silenced["prompt"] is params["prompt"]


def test_what_cannot_be_quantized_is_named_before_any_work():
    weight, joint = weight_and_grams("refused", (64, 4))
    blocks = jnp.stack([joint.products["kernel"][i : i + 32, i : i + 32] for i in (0, 32)])
    grams = daq.Grams({"kernel": blocks}, joint.inputs, 32)
    both, of_32 = {"kernel": weight, "other": weight}, daq.DensityRecipe(group=32)
    with pytest.raises(ValueError, match=r"(?s)'other': there is no Gram matrix.*put keep"):
        daq.quantize_density(both, grams, of_32, rules=[daq.use("^other$")])
    with pytest.raises(
        ValueError, match=r"(?s)2 of the leaves.*'a': there is no Gram .*'b': there is no Gram"
    ):
        daq.quantize_density({"a": weight, "b": weight}, grams, of_32)
    with pytest.raises(
        ValueError, match=r"'kernel': its Gram matrices are of groups of 32 but the recipe has .* 16"
    ):
        quantized(weight, grams, daq.DensityRecipe(group=16))
    for given in (grams, None):
        with pytest.raises(ValueError, match=r"whole row needs .*calibrate\(\.\.\., joint=True\)"):
            quantized(weight, given, daq.DensityRecipe(group=32, loss="row"))
    weight[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"'kernel': .* NaN"):
        quantized(weight, grams, daq.DensityRecipe(group=32))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"coverage": 0.0}, "`coverage` must be"),
        ({"loss": "row", "sweeps": 0}, "needs at least one of `sweeps`"),
        ({"shift": False}, "`shift=False` needs `centre=None`"),
        ({"metric": daq.cosine}, "`metric` needs `sweeps=0`"),
        ({"group": 0}, "`group` must be above 0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        daq.DensityRecipe(**wrong)


@pytest.mark.slow
def test_constant_and_zero_groups_are_exact_and_finite():
    weight = np.zeros((64, 3), np.float32)
    weight[:, 1] = 0.3
    q = quantized(weight, None, daq.DensityRecipe(group=32, adjust=None, sweeps=1))
    np.testing.assert_allclose(q.dequantize(), weight, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_of_the_benchmark_is_elimination_one_input_at_a_time(symmetric):
    weight, grams = weight_and_grams("gptq", (24, 5))
    gram = np.float64(grams.products["kernel"])
    grid = baselines.Grid(daq.int4, 8, symmetric)
    got = baselines.gptq(jnp.asarray(weight), baselines.Inputs.of(grams.products["kernel"]), grid)
    inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(24))
    left, wanted = np.float64(weight), np.zeros((24, 5))
    for i in range(24):
        if i % 8 == 0:
            low, high = left[i : i + 8].min(0), left[i : i + 8].max(0)
            scale = np.abs(left[i : i + 8]).max(0) / 7 if symmetric else (high - low) / 14
            zero = 0 * scale if symmetric else 7 - high / scale
        wanted[i] = (np.clip(np.rint(left[i] / scale + zero), -7, 7) - zero) * scale
        left = left - np.outer(inverse[i], (left[i] - wanted[i]) / inverse[i, i])
        inverse = inverse - np.outer(inverse[i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_gradients_through_codes_are_zero():
    weight, grams = weight_and_grams("gradient", (64, 8))
    found = jax.grad(lambda w: jnp.sum(quantized(w, grams, daq.recipes.density).dequantize()))(weight)
    np.testing.assert_array_equal(found, 0 * weight)


def test_an_adjustment_of_ones_own_may_be_a_class_or_a_function():
    weight, grams = weight_and_grams("own", (64, 4))

    @dataclasses.dataclass(frozen=True)
    class Halved(daq.Adjustment):
        share: float = 0.5

        def __call__(self, groups, loss, start):
            return start._replace(scale=start.scale * self.share)

    def halved(groups, loss, start):
        return Halved()(groups, loss, start)

    plain = dataclasses.replace(OFF, group=32)
    wanted = quantized(weight, grams, plain)
    for own in (Halved(), halved):
        got = quantized(weight, grams, dataclasses.replace(plain, adjust=own))
        np.testing.assert_array_equal(got.scale, wanted.scale / 2)
        daq.DensityRecipe(metric=daq.cosine, sweeps=0, adjust=own)  # any loss will do

    class Picky(Halved):
        any_loss = False

    with pytest.raises(ValueError, match="an `adjust` for any loss"):
        daq.DensityRecipe(metric=daq.cosine, sweeps=0, adjust=Picky())
