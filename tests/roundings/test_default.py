"""What the default promises: a change at its size, the grid of the base, no harm where nothing is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import rounding_oracles as ro
from tests.cases import BF16


def kept(q):
    return np.asarray(q.dequantize(jnp.float32), np.float64)


@pytest.mark.parametrize("change", [0.003, 0.03])
def test_a_change_with_directions_is_kept_at_its_size(change):
    base, tuned = ro.native(4, (512, 384), change, rank=16)
    assert 0.95 < ro.projection(base, tuned, kept(daq.quantize(base, tuned))) < 1.05


@pytest.mark.parametrize("change", [0.002, 0.01])
def test_a_change_is_told_from_the_rounding_of_weights_stored_in_bfloat16(change):
    """What is kept along the change before it was stored, which the library is not shown."""
    base, tuned = ro.native(4, (512, 384), change, rank=16)
    d = tuned.astype(np.float64) - base
    before, after = base.astype(BF16), tuned.astype(BF16)
    q = daq.quantize(jnp.asarray(before), jnp.asarray(after))
    part = np.sum((kept(q) - before.astype(np.float64)) * d) / np.sum(d * d)
    assert 0.8 < part < 1.2


@pytest.mark.parametrize("change", [0.001, 0.01])
def test_a_change_without_directions_costs_no_more_than_nearest_rounding(change):
    base, tuned = ro.native(4, (512, 384), change)
    q, plain = (
        daq.quantize(base, tuned, x) for x in (daq.recipes.default, daq.Recipe(search=daq.BaseScale()))
    )
    assert np.mean((kept(q) - tuned) ** 2) <= 1.02 * np.mean((kept(plain) - tuned) ** 2)


def test_no_change_gives_the_codes_and_scales_of_the_base():
    base, _ = ro.native(4, (512, 384), 0.01)
    shipped = daq.quantize(base, base, daq.recipes.absmax)
    q = daq.quantize(shipped, jnp.asarray(kept(shipped), jnp.float32))
    np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(shipped.codes))
    np.testing.assert_array_equal(np.asarray(q.scale), np.asarray(shipped.scale))


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("size", [1e16, 1e25, 3e38])
def test_a_weight_whose_square_is_out_of_reach_is_refused_by_name(which, size):
    pair = dict(zip(("base", "tuned"), ro.native(4, (256, 128), 0.01), strict=True))
    pair[which][5, 7] = size
    before, after = ({"kernel": pair[name]} for name in ("base", "tuned"))
    with pytest.raises(daq.DaqError, match=rf"'kernel'.*{which} holds a weight of size"):
        daq.quantize(before, after)
    scale = jax.jit(daq.quantize)(before, after)["kernel"].scale
    assert np.isnan(np.asarray(scale)).any()
    plain = daq.quantize(before, after, daq.recipes.absmax)["kernel"]
    assert np.isfinite(np.asarray(plain.codes, np.float32)).all()
