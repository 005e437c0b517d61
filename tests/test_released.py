"""The recipes named after the released program pick the scales that it picks, faults included."""

import numpy as np
import pytest

import daq_jax as daq
from tests import oracles
from tests.cases import BF16, native, pair, slow_after

TILE = (128, 128)


def bases():
    """Bfloat16 pairs of many blocks: from a base that was never quantized, and from one on an e4m3 grid."""
    yield "bf16 base, small change", *pair("released small", (512, 768), BF16, 0.01)
    yield "bf16 base, large change", *pair("released large", (512, 768), BF16, 0.1)
    base, tuned = native("released native", (512, 768), change=0.02)
    yield "native base", base.astype(BF16), tuned.astype(BF16)
    base, tuned = pair("released frozen", (256, 512), BF16, 0.02)
    frozen = base.copy()
    frozen[:128] = tuned[:128]
    yield "half frozen", frozen, tuned


@pytest.mark.parametrize("name", ["sign", "cosine"])
@pytest.mark.parametrize(
    ("case", "base", "tuned"),
    slow_after(1, reversed([*bases()])),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_released_recipes_pick_what_the_released_program_picks(case, base, tuned, name):
    recipe = {"sign": daq.recipes.released_sign, "cosine": daq.recipes.released_cosine}[name]
    got = np.asarray(daq.quantize(base, tuned, recipe).scale)
    wanted = oracles.released_scales(base, tuned, TILE, name)
    same = np.isclose(got, wanted, rtol=1e-5)  # neighbouring ratios are 1e-2 apart
    assert same.mean() >= 0.99, f"{same.mean():.1%}; {got[~same][:4]} against {wanted[~same][:4]}"


@pytest.mark.parametrize("name", ["released_sign", "released_cosine"])
def test_a_block_with_nothing_to_keep_is_clipped_as_the_released_program_does(name):
    base, _ = pair("untouched", (128, 128), BF16)
    q = daq.quantize(base, base, getattr(daq.recipes, name))
    absmax = oracles.absmax_scales(base, oracles.FORMATS["fp8_e4m3fn"], TILE)
    np.testing.assert_allclose(q.scale, 0.8 * absmax, rtol=1e-6)


def test_the_codes_are_those_of_the_direct_cast():
    number = oracles.FORMATS["fp8_e4m3fn"]
    base, tuned = pair("released codes", (128, 256), BF16)
    q = daq.quantize(base, tuned, daq.recipes.released_cosine)
    scale = oracles.spread(np.asarray(q.scale), tuned.shape, TILE)
    wanted = number.round(tuned.astype(np.float32) / scale)
    np.testing.assert_array_equal(number.decode(np.asarray(q.codes)), wanted)
