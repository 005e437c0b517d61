"""The form in which TPUs get their tiles gives the codes, scales, weights and products of the plain one.

A TPU compiler makes one program of it; here it runs on a CPU. What that compiler says: `tests/test_tpu.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax import leaves
from daq_jax.models import matmul
from daq_jax.numerics.machine import Machine
from daq_jax.tilings import DEFAULT_MATRIX, TileView

HF = ((-1,), (-2,))
LAYERS = {
    "kernel": ((256, 384), DEFAULT_MATRIX),
    "hugging face": ((256, 384), HF),
    "odd": ((200, 300), DEFAULT_MATRIX),
    "odd hugging face": ((200, 300), HF),
    "experts": ((3, 136, 72), DEFAULT_MATRIX),
    "experts hugging face": ((3, 72, 136), HF),
    "heads": ((64, 4, 33), ((0,), (1, 2))),
    "heads to outputs": ((4, 33, 64), ((0, 1), (2,))),
    "batch last": ((64, 96, 2), ((0,), (1,))),
    "apart": ((8, 96, 8), ((0, 2), (1,))),
    "small": ((3, 5), DEFAULT_MATRIX),
}
TILINGS = {
    "block": daq.Block(),
    "small block": daq.Block(16, 24),
    "group": daq.Group(32),
    "channel": daq.Channel(),
    "tensor": daq.PerTensor(),
}
# Every layer in blocks, and a few layers in every tiling.
CUTS = [(layer, "block") for layer in LAYERS] + [
    (layer, tiling) for layer in ("odd", "odd hugging face") for tiling in TILINGS if tiling != "block"
]


def pair(shape, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32) * rng.choice(
        [0.01, 1], size=shape[:1] + (1,) * (len(shape) - 1)
    )
    tuned = base + 0.01 * rng.normal(size=shape).astype(np.float32)
    return jnp.asarray(base, dtype), jnp.asarray(tuned, dtype)


def quantized(base, tuned, recipe, matrix, tpu):
    """Codes and scales; as on a TPU, or as on any accelerator but that."""
    how = dataclasses.replace(leaves._How.of(tuned, recipe, matrix), machine=Machine(True, tpu=tpu))
    stream = np.uint32(7) if recipe.rounding == daq.Stochastic() else None
    return leaves._quantize(base, tuned, stream, how=how)[0]


def assert_alike(q, plain):
    np.testing.assert_array_equal(q.scale, plain.scale)
    np.testing.assert_array_equal(*(np.asarray(x.codes).astype(np.float32) for x in (q, plain)))
    np.testing.assert_array_equal(*(np.signbit(np.asarray(x.codes).astype(np.float32)) for x in (q, plain)))


@pytest.mark.parametrize(("layer", "tiling"), CUTS)
def test_nearest_codes_and_scales_are_those_of_tiles(layer, tiling):
    shape, matrix = LAYERS[layer]
    recipe = dataclasses.replace(daq.recipes.absmax, tiling=TILINGS[tiling])
    base, tuned = pair(shape)
    assert_alike(*(quantized(base, tuned, recipe, matrix, tpu) for tpu in (True, False)))


RECIPES = {
    "cosine": daq.recipes.paper_cosine,
    "sign": daq.recipes.paper_sign,
    "mse": daq.recipes.mse,
    "off grid": daq.Recipe(search=daq.OffGrid(), rounding=daq.Nearest()),
    "many": daq.Recipe(search=daq.Grid(0.8, 1.2, 41), metric=daq.cosine, rounding=daq.Nearest()),
    "base scale": daq.Recipe(search=daq.BaseScale(), rounding=daq.Nearest()),
    "stochastic": daq.Recipe(search=daq.AbsMax(), rounding=daq.Stochastic()),
    "int4 group": daq.Recipe(
        format=daq.int4, tiling=daq.Group(32), search=daq.BaseScale(), rounding=daq.Nearest()
    ),
    "mxfp4": daq.Recipe(
        format=daq.fp4_e2m1,
        tiling=daq.Group(32),
        scales=daq.PowerOfTwo(),
        search=daq.BaseScale(),
        rounding=daq.Nearest(),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layer", ["odd", "experts hugging face"])
def test_searches_find_the_scales_that_they_find_in_tiles(layer, recipe):
    shape, matrix = LAYERS[layer]
    recipe = RECIPES[recipe]
    assert leaves._goes_in_lines(recipe)
    native = daq.quantize({"w": pair(shape)[0]}, {"w": pair(shape)[0]}, daq.recipes.absmax)["w"]
    for base in (pair(shape)[0], native.dequantize(jnp.bfloat16)):
        tuned = base + jnp.asarray(0.01 * np.random.default_rng(1).normal(size=shape), jnp.bfloat16)
        lines, plain = (quantized(base, tuned, recipe, matrix, tpu) for tpu in (True, False))
        differ = np.mean(np.asarray(lines.scale) != np.asarray(plain.scale))
        assert differ <= 0.02  # sums in another order may decide between two candidates that score alike
        if not differ:
            assert_alike(lines, plain)


def test_a_stored_scale_of_the_base_is_kept():
    base, tuned = pair((256, 384))
    stored = daq.quantize({"w": base}, {"w": base})["w"]
    recipe = daq.Recipe(search=daq.BaseScale(), rounding=daq.Nearest())
    lines, plain = (quantized(stored, tuned, recipe, DEFAULT_MATRIX, tpu) for tpu in (True, False))
    assert_alike(lines, plain)
    np.testing.assert_array_equal(lines.scale, stored.scale)


@pytest.mark.parametrize("layer", ["kernel", "odd hugging face"])
def test_the_default_keeps_as_much_of_the_change(layer):
    shape, matrix = LAYERS[layer]
    base, tuned = pair(shape)
    figures = []
    for tpu in (True, False):
        q = quantized(base, tuned, daq.recipes.default, matrix, tpu)
        figures.append(daq.compare({"w": base}, {"w": tuned}, {"w": q}).total)
    lines, plain = figures
    assert lines.projection == pytest.approx(plain.projection, abs=0.02)
    assert lines.cosine == pytest.approx(plain.cosine, abs=0.02)


def test_a_recipe_with_a_part_of_ones_own_is_left_in_tiles():
    ours = daq.recipes.paper_cosine
    assert leaves._goes_in_lines(ours)
    theirs = {
        "metric": lambda d, q: -((d - q) ** 2).sum(-1),
        "rounding": lambda tiles, scale: tiles.format.round(tiles.over(scale)),
        "search": lambda trials: trials.absmax,
    }
    for name, part in theirs.items():
        assert not leaves._goes_in_lines(dataclasses.replace(ours, **{name: part})), name


@pytest.mark.parametrize(("layer", "tiling"), CUTS)
def test_weights_and_products_are_those_of_tiles(layer, tiling):
    shape, matrix = LAYERS[layer]
    view = TileView(shape, matrix, TILINGS[tiling])
    recipe = dataclasses.replace(daq.recipes.absmax, tiling=TILINGS[tiling])
    q = quantized(*pair(shape), recipe, matrix, False)
    weight = view.lines.join(q.values_on_tpu())
    np.testing.assert_array_equal(weight, view.join(q.values()))
    batch, rows, columns = view.axes
    if batch != tuple(range(len(batch))):
        return
    inputs = [shape[a] for a in rows]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(*view.batch, 5, *inputs)), jnp.float32)
    product = matmul._product_on_tpu(x, q)
    assert product.shape == (*view.batch, 5, *(shape[a] for a in columns))
    flat = np.asarray(weight, np.float64).transpose(*batch, *rows, *columns)
    flat = flat.reshape(*view.batch, math.prod(inputs), -1)
    wanted = np.asarray(x, np.float64).reshape(*view.batch, 5, -1) @ flat
    size = np.abs(np.asarray(x, np.float64)).reshape(*view.batch, 5, -1) @ np.abs(flat)
    assert np.all(np.abs(np.asarray(product).reshape(wanted.shape) - wanted) <= 1e-5 * size)


def test_what_is_recorded_for_several_machines_can_be_differentiated_batched_and_scanned():
    base, tuned = pair((2, 64, 96))
    q = daq.quantize({"w": base}, {"w": tuned})["w"]
    x = jnp.ones((2, 3, 64), jnp.bfloat16)

    def layer(q, x):
        return daq.dot(x, q).astype(jnp.float32).sum()

    dense = q.dequantize(jnp.bfloat16)
    wanted = jax.grad(lambda x: jnp.einsum("bnr,brc->bnc", x, dense).astype(jnp.float32).sum())(x)
    found = jax.jit(jax.grad(layer, argnums=1))(q, x)
    np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (found, wanted)), rtol=0.02, atol=0.02)
    one = jax.tree.map(lambda a: a[0], q)
    batched = jax.jit(jax.vmap(daq.dot, (0, None)))(x, one)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, x: (c, daq.dot(x, one)), 0, x)[1])(x)
    again = jax.jit(jax.remat(lambda x: daq.dot(x[0], one)))(x)
    np.testing.assert_array_equal(np.asarray(batched, np.float32), np.asarray(scanned, np.float32))
    np.testing.assert_array_equal(np.asarray(batched[0], np.float32), np.asarray(again, np.float32))
