"""Sharded weights: no communication where tiles lie within shards, exact codes where they do not."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import daq_jax as daq
from benchmarks.speed.collectives import collectives as bytes_sent
from daq_jax import leaves
from daq_jax.tilings import DEFAULT_MATRIX
from tests.cases import assert_same_bits, native, pair

COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
SEARCH = daq.CoarseToFine(0.8, 1.5, 5, 10)
TILE_LOCAL = {
    "absmax": daq.Recipe(tiling=daq.Block(16, 16)),
    "paper_sign": daq.Recipe(tiling=daq.Block(16, 16), search=SEARCH, metric=daq.SignRate()),
    "paper_cosine": daq.Recipe(tiling=daq.Block(16, 16), search=SEARCH),
    "gain": daq.Recipe(tiling=daq.Block(64, 64), rounding=daq.UnbiasedGain()),
    "stochastic": daq.Recipe(tiling=daq.Block(16, 16), rounding=daq.Stochastic()),
}
SUBSPACE = daq.Recipe(tiling=daq.Block(16, 16), rounding=daq.UnbiasedSubspace(rank=8))
# Shape, sharding and matrix of weights whose shards are whole tiles.
ALIGNED = {
    "matrix": ((128, 256), P("x", "y"), ((-2,), (-1,))),
    "layers": ((2, 64, 64), P("x", None, "y"), ((-2,), (-1,))),
    "heads": ((128, 8, 16), P("x", "y", None), ((-3,), (-2, -1))),
    "scanned heads": ((128, 3, 8, 16), P("x", None, "y", None), ((0,), (2, 3))),
}


def on_mesh(name, spec, shape, axis_type, draw=pair):
    """A base and a tuned weight on a mesh of two by four devices, and as they are."""
    sharding = NamedSharding(jax.make_mesh((2, 4), ("x", "y"), (axis_type,) * 2), spec)
    whole = tuple(jnp.asarray(x) for x in draw(name, shape))
    return jax.device_put(whole, sharding), whole


def collectives(compiled):
    return sorted({match[0] for match in COLLECTIVE.findall(compiled.as_text())})


def eager_program(base, tuned, recipe, matrix=None):
    """The compiled program of an eager call of `quantize`, and the result of that call."""
    program = leaves.lowered(base, tuned, recipe=recipe, matrix=matrix or DEFAULT_MATRIX).compile()
    return program, daq.quantize(base, tuned, recipe, rules=[daq.use("", matrix=matrix)])


# --- Communication ------------------------------------------------------------------------------------------

BOTH = (AxisType.Auto, AxisType.Explicit)
ALIGNED_RUNS = [("matrix", "absmax", AxisType.Explicit)]
ALIGNED_RUNS += [
    pytest.param(name, recipe, axis_type, marks=pytest.mark.slow)
    for name, recipe, axis_type in (
        ("matrix", "absmax", AxisType.Auto),
        *(("matrix", r, t) for r in ("paper_cosine", "gain") for t in BOTH),
        *(("matrix", r, AxisType.Auto) for r in ("paper_sign", "stochastic")),
        *((n, "paper_cosine", AxisType.Explicit) for n in ALIGNED if n != "matrix"),
    )
]


@pytest.mark.parametrize(("name", "recipe", "axis_type"), ALIGNED_RUNS)
def test_where_tiles_lie_within_shards_no_program_communicates(name, recipe, axis_type):
    shape, spec, matrix = ALIGNED[name]
    sharded, _ = on_mesh(name, spec, shape, axis_type)
    rules = [daq.use("", matrix=matrix)]
    quantize = functools.partial(daq.quantize, recipe=TILE_LOCAL[recipe], rules=rules)
    program, q = eager_program(*sharded, TILE_LOCAL[recipe], matrix)
    assert collectives(program) == []
    assert collectives(jax.jit(quantize).lower(*sharded).compile()) == []
    assert collectives(jax.jit(daq.dequantize).lower(q).compile()) == []
    assert q.codes.sharding.is_equivalent_to(sharded[0].sharding, q.ndim)


@pytest.mark.slow
def test_the_check_for_collectives_finds_them():
    """Tiles that cross devices, and work on whole matrices, do need to communicate."""
    sharded, _ = on_mesh("found", P("x", "y"), (64, 64), AxisType.Auto)
    for recipe in (daq.Recipe(tiling=daq.PerTensor()), SUBSPACE):
        program, _ = eager_program(*sharded, recipe)
        assert collectives(program) != []


# --- Exactness ----------------------------------------------------------------------------------------------

CROSSING = {
    "block": daq.Block(24, 40),
    "channel": daq.Channel(),
    "group": daq.Group(20),
    "tensor": daq.PerTensor(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSSING)
def test_tiles_that_cross_devices_get_the_codes_of_one_device(name):
    sharded, whole = on_mesh(name, P("x", "y"), (64, 64), AxisType.Explicit)
    for recipe in (
        daq.Recipe(tiling=CROSSING[name]),
        daq.Recipe(tiling=CROSSING[name], search=SEARCH, metric=daq.SignRate()),
    ):
        assert_same_bits(daq.quantize(*sharded, recipe), daq.quantize(*whole, recipe))


@pytest.mark.slow
def test_subspace_rounding_agrees_in_what_it_keeps():
    sharded, whole = on_mesh("subspace", P("x", "y"), (128, 128), AxisType.Explicit, native)
    got, wanted = (daq.compare(*w, daq.quantize(*w, SUBSPACE)).total for w in (sharded, whole))
    np.testing.assert_allclose(got.projection, wanted.projection, rtol=1e-3)
    np.testing.assert_allclose(got.mse, wanted.mse, rtol=1e-3)


# --- Inside other transformations ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["absmax", "paper_sign", "gain"])
def test_inside_shard_map_each_shard_gets_its_codes(recipe):
    sharded, whole = on_mesh("shard_map", P("x", "y"), (128, 256), AxisType.Auto)
    spec = P("x", "y")
    run = jax.shard_map(
        lambda b, t: daq.quantize(b, t, TILE_LOCAL[recipe]),
        mesh=sharded[0].sharding.mesh,
        in_specs=spec,
        out_specs=spec,
    )
    assert_same_bits(jax.jit(run)(*sharded), daq.quantize(*whole, TILE_LOCAL[recipe]))


@pytest.mark.slow
def test_donated_inputs_are_taken_and_codes_are_the_same():
    sharded, whole = on_mesh("donated", P("x", "y"), (64, 64), AxisType.Auto)
    wanted = daq.quantize(*whole, TILE_LOCAL["absmax"])
    run = jax.jit(functools.partial(daq.quantize, recipe=TILE_LOCAL["absmax"]), donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # codes are smaller
        assert_same_bits(run(*sharded), wanted)
    fresh, _ = on_mesh("donated", P("x", "y"), (64, 64), AxisType.Auto)
    assert_same_bits(daq.quantize(*fresh, TILE_LOCAL["absmax"], donate=True), wanted)
    assert all(x.is_deleted() for x in fresh)


def test_every_few_steps_inside_a_condition():
    """What a training loop does: quantize and compare on some steps, nothing on the others."""
    (base, tuned), whole = on_mesh("condition", P("x", "y"), (64, 64), AxisType.Auto)

    @jax.jit
    def step(i, base, tuned):
        def look(pair):
            return daq.compare(*pair, daq.quantize(*pair, TILE_LOCAL["absmax"])).total.projection

        return jax.lax.cond(i % 10 == 0, look, lambda pair: jnp.float32(jnp.nan), (base, tuned))

    wanted = daq.compare(*whole, daq.quantize(*whole, TILE_LOCAL["absmax"])).total.projection
    np.testing.assert_allclose(step(10, base, tuned), wanted, rtol=1e-6)
    assert np.isnan(step(11, base, tuned))


@pytest.mark.slow
def test_a_rounding_of_whole_matrices_sends_little_for_a_weight_sharded_over_its_inputs():
    """Something for each of its row blocks would be some 300 bytes an element."""
    codes = []
    for spec in (P(None, ("x", "y")), P(("x", "y"), None)):
        (base, tuned), _ = on_mesh("over inputs", spec, (512, 512), AxisType.Explicit, native)
        program, q = eager_program(base, tuned, daq.recipes.default)
        codes.append(np.asarray(q.codes.astype(jnp.float32)))
        assert sum(bytes_sent(program.as_text()).values()) < 10 * base.size
        assert q.codes.sharding == base.sharding
    assert np.mean(codes[0] == codes[1]) > 0.999


FORWARD = {
    "blocks": daq.recipes.absmax,
    "channel": daq.Recipe(tiling=daq.Channel()),
    "int4 groups": daq.Recipe(format=daq.int4, tiling=daq.Group(32)),
}


@pytest.mark.parametrize("recipe", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("kind", BOTH, ids=lambda k: k.name)
def test_two_layers_in_tensor_parallel_send_the_last_product_alone(kind, recipe):
    mesh = jax.make_mesh((4,), ("x",), (kind,))
    rng = np.random.default_rng(0)
    weights = {
        "up": (P(None, "x"), rng.normal(size=(256, 512))),
        "down": (P("x", None), rng.normal(size=(512, 256))),
    }
    whole = {name: jnp.asarray(0.02 * w, jnp.float32) for name, (_, w) in weights.items()}
    here = {name: jax.device_put(whole[name], NamedSharding(mesh, weights[name][0])) for name in whole}
    x = jnp.asarray(rng.normal(size=(8, 256)), jnp.float32)
    everywhere = NamedSharding(mesh, P(None, None))

    def forward(q, x, out_sharding=None):
        return daq.dot(jax.nn.gelu(daq.dot(x, q["up"])), q["down"], out_sharding=out_sharding)

    wanted = forward(daq.quantize(whole, whole, recipe), x)
    run = jax.jit(functools.partial(forward, out_sharding=everywhere))
    q, x = daq.quantize(here, here, recipe), jax.device_put(x, everywhere)
    found = run(q, x)
    assert found.sharding.is_equivalent_to(everywhere, 2)
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=1e-5)
    assert bytes_sent(run.lower(q, x).compile().as_text()) == {"all-reduce": found.nbytes}
    np.testing.assert_allclose(np.asarray(forward(q, x, everywhere)), np.asarray(wanted), atol=1e-5)


@pytest.mark.parametrize("spec", [P(), P(None, "x"), P("x", None)], ids=str)
@pytest.mark.parametrize("over", [P(), P("x", None), P(None, "x")], ids=str)
def test_a_product_on_explicit_axes_is_sharded_or_refused_as_that_of_arrays(over, spec):
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,))
    weight = jax.device_put(
        0.02 * np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32), NamedSharding(mesh, spec)
    )
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(mesh, over))
    q = daq.quantize(weight, weight, daq.recipes.absmax)
    for how in (lambda f: f, jax.jit):
        try:
            wanted = how(jnp.dot)(x, weight)
        except Exception as refused:
            with pytest.raises(type(refused)):
                how(daq.dot)(x, q)
        else:
            found = how(daq.dot)(x, q)
            assert found.sharding == wanted.sharding
            np.testing.assert_allclose(found, jnp.dot(np.asarray(x), np.asarray(q.dequantize())), atol=1e-5)
