"""Every figure of a comparison against its definition in float64, per leaf and pooled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.analysis import comparison
from tests import oracles
from tests.cases import FORMATS, LAYERS, TILINGS, Stored, native, pair

FIGURES = [
    "elements",
    "sign_rate",
    "flipped",
    "lost",
    "unchanged",
    "cosine",
    "projection",
    "norm_ratio",
    "mse",
    "snr_db",
    "counts",
    "on_grid",
]
E4M3 = oracles.FORMATS["fp8_e4m3fn"]


def leaf_of(name, i):
    """One leaf of the compared tree: its pair, recipe, matrix, and what the oracle needs to know of them."""
    shape, matrix = LAYERS[name]
    base, tuned = native(name, shape, 0.01) if i == 0 else pair(name, shape, change=0.01 * 3**i)
    (fmt, number), (tiling, tile) = (
        FORMATS[i % len(FORMATS)],
        TILINGS[(i + 2) % 4],
    )  # the first with one scale
    search = daq.AbsMax() if i == 0 else daq.CoarseToFine(0.8, 1.5, 5, 10)
    recipe = daq.Recipe(format=fmt, tiling=tiling, search=search)
    return base, tuned, daq.use(f"^{name}$", recipe, matrix=matrix), (number, tile, matrix)


NAMES = ["odd", "qwen3_moe experts", "linen DenseGeneral query", "maxtext scanned query"]


@pytest.fixture(scope="module")
def compared():
    """Base, tuned and quantized trees, and the oracle's figures by path, with the total under `total`."""
    found = {name: leaf_of(name, i) for i, name in enumerate(NAMES)}
    base, tuned = ({name: leaf[i] for name, leaf in found.items()} for i in (0, 1))
    base["kept"], tuned["kept"] = pair("kept", (8, 8))
    rules = [*(leaf[2] for leaf in found.values()), daq.keep("^kept$")]
    q = daq.quantize(base, tuned, daq.Recipe(), rules=rules)
    wanted, pool = {}, []
    for name, (b, t, _, (number, tile, matrix)) in found.items():
        stored = Stored.of(q[name])
        kept = oracles.dequantized(stored.codes, stored.scale, number, tile, matrix)
        b32, t32 = (oracles.matrix_view(x, matrix).astype(np.float32) for x in (b, t))
        grid = oracles.on_grid(b, number, tile, matrix=matrix)
        pool.append([x.ravel() for x in (b32, t32, kept, grid)])
        wanted[name] = oracles.figures(*pool[-1])
    wanted["total"] = oracles.figures(*(np.concatenate(x) for x in zip(*pool, strict=True)))
    return base, tuned, q, wanted


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_figures_agree_with_float64(compared, jit):
    base, tuned, q, wanted = compared
    table = (jax.jit(daq.compare) if jit else daq.compare)(base, tuned, q)
    assert set(table.leaves) == set(NAMES)  # the kept leaf is not in it
    for name in [*NAMES, "total"]:
        row = table.total if name == "total" else table.leaves[name]
        for figure in FIGURES:
            got, want = np.asarray(getattr(row, figure)), wanted[name][figure]
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f"{name} {figure}")
        np.testing.assert_allclose(row.sign_rate + row.flipped + row.lost, 1.0, rtol=1e-6)
        np.testing.assert_array_equal(row.counts, wanted[name]["counts"])
        assert int(row.elements) == wanted[name]["elements"]


def test_the_cases_are_not_trivial(compared):
    wanted = compared[-1]["total"]
    assert min(wanted["sign_rate"], wanted["flipped"], wanted["lost"], wanted["unchanged"]) > 0.01
    assert wanted["counts"].min() > 0
    assert 0.1 < wanted["on_grid"] < 0.9


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_no_change_gives_nan_where_a_figure_has_no_meaning(jit):
    base, _ = pair("no change", (16, 16))
    q = daq.quantize(base, base, daq.Recipe(search=daq.AbsMax()))
    row = (jax.jit(daq.compare) if jit else daq.compare)(base, base, q).total
    for figure in ("sign_rate", "flipped", "lost", "cosine", "projection", "norm_ratio", "snr_db"):
        assert np.isnan(getattr(row, figure)), figure
    assert np.isfinite(row.mse)
    assert int(row.elements) == 256
    np.testing.assert_array_equal(row.counts, [256, 0, 0, 0])


def test_an_erased_change_has_projection_zero_and_no_nan():
    base, tuned = native("erased", (16, 16), change=0.001)
    q = daq.quantize(base, tuned, daq.Recipe(tiling=daq.PerTensor(), search=daq.AbsMax()))
    row = daq.compare(base, tuned, q).total
    assert float(row.unchanged) > 0.99
    np.testing.assert_allclose([row.projection, row.norm_ratio], 0.0, atol=1e-4)
    assert float(row.lost) > 0.99
    assert float(row.flipped) == 0.0


def test_a_base_on_the_grid_of_its_stored_scale_is_seen():
    weight, tuned = pair("stored grid", (64, 48))
    recipe = daq.Recipe(tiling=daq.Block(16, 16), search=daq.Grid(1.0, 1.4, 9), metric=daq.SignRate())
    qbase = daq.quantize(tuned, weight, recipe)
    q = daq.quantize(qbase, tuned, recipe)
    assert float(daq.compare(qbase, tuned, q).total.on_grid) == 1.0
    plain = np.asarray(qbase.dequantize())
    table = daq.compare(plain, tuned, q)
    wanted = oracles.on_grid(plain, E4M3, (16, 16)).mean()
    np.testing.assert_allclose(table.total.on_grid, wanted, rtol=1e-5)


def test_totals_are_pooled_not_averaged():
    small, large = pair("small", (8, 8), change=1.0), pair("large", (64, 64), change=0.001)
    base, tuned = ({"small": small[i], "large": large[i]} for i in (0, 1))
    q = daq.quantize(base, tuned, daq.Recipe(search=daq.AbsMax()))
    table = daq.compare(base, tuned, q)
    flat = [
        np.concatenate([tree[k].astype(np.float32).ravel() for k in ("large", "small")])
        for tree in (base, tuned)
    ]
    stored = {k: Stored.of(q[k]) for k in q}
    kept = [
        oracles.dequantized(s.codes, s.scale, E4M3, (128, 128)).ravel() for _, s in sorted(stored.items())
    ]
    wanted = oracles.figures(*flat, np.concatenate(kept), np.zeros(1))
    np.testing.assert_allclose(table.total.cosine, wanted["cosine"], rtol=1e-5)
    np.testing.assert_allclose(table.total.snr_db, wanted["snr_db"], rtol=1e-5)
    assert int(table.total.elements) == 64 * 65


def test_trees_that_do_not_fit_are_refused():
    base, tuned = (jnp.asarray(x) for x in pair("refused", (8, 8)))
    q = daq.quantize({"w": base, "other": base}, {"w": tuned, "other": tuned}, daq.Recipe())
    with pytest.raises(ValueError, match="other"):
        daq.compare({"w": base}, {"w": tuned}, q)
    with pytest.raises(ValueError, match="other"):
        daq.compare({"w": base, "other": base[:4]}, {"w": tuned, "other": tuned}, q)


# --- as people see it ---


@pytest.mark.parametrize("by", ["projection", "mse", "cosine"])
def test_the_worst_leaves_come_first_by_any_figure(compared, by):
    base, tuned, q, wanted = compared
    table = daq.compare(base, tuned, q)
    figures = {name: wanted[name] for name in NAMES}
    assert np.isnan(figures["odd"]["cosine"])  # erased altogether: nothing is worse
    bad = {
        "projection": lambda name: abs(figures[name]["projection"] - 1),
        "mse": lambda name: figures[name]["mse"],
        "cosine": lambda name: -np.nan_to_num(figures[name]["cosine"], nan=-np.inf),
    }
    ranked = sorted(NAMES, key=bad[by], reverse=True)
    assert list(table.worst(by=by)) == ranked
    assert list(table.worst(2, by=by)) == ranked[:2]
    with pytest.raises(ValueError, match="there is no figure 'cosinus'"):
        table.worst(by="cosinus")


def test_leaves_without_the_figure_come_last():
    base, tuned = native("last", (64, 48))
    trees = [{"a": base, "b": base}, {"a": base, "b": tuned}]
    table = daq.compare(*trees, daq.quantize(*trees, daq.Recipe(tiling=daq.PerTensor())))
    assert list(table.worst()) == ["b", "a"]


def test_a_comparison_prints_figures_not_sums_and_escapes_names_in_a_notebook(compared):
    base, tuned, q, _ = compared
    table = daq.compare(base, tuned, q)
    lines = str(table).splitlines()
    assert lines[0].startswith(f"The change is kept, at {table.total.projection:.0%} of its size (least in ")
    assert lines[1].split()[:3] == ["leaf", "projection", "cosine"]
    assert lines[3].startswith("total")
    assert f"{table.total.projection:.3f}" in lines[3]
    assert f"cosine={table.total.cosine:.4g}" in str(table.total)
    html = daq.Comparison({"<b>": table.total}, table.total)._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    many = daq.Comparison({str(i): table.total for i in range(12)}, table.total)
    assert "2 more leaves" in str(many)


def test_a_traced_comparison_can_be_printed_too(compared):
    said = []

    def look(*trees):
        table = daq.compare(*trees)
        said.extend([str(table), str(table.total), table._repr_html_()])
        return table

    assert "projection" in str(jax.jit(look)(*compared[:3]))
    assert said == ["Comparison of 4 leaves, traced", "Figures(traced)", "Comparison of 4 leaves, traced"]


def test_the_sign_rate_comes_with_a_warning_where_the_base_is_on_the_grid():
    base, tuned = native("warned", (64, 48))
    trees = {"w": base}, {"w": tuned}
    recipe = daq.Recipe(tiling=daq.PerTensor())
    assert "sign rate misleads" in str(daq.compare(*trees, daq.quantize(*trees, recipe)))
    off = {"w": tuned * np.float32(1.001)}
    assert "sign rate misleads" not in str(
        daq.compare({"w": tuned}, off, daq.quantize({"w": tuned}, off, recipe))
    )


def test_a_weight_that_is_not_a_number_keeps_no_sign():
    base, tuned = pair("lost", (64, 48), change=0.01)
    q = daq.quantize(base, tuned, daq.recipes.absmax)
    figures = daq.compare(base, tuned, dataclasses.replace(q, scale=q.scale * np.nan)).total
    assert figures.sign_rate == 0


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 1), (0, 1, 0)])
def test_trees_in_the_wrong_order_are_refused(order):
    weight = jnp.ones((8, 8))
    trees = {"k": weight}, {"k": 1.5 * weight}, daq.quantize({"k": weight}, {"k": 1.5 * weight})
    with pytest.raises(daq.DaqError, match=r"compare\(base, tuned, quantized\), in this order"):
        daq.compare(*(trees[i] for i in order))


@pytest.mark.parametrize("power", [-80, 70, 115])
def test_changes_whose_squares_leave_float32_have_the_figures_of_ordinary_ones(power):
    """Powers of two are exact: the same weights in another unit have the same ratios, bit for bit."""
    base, tuned = pair("far", (32, 32), np.float32)
    row, far = (
        daq.compare(b, t, daq.quantize(b, t, daq.recipes.absmax)).total
        for b, t in ((base, tuned), (np.ldexp(base, power), np.ldexp(tuned, power)))
    )
    for figure in ("cosine", "projection", "norm_ratio", "snr_db", "unchanged"):
        assert getattr(far, figure) == getattr(row, figure), figure
    assert far.mse == np.ldexp(np.float64(row.mse), 2 * power)


def test_a_leaf_that_tuning_left_alone_is_not_summed_twice(monkeypatch):
    base, _ = pair("still", (32, 32), np.float32)
    q = daq.quantize(base, base, daq.recipes.absmax)
    monkeypatch.delattr(comparison, "_squares_in_units")
    assert daq.compare(base, base, q).total.dd == 0


def test_leaves_whose_numbers_cannot_be_taken_are_named():
    base, tuned = pair("unreadable", (16, 16), np.float32)
    q = daq.quantize({"w": base}, {"w": tuned})
    for wrong, words in (
        (np.ma.masked_array(base, base > 0), "masked array"),
        (base.astype(">f4"), "byte order"),
        (jax.ShapeDtypeStruct(base.shape, base.dtype), "a shape without numbers"),
    ):
        with pytest.raises(daq.DaqError, match=f"'w' is in base .*{words}"):
            daq.compare({"w": wrong}, {"w": tuned}, q)
