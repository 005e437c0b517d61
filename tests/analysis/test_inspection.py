"""A sampled inspection against the whole, figure by figure, and its verdict at the edges of each claim."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import daq_jax as daq
from daq_jax.analysis.estimates import ESTIMATES, Estimate, Findings, findings_of
from daq_jax.analysis.figures import ON_GRID
from daq_jax.analysis.inspection import Inspection
from daq_jax.analysis.verdicts import KEPT, UNRELATED, verdict_of
from tests import oracles
from tests.cases import BF16, rng_for

E4M3 = oracles.FORMATS["fp8_e4m3fn"]
ABSMAX = daq.recipes.absmax  # held against itself it compiles one program
COMPARED = {
    "on_grid": "on_grid",
    "absmax_projection": "projection",
    "absmax_cosine": "cosine",
    "absmax_sign_rate": "sign_rate",
}


def on_grid_weight(name, shape, *, ratio=1.0, dtype=BF16):
    """Blocks of 128 x 128 codes times a scale of their own, rounded to `dtype`: a model shipped in FP8."""
    weight = rng_for(name).normal(0, 0.02, shape).astype(np.float32)
    scale = oracles.absmax_scales(weight, E4M3, (128, 128)) * np.float32(ratio)
    spread = oracles.spread(scale, shape, (128, 128))
    return (E4M3.round(weight / spread) * spread).astype(dtype)


def tune(name, base, size):
    """A change of `size` times the base's standard deviation, stronger in some columns than in others."""
    rng = rng_for(name)
    change = rng.normal(0, size * 0.02, base.shape) * rng.gamma(2, 0.5, base.shape[-1])
    return (base.astype(np.float32) + change.astype(np.float32)).astype(base.dtype)


def tree_pair(name, *, native, size, leaves=4):
    """A tree of two sizes of leaves, before and after."""
    shapes = [(640, 512), (384, 300)]
    before = {}
    for i in range(leaves):
        key, shape = f"{name}/{i}", shapes[i % 2]
        plain = rng_for(key).normal(0, 0.02, shape).astype(BF16)
        before[f"layers_{i}"] = on_grid_weight(key, shape) if native else plain
    return before, {path: tune(f"{name} {path}", w, size) for path, w in before.items()}


def test_everything_looked_at_gives_the_figures_of_compare_and_no_bounds():
    base, tuned = tree_pair("whole", native=True, size=0.01, leaves=1)
    found = daq.inspect(base, tuned, ABSMAX).total
    wanted = daq.compare(base, tuned, daq.quantize(base, tuned, ABSMAX)).total
    assert found.sampled == found.elements == 640 * 512
    for name, figure in COMPARED.items():
        estimate = getattr(found, name)
        np.testing.assert_allclose(estimate.value, getattr(wanted, figure), rtol=1e-5, err_msg=name)
        assert estimate.bound == 0
    b, t = (np.concatenate([x.astype(np.float64).ravel() for x in tree.values()]) for tree in (base, tuned))
    np.testing.assert_allclose(found.change.value, np.linalg.norm(t - b) / np.linalg.norm(b), rtol=1e-5)
    np.testing.assert_allclose(found.unmoved.value, np.mean(t == b), rtol=1e-5)


@pytest.mark.slow
def test_below_half_a_step_is_what_rounding_to_the_base_grid_takes_back():
    base = on_grid_weight("half", (128, 128), dtype=np.float32)
    tuned = tune("half", base, 0.05)
    tuned[np.abs(base) == np.abs(base).max()] = base[np.abs(base) == np.abs(base).max()]
    scale = oracles.absmax_scales(base, E4M3, (128, 128))[0, 0]
    values, _ = E4M3.grid()
    code = np.searchsorted(values, np.rint(base / scale * 1024) / 1024)  # codes are multiples of 1/512
    moved = tuned != base
    up = np.where(tuned > base, 1, -1)
    step = np.abs(values[np.clip(code + up, 0, len(values) - 1)] - values[code]) * scale
    wanted = np.mean((np.abs(tuned - base) < step / 2)[moved])
    assert 0.2 < wanted < 0.9
    found = daq.inspect({"w": base}, {"w": tuned}, ABSMAX).total.below_half_step.value
    np.testing.assert_allclose(found, wanted, atol=2e-3)  # the scale is rounded otherwise for some codes


@pytest.mark.parametrize(
    ("native", "size"), [(True, 0.003), (True, 0.03), (False, 0.01)], ids=["small", "large", "off grid"]
)
@pytest.mark.slow
def test_a_sample_holds_the_whole_within_its_bounds(native, size):
    base, tuned = tree_pair(f"bounds {native} {size}", native=native, size=size)
    found = daq.inspect(base, tuned, ABSMAX, most_elements=2**18).total
    wanted = daq.compare(base, tuned, daq.quantize(base, tuned, ABSMAX)).total
    assert found.sampled < found.elements
    for name, figure in COMPARED.items():
        estimate = getattr(found, name)
        assert abs(estimate.value - getattr(wanted, figure)) <= estimate.bound + 1e-6, name
    assert found.absmax_projection.bound < 0.1


@pytest.mark.slow
def test_every_run_looks_at_the_same_patches_and_says_so_in_json():
    base, tuned = tree_pair("same", native=True, size=0.01)
    first, second = (daq.inspect(base, tuned, ABSMAX, most_elements=2**17) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    plain = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert plain["verdict"] == first.verdict
    assert plain["total"]["change"]["value"] == first.total.change.value
    assert plain["total"]["on_stored_grid"]["value"] is None


@pytest.mark.slow
def test_sharded_and_quantized_bases_and_other_layouts_are_read_as_they_lie():
    base, tuned = tree_pair("sharded", native=True, size=0.01, leaves=1)
    wanted = daq.inspect(base, tuned, ABSMAX)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    lie = NamedSharding(mesh, PartitionSpec("x", "y"))
    assert daq.inspect(*jax.device_put((base, tuned), lie), ABSMAX).to_dict() == wanted.to_dict()
    turned = [{"layers_0": tree["layers_0"].T.copy()} for tree in (base, tuned)]
    rules = [daq.use("", matrix=((1,), (0,)))]
    found = daq.inspect(*turned, ABSMAX, rules=rules).total
    for name in COMPARED:  # of all patches, in another order
        np.testing.assert_allclose(getattr(found, name).value, getattr(wanted.total, name).value, rtol=1e-5)
    stored = daq.quantize(base, base, ABSMAX)
    found = daq.inspect(stored, jax.tree.map(jnp.asarray, tuned), ABSMAX)
    assert found.total.on_stored_grid.value == 1
    assert found.verdict.startswith("This base is stored in FP8.")


@pytest.mark.slow
def test_a_recipe_is_tried_on_the_patches_and_named():
    base, tuned = tree_pair("recipe", native=True, size=0.005, leaves=1)
    recipe = daq.Recipe(rounding=daq.UnbiasedGain())
    found = daq.inspect(base, tuned, recipe)
    wanted = daq.compare(base, tuned, daq.quantize(base, tuned, recipe)).total
    np.testing.assert_allclose(found.total.projection.value, wanted.projection, rtol=1e-4)
    assert found.recipe == "this recipe"
    assert "this recipe keeps 100% of it" in found.verdict
    assert daq.inspect(base, tuned, ABSMAX).recipe == "absmax"


def test_what_cannot_be_inspected_is_refused():
    base, tuned = tree_pair("refused", native=False, size=0.01, leaves=1)
    broken = {"layers_0": tuned["layers_0"].copy()}
    broken["layers_0"][3, 5] = np.nan
    with pytest.raises(ValueError, match=r"layers_0.*tuned holds NaN"):
        daq.inspect(base, broken, ABSMAX)
    with pytest.raises(ValueError, match="before"):
        jax.jit(lambda b, t: daq.inspect(b, t).verdict)(base, tuned)
    with pytest.raises(ValueError, match="nothing to inspect"):
        daq.inspect(base, tuned, rules=[daq.keep("")])
    with pytest.raises(ValueError, match="one shape"):
        daq.inspect(base, {"layers_0": tuned["layers_0"][:8]})


# --- the verdict at the edge of each claim ---


def verdict(base, tuned):
    return daq.inspect({"w": base}, {"w": tuned}, ABSMAX).verdict


@pytest.mark.slow
def test_equal_models_have_nothing_to_keep_and_one_changed_weight_is_a_change():
    base = on_grid_weight("equal", (256, 128))
    assert verdict(base, base) == "The two models do not differ: there is no change to keep."
    tuned = base.copy()
    tuned[7, 9] += BF16.type(0.01)
    assert "do not differ" not in verdict(base, tuned)
    patch = daq.inspect({"w": np.tile(base, (8, 1))}, {"w": np.tile(base, (8, 1))}, ABSMAX, most_elements=1)
    assert "in any of the 65,536 weights that were looked at" in patch.verdict


@pytest.mark.slow
def test_another_model_by_mistake_is_seen_and_a_strong_tune_is_not_taken_for_one():
    base = rng_for("model").normal(0, 0.02, (256, 128)).astype(BF16)
    other = rng_for("other model").normal(0, 0.02, (256, 128)).astype(BF16)
    said = verdict(base, other)
    assert said.startswith("These two models look unrelated: the change is 14")
    assert "% of the weights" in said
    small = (other.astype(np.float32) * 0.1).astype(BF16)  # unrelated and ten times smaller
    assert "unrelated" in verdict(base, small)
    strong = (base.astype(np.float32) + 0.6 * other.astype(np.float32)).astype(BF16)
    assert "unrelated" not in verdict(base, strong)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.0, 448 / 320], ids=["AbsMax scale", "another scale"])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_a_base_is_on_the_grid_of_any_scale_and_just_off_it_is_off(ratio, dtype):
    base = on_grid_weight("edge", (256, 256), ratio=ratio, dtype=dtype)
    tuned = tune("edge", base, 0.005)
    found = daq.inspect({"w": base}, {"w": tuned}, ABSMAX)
    assert found.verdict.startswith("This base is on an FP8 grid.")
    assert found.total.on_fitted_grid.value > 0.9
    ulp = np.spacing(base)
    off = (base + rng_for("off").choice([-1, 1], base.shape).astype(dtype) * ulp).astype(dtype)
    found = daq.inspect({"w": off}, {"w": tune("edge", off, 0.005)}, ABSMAX)
    assert found.verdict.startswith("This base is not on an FP8 grid.")


@pytest.mark.slow
def test_half_of_the_base_on_the_grid_is_the_line():
    on = on_grid_weight("line", (512, 128))
    off = rng_for("line").normal(0, 0.02, on.shape).astype(BF16)
    for blocks, word in ((3, "is on"), (1, "is not on")):
        mixed = np.where(np.arange(512)[:, None] < 128 * blocks, on, off)
        assert verdict(mixed, tune("line", mixed, 0.01)).startswith(f"This base {word} an FP8 grid.")


def findings(**values):
    """Findings of a base on the grid with a change that AbsMax erases, but for what is given."""
    usual = dict.fromkeys(ESTIMATES, Estimate(0.5, 0.0)) | {
        "change": Estimate(0.01, 0.0),
        "on_fitted_grid": Estimate(1.0, 0.0),
        "on_stored_grid": Estimate(float("nan"), 0.0),
        "absmax_projection": Estimate(0.3, 0.01),
        "projection": Estimate(1.0, 0.012),
    }
    return Findings(elements=100, sampled=10, patches=5, **usual | values)


def test_the_verdict_says_what_is_erased_and_what_the_recipe_keeps():
    said = verdict_of(findings(), "the default")
    assert said == (
        "This base is on an FP8 grid. AbsMax would erase about 70% of this fine-tune (69% to 71%); "
        "the default keeps 99 to 101% of it."
    )
    weak = findings(absmax_projection=Estimate(0.55, 0.02), projection=Estimate(0.4, 0.02))
    said = verdict_of(weak, "the default")
    assert "AbsMax would keep 53 to 57% of this fine-tune, the default 38 to 42%: it keeps less of a" in said
    assert verdict_of(findings(), "it", format_name="INT8").startswith("This base is on an INT8 grid.")
    said = verdict_of(findings(projection=Estimate(1.4, 0.02)), "the default")
    assert "the default would overshoot to 138 to 142% of it" in said


def test_nothing_is_called_erased_or_kept_that_the_bounds_leave_open():
    nearly = 1e-6
    for value, word in (
        (KEPT - 0.02 - nearly, "would erase"),
        (KEPT - 0.02 + nearly, "too small to say"),
        (KEPT + 0.02 - nearly, "too small to say"),
        (KEPT + 0.02 + nearly, "keeps the change"),
    ):
        assert word in verdict_of(findings(absmax_projection=Estimate(value, 0.02)), "the default"), value


def test_a_change_in_one_patch_of_many_is_no_ground_for_a_verdict():
    sums = one_sums(np.array([1.0, 0.0]))
    sums["absmax"] = sums["absmax"] | {"dd": np.array([1.0, 0.0])}
    found = findings_of([sums], [4000], 4000)
    assert np.isinf(found.absmax_projection.bound)
    said = verdict_of(dataclasses.replace(found, change=Estimate(0.01, 0.0)), "the default")
    assert said.endswith("too few of the weights looked at to say what is kept of it.")


@pytest.mark.parametrize(
    ("on_grid", "high", "only_noise"),
    [
        (0.07, 1.01, True),
        (ON_GRID, 1.01, True),
        (ON_GRID + 1e-6, 1.01, False),
        (0.07, 2 - KEPT - 1e-6, True),
        (0.07, 2 - KEPT + 1e-6, False),
    ],
)
def test_off_the_grid_less_noise_is_all_that_is_promised(on_grid, high, only_noise):
    found = findings(on_fitted_grid=Estimate(on_grid, 0.01), absmax_projection=Estimate(high - 0.01, 0.01))
    said = verdict_of(found, "paper_sign")
    rest = "the default only lowers the ordinary noise of rounding somewhat."
    assert said.endswith(f" of it; {rest if only_noise else 'paper_sign keeps 99 to 101% of it.'}")


def test_the_verdict_off_the_grid():
    found = findings(on_fitted_grid=Estimate(0.07, 0.01), absmax_projection=Estimate(1.0, 0.01))
    assert verdict_of(found, "the default") == (
        "This base is not on an FP8 grid. Plain AbsMax keeps the change, 99 to 101% of it; "
        "the default only lowers the ordinary noise of rounding somewhat."
    )


def test_unrelated_begins_where_it_says():
    for change, said in ((UNRELATED, True), (UNRELATED - 1e-6, False)):
        found = verdict_of(findings(change=Estimate(change, 0.0)), "the default")
        assert found.startswith("These two models look unrelated: the change is 90% of the weights.") == said


def test_bounds_shrink_with_the_sample_and_are_endless_for_one_patch():
    sums = one_sums(np.array([1.0, 1.2, 0.9, 1.1]))
    whole = findings_of([sums], [64], 64).projection.bound
    some = findings_of([sums], [4000], 4000).projection.bound
    one = findings_of([jax.tree.map(lambda x: x[:1], sums)], [4000], 4000).projection.bound
    assert (whole, np.isinf(one)) == (0, True)
    # The mean of four numbers of standard deviation 0.1291; Student's t of 0.99865 with 3 degrees is 9.219.
    np.testing.assert_allclose(some, 9.219 * 0.1291 / 2 * np.sqrt(1 - 64 / 4000), rtol=1e-3)


def test_a_recipe_for_whole_matrices_has_no_bound_where_patches_say_nothing_of_the_whole():
    sums = one_sums(np.array([1.0, 1.2, 0.9, 1.1]))
    sums["separable"] = sums["separable"] | {"dq": np.ones(4)}
    found = findings_of([sums], [64], 64, patchwise=True)
    assert (found.absmax_cosine.bound, found.absmax_projection.bound) == (0, 0)
    assert np.isnan([found.cosine.bound, found.sign_rate.bound]).all()
    np.testing.assert_allclose(found.projection.bound, 0.05, rtol=1e-6)  # of 1.05, 1 goes tile by tile
    said = str(Inspection("Said.", found, {}, "the default"))
    assert "of the patches alone" in said
    assert "of the patches alone" not in str(Inspection("Said.", findings_of([sums], [64], 64), {}, "absmax"))


def one_sums(dq):
    """Sums of patches that differ in `<d, q>` alone."""
    ones = np.ones_like(dq)
    parts = dict.fromkeys([f.name for f in dataclasses.fields(daq.Figures) if f.name != "elements"], ones)
    parts |= {"dq": dq, "counts": np.ones((len(dq), 4))}
    names = ("bb", "unmoved", "moved", "short", "fitted", "with_stored", "stored")
    return {
        "absmax": parts,
        "recipe": parts,
        "separable": parts,
        "elements": 16 * ones,
        **dict.fromkeys(names, ones),
    }


def test_an_inspection_prints_its_verdict_first_and_escapes_names_in_a_notebook():
    found = Inspection("Said.", findings(), {"<b>": findings()}, "the default")
    assert str(found).splitlines()[0] == found.verdict
    assert "give or take" in str(found)
    assert "sign rate misleads" in str(found)
    assert "&lt;b&gt;" in found._repr_html_()
    assert "<b>" not in found._repr_html_()
