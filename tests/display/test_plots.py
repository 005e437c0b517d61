"""Pictures: that they are drawn from the right numbers, named with units, and readable without colour."""

import matplotlib as mpl
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.analysis.histograms import CHANGE_EDGES, RATIO_EDGES, SIZE_EDGES, details_of
from daq_jax.display import plots
from daq_jax.display.plots import place_of
from tests.cases import native, pair

RECIPE = daq.Recipe(tiling=daq.Block(16, 16), search=daq.Grid(0.8, 1.25, 2))


@pytest.fixture(scope="module")
def compared():
    pairs = {
        "model.layers.0.mlp.up": native("up 0", (64, 48), 0.01),
        "model.layers.1.mlp.up": native("up 1", (64, 48), 0.05),
        "model.layers.1.attn.q": pair("q 1", (64, 48), np.dtype(np.float32)),
    }
    base, tuned = ({path: x[i] for path, x in pairs.items()} for i in (0, 1))
    q = daq.quantize(base, tuned, RECIPE)
    return base, tuned, q, daq.compare(base, tuned, q, details=True)


def test_details_count_what_is_there(compared):
    base, tuned, q, table = compared
    for path, found in table.details.items():
        b, t = (x[path].astype(np.float32) for x in (base, tuned))
        d, kept = t - b, np.asarray(q[path].dequantize(np.float32)) - b
        unit = np.sqrt(np.mean(d.astype(np.float64) ** 2))
        assert found.looked_at == found.density.sum() == d.size
        right = np.clip(d / unit, -4, 4) > 0.5
        np.testing.assert_allclose(found.density[CHANGE_EDGES[:-1] >= 0.5].sum(), right.sum(), atol=1)
        large = (np.abs(d) >= SIZE_EDGES[20]) & (np.abs(d) < SIZE_EDGES[21])
        assert found.moved[20] == large.sum()
        assert found.same_sign[20] == np.sum(np.sign(d[large]) == np.sign(kept[large]))
        assert found.ratios.sum() == 12
        tiles = t.reshape(4, 16, 3, 16)
        absmax = (np.abs(tiles).max((1, 3)) / np.float32(448)).astype(np.float32)
        wanted = np.histogram(np.asarray(q[path].scale) / absmax, RATIO_EDGES)[0]
        np.testing.assert_array_equal(found.ratios, wanted)
        assert set(np.flatnonzero(found.ratios)) <= {40, 48, 56}  # 0.8, 1 and 1.25, each in a bin of its own


def test_a_leaf_without_change_has_details_too():
    base, _ = native("still", (64, 48))
    q = daq.quantize({"w": base}, {"w": base}, RECIPE)["w"]
    found = details_of(base, base, q)
    assert (found.moved.sum(), found.same_sign.sum(), found.density.sum()) == (0, 0, 64 * 48)
    table = daq.compare({"w": base}, {"w": base}, {"w": q}, details=True)
    for draw in (plots.density, plots.sign_rate_by_size, plots.scale_ratios, plots.projection_by_layer):
        draw(table).canvas.draw()


@pytest.mark.parametrize("draw", [plots.density, plots.sign_rate_by_size, plots.scale_ratios])
def test_pictures_have_units_and_know_one_leaf_from_all(compared, draw):
    table = compared[-1]
    for path in (None, "model.layers.1.mlp.up"):
        picture = draw(table, path)
        picture.canvas.draw()
        axes = picture.axes[0]
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    with pytest.raises(ValueError, match="no leaf 'other'"):
        draw(table, "other")
    with pytest.raises(ValueError, match="details=True"):
        draw(daq.compare(*compared[:3]))


def test_the_sign_rate_drawn_is_that_of_the_counts(compared):
    table = compared[-1]
    line = plots.sign_rate_by_size(table).axes[0].lines[0]
    moved, same = (sum(getattr(x, name) for x in table.details.values()) for name in ("moved", "same_sign"))
    enough = moved >= 20
    np.testing.assert_allclose(line.get_ydata(), 100 * same[enough] / moved[enough])


def test_the_heat_map_has_a_row_a_kind_and_a_column_a_layer(compared):
    table = compared[-1]
    axes = plots.projection_by_layer(table).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "model.layers.*.attn.q",
        "model.layers.*.mlp.up",
    ]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1"]
    grid = axes.images[0].get_array()
    assert grid.mask.tolist() == [[True, False], [False, False]]
    np.testing.assert_allclose(grid[1, 0], table.leaves["model.layers.0.mlp.up"].projection)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("model.layers.*.mlp.up_proj", 12)),
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("model.layers.*.mlp.experts.*.up_proj", 3)),
        ("params/layers_2/attention/kernel", ("params/layers_*/attention", 2)),
        ("wi_0/kernel", ("wi_*", 0)),
        ("lm_head.weight", ("lm_head", -1)),
        ("conv2d/kernel", ("conv2d", -1)),
    ],
)
def test_a_path_names_a_kind_and_a_layer(path, place):
    assert place_of(path) == place


def test_recipes_stand_side_by_side_with_their_totals(compared):
    table = compared[-1]
    picture = plots.recipes_side_by_side({"one": table, "two": table})
    axes = picture.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["one", "two"]
    np.testing.assert_allclose(axes.collections[1].get_offsets()[0], [table.total.projection, 0])
    with pytest.raises(ValueError, match="no comparison"):
        plots.recipes_side_by_side({})


def test_the_colours_get_lighter_all_the_way_so_that_grey_says_the_same():
    red, green, blue = mpl.colormaps[plots._MAP](np.linspace(0, 1, 256))[:, :3].T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert np.diff(lightness).min() > -2e-3  # a unit of eight bits is 4e-3
    series = [mpl.colors.to_rgb(c) for c in (plots._DARK, plots._MIDDLE, plots._LIGHT)]
    assert np.diff([0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in series]).min() > 0.2


@pytest.mark.parametrize("name", ["a.$\\frac{$x.w", "$x$", "$", r"a\\$b$", "a\nb", "\x1b[2J", "_^{}"])
def test_any_name_can_be_drawn_as_it_is(name, compared):
    pair = {name: np.ones((16, 16), np.float32)}
    tuned = {name: np.full((16, 16), 2, np.float32)}
    table = daq.compare(pair, tuned, daq.quantize(pair, tuned, RECIPE))
    for picture in (plots.projection_by_layer(table), plots.recipes_side_by_side({name: table})):
        picture.canvas.draw()
    if name.isprintable() and "\\" not in name:
        (label,) = picture.axes[0].get_yticklabels()
        assert label.get_text().replace(r"\$", "$") == name
