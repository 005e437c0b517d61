"""What the compiler of TPUs makes of our programs; it needs no TPU.

The gate asks for one kind of chip; `pytest -m tpu tests/test_tpu.py` asks for all. The whole table is that of
`python -m benchmarks tpu`.
"""

import math

import pytest

from benchmarks import tpu

pytestmark = pytest.mark.tpu
WEIGHTS = math.prod(tpu.SHAPE)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("v5e:2x2", "tpu7x:2x2x1")]


@pytest.fixture(scope="module", params=["v6e:2x2", *OTHERS])
def chip(request):
    return tpu.on_one_chip(request.param)


@pytest.mark.parametrize("recipe", ["absmax", "int4 group", "fp8 channel"])
def test_nothing_of_the_size_of_the_weight_is_written_to_quantize_it(chip, recipe):
    found = tpu.compiled(tpu.quantizing(recipe, chip), WEIGHTS)
    assert found.temporary <= 1
    assert found.accessed <= (16 if "v5" in next(iter(chip.device_set)).device_kind.lower() else 10)
    assert not found.sent


def test_a_search_scores_candidates_as_it_reads_the_weights():
    found = tpu.compiled(tpu.quantizing("paper_cosine", tpu.on_one_chip("v6e:2x2")), WEIGHTS)
    assert found.temporary <= 1
    assert found.accessed <= 45


@pytest.mark.parametrize("recipe", ["absmax", "int4 group", "nf4 group"])
def test_a_product_decodes_its_weight_as_it_reads_it(chip, recipe):
    found = tpu.compiled(tpu.using("dot", recipe, chip), WEIGHTS)
    assert found.temporary <= 0.01
    assert found.accessed <= 1.3


@pytest.mark.parametrize("use", ["dequantize", "Linen", "NNX"])
def test_a_weight_that_is_read_as_an_array_is_written_once_in_its_dtype(chip, use):
    found = tpu.compiled(tpu.using(use, "absmax", chip), WEIGHTS)
    assert found.temporary <= 2.1
    assert found.accessed <= 5.3


@pytest.mark.parametrize("topology", ["v5e:16x16", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def test_tiles_on_one_chip_send_nothing(topology):
    where = tpu.over_mesh(topology)
    found = tpu.compiled(tpu.quantizing("absmax", where), WEIGHTS // where.num_devices)
    assert not found.sent
