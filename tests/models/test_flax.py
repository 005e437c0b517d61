"""Flax models on quantized weights give what they give on those weights dequantized, their code untouched."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import daq_jax as daq
from benchmarks import flax_models
from daq_jax.models.flax import InPlace
from tests.cases import is_qtensor, leaves_of

RECIPE = daq.Recipe(tiling=daq.Block(16, 16))
RECIPES = {
    "block": RECIPE,
    "channel": daq.Recipe(format=daq.int8, tiling=daq.Channel()),
    "group": daq.Recipe(format=daq.nf4, tiling=daq.Group(8)),
    "tensor": daq.Recipe(tiling=daq.PerTensor()),
}
D, HEADS = 24, 3
X = jax.random.normal(jax.random.key(9), (2, 5, D))


def quantized(tree, recipe=RECIPE, rules=daq.DEFAULT_RULES):
    """A tree quantized as a tune of itself, and how many leaves were."""
    q = daq.quantize(tree, tree, recipe, rules=rules)
    return q, sum(map(is_qtensor, leaves_of(q)))


# --- Linen --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of a transformer, of the parts that Linen has."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * D, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(D, name="down")(h), None


class Scanned(nn.Module):
    """Layers stacked along an axis of one's choice."""

    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=4
        )
        return layers(name="layers")(x, None)[0]


class Experts(nn.Module):
    """Every expert on every token."""

    @nn.compact
    def __call__(self, x):
        expert = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
        )
        return expert(D, name="experts")(x).sum(0)


class Mixed(nn.Module):
    """Einsum, convolution, a weight of one's own, and an output that is tied to the embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, D)
        x = nn.Einsum((D, HEADS, 8), "btd,dnh->btnh", name="mix")(embed(tokens))
        x = nn.DenseGeneral(D, axis=(-2, -1), name="out")(x)
        x = nn.Conv(D, (3,))(x)
        own = self.param("own", nn.initializers.lecun_normal(), (D, 16))
        return embed.attend((x @ own) @ own.T)


LINEN = {
    "block": (Block(), X, 6),
    "scan along 0": (Scanned(0), X, 6),
    "scan along 1": (Scanned(1), X, 6),
    "experts": (Experts(), X, 1),
    "mixed": (Mixed(), jnp.arange(10).reshape(2, 5), 4),
}
STACKED_SECOND = [
    daq.use("(query|key|value)/kernel$", matrix=((0,), (2, 3))),
    daq.use("out/kernel$", matrix=((0, 2), (3,))),
    daq.use("(up|down)/kernel$", matrix=((0,), (2,))),
    *daq.DEFAULT_RULES,
]


LINEN_RUNS = [("experts", "block")]
LINEN_RUNS += [pytest.param(n, "block", marks=pytest.mark.slow) for n in LINEN if n != "experts"]
LINEN_RUNS += [pytest.param("scan along 1", r, marks=pytest.mark.slow) for r in RECIPES if r != "block"]


@pytest.mark.filterwarnings("ignore::daq_jax.rules.rule.AmbiguousMatrixWarning")
@pytest.mark.parametrize(("name", "recipe"), LINEN_RUNS)
def test_a_linen_model_runs_on_codes_as_on_its_dequantized_weights(name, recipe):
    model, x, count = LINEN[name]
    variables = model.init(jax.random.key(0), x)
    rules = STACKED_SECOND if name == "scan along 1" else daq.DEFAULT_RULES
    q, found = quantized(variables, RECIPES[recipe], rules)
    assert found == count
    wanted = jax.jit(model.apply)(daq.dequantize(q), x)
    held = daq.linen_variables(q)
    np.testing.assert_allclose(jax.jit(model.apply)(held, x)[0], wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda q, x: daq.linen_apply(model, q, x))(q, x)[0], wanted[0], rtol=1e-5, atol=1e-5
    )
    assert sum(a.nbytes for a in jax.tree.leaves(held)) == sum(a.nbytes for a in jax.tree.leaves(q))


@pytest.mark.slow
def test_a_linen_model_with_partitioned_weights_runs():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(16, kernel_init=init)
    q, count = quantized(model.init(jax.random.key(0), X))
    assert count == 1
    wanted = model.apply(daq.dequantize(q), X)
    np.testing.assert_allclose(model.apply(daq.linen_variables(q), X), wanted, rtol=1e-6)


@pytest.mark.slow
def test_the_weights_of_a_scanned_stack_are_decoded_layer_by_layer():
    """The program holds one layer's weights at a time, not the whole stack."""
    model, x, _ = LINEN["scan along 0"]
    q, _ = quantized(model.init(jax.random.key(0), x))
    text = jax.jit(model.apply).lower(daq.linen_variables(q), x).as_text()
    assert f"tensor<4x{D}x{4 * D}xf8E4M3FN>" in text
    assert f"tensor<{D}x{4 * D}xf32>" in text
    assert f"tensor<4x{D}x{4 * D}xf32>" not in text


# --- NNX ----------------------------------------------------------------------------------------------------


class NNXBlock(nnx.Module):
    """One layer of a transformer, of the parts that NNX has."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, 4 * D, rngs=rngs)
        self.down = nnx.Linear(4 * D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm(x)))))


class NNXStack(nnx.Module):
    """Stacked layers, a tied output, a convolution, an einsum, a batch norm, and a weight of one's own."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(32, D, rngs=rngs)
        self.layers = nnx.vmap(NNXBlock)(rngs.split(4))
        self.conv = nnx.Conv(D, D, (3,), rngs=rngs)
        self.mix = nnx.Einsum("btd,df->btf", (D, D), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(D, use_running_average=True, rngs=rngs)
        self.own = nnx.Param(jnp.full((D, D), 0.1).at[0].set(1))
        self.again = self.mix  # shared

    def __call__(self, tokens):
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            self.embed(tokens), self.layers
        )
        x = self.batch_norm(self.again(self.mix(self.conv(x))))
        return self.embed.attend(x @ self.own @ self.own.T)


@nnx.jit
def run(model, x):
    return model(x)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), [("layer", "block"), ("stack", "block"), ("layer", "channel")])
def test_an_nnx_model_runs_on_codes_as_on_its_dequantized_weights(name, recipe):
    make, x, count = {
        "layer": (lambda: NNXBlock(nnx.Rngs(0)), X, 6),
        "stack": (lambda: NNXStack(nnx.Rngs(0)), jnp.arange(10).reshape(2, 5), 9),
    }[name]
    model = make()
    graph, state = nnx.split(model)
    q, found = quantized(state, RECIPES[recipe])
    assert found == count
    wanted = run(nnx.merge(graph, daq.dequantize(q)), x)
    held = daq.nnx_with(model, q)
    assert type(held) is type(model)
    np.testing.assert_allclose(run(held, x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(daq.nnx_with(nnx.eval_shape(make), q), x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(model, x).shape, wanted.shape)  # the model itself is as it was
    assert held is not model
    sizes = [
        sum(a.nbytes for a in jax.tree.leaves(tree) if hasattr(a, "nbytes")) for tree in (nnx.state(held), q)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_only_the_parameters_need_be_given_and_any_tree_of_their_paths_will_do():
    model = NNXBlock(nnx.Rngs(0))
    q, _ = quantized(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    wanted = run(daq.nnx_with(model, quantized(nnx.state(model))[0]), X)
    np.testing.assert_array_equal(run(daq.nnx_with(model, q), X), wanted)


def test_weights_that_do_not_fit_a_model_are_named():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'wight' is not in the model"):
        daq.nnx_with(model, {"wight": jnp.ones((4, 8))})
    with pytest.raises(ValueError, match=r"'kernel' is \(3, 8\) but \(4, 8\)"):
        daq.nnx_with(model, {"kernel": jnp.ones((3, 8))})
    with pytest.raises(ValueError, match="'bias' is missing"):
        daq.nnx_with(nnx.eval_shape(lambda: model), {"kernel": jnp.ones((4, 8))})


# --- Stacks as MaxText writes them --------------------------------------------------------------------------

HIDDEN, EXPERTS = 40, 5


class ExpertLayer(nnx.Module):
    """Attention, a dense network and experts, whose weights are parameters of their own."""

    def __init__(self, rngs):
        def made(*shape):
            return nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

        self.query, self.out = made(D, HEADS, 8), made(HEADS, 8, D)
        self.wi, self.wo = made(D, HIDDEN), made(HIDDEN, D)
        self.experts_in, self.experts_out = made(EXPERTS, D, HIDDEN), made(EXPERTS, HIDDEN, D)
        self.gain = nnx.Param(jnp.float32(0.5))

    def __call__(self, x):
        heads = jnp.einsum("btd,dhk->bthk", x, self.query[...])
        x = x + jnp.einsum("bthk,hkd->btd", nnx.gelu(heads), self.out[...])
        x = x + self.gain * (nnx.gelu(x @ self.wi[...]) @ self.wo[...])
        each = jnp.einsum("btd,edf->betf", x, self.experts_in[...])
        return x + jnp.einsum("betf,efd->btd", nnx.gelu(each), self.experts_out[...])


def moved(params, source, target):
    """Parameters with one axis moved, as MaxText moves all arrays of a state at once."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, source, target) if x.ndim > max(source, target) else x, params
    )


def over_layers(layers, x, axis, call):
    """Calls layers one after the other: their axis to the front, then `jax.lax.scan`, which slices it off."""
    graph, params, rest = nnx.split(layers, nnx.Param, ...)
    params = moved(params, axis, 0)

    def scalars_have_an_axis(variable):  # MaxText reads every whole stack, to look at its shape alone
        assert variable.get_value().ndim > 0
        return variable

    params = jax.tree.map(scalars_have_an_axis, params, is_leaf=lambda v: isinstance(v, nnx.Variable))

    def body(x, sliced):
        return call(nnx.merge(graph, *sliced), x), None

    return jax.lax.scan(jax.checkpoint(body), x, (params, rest))[0]


class MaxTextStack(nnx.Module):
    """Layers stacked on `axis`, in one stack or in a stack of stacks, of `lengths`."""

    def __init__(self, axis, lengths, rngs):
        self.axis, self.lengths, made = axis, lengths, ExpertLayer
        for length in reversed(lengths):
            made = self._stacked(made, length)
        self.layers = made(rngs)

    def _stacked(self, made, length):
        def make(rngs):
            layers = nnx.vmap(made)(rngs.split(length))
            graph, params, rest = nnx.split(layers, nnx.Param, ...)
            return nnx.merge(graph, moved(params, 0, self.axis), rest)

        return make

    def __call__(self, x):
        call = ExpertLayer.__call__
        for _ in self.lengths:
            call = functools.partial(over_layers, axis=self.axis, call=call)
        return call(self.layers, x)


def rules_of_stacks(axis, stacks):
    """Views of the weights of `MaxTextStack`, worked out by hand from the shapes of one layer."""

    def use(name, rows, columns, first):
        """`first`: how many axes of the layer's weight stand before the stacks."""
        shift = [a if a < first else a + stacks for a in (*rows, *columns)]
        return daq.use(f"/{name}$", matrix=(tuple(shift[: len(rows)]), tuple(shift[len(rows) :])))

    return [
        use("query", (0,), (1, 2), axis),
        use("out", (0, 1), (2,), axis),
        use("w[io]", (0,), (1,), axis),
        use("experts_(in|out)", (1,), (2,), axis),
        daq.keep(""),
    ]


MAXTEXT_RUNS = [(1, (HEADS,))]  # as many layers as heads: no shape tells them apart
MAXTEXT_RUNS += [pytest.param(a, n, marks=pytest.mark.slow) for a, n in ((1, (3, 2)), (0, (2,)), (0, (2, 3)))]


@pytest.mark.parametrize(("axis", "lengths"), MAXTEXT_RUNS)
def test_a_stack_moved_and_sliced_inside_the_model_runs_on_codes(axis, lengths):
    model = MaxTextStack(axis, lengths, nnx.Rngs(0))
    graph, params = nnx.split(model)
    q, count = quantized(params, rules=rules_of_stacks(axis, len(lengths)))
    assert count == 6
    wanted = run(nnx.merge(graph, daq.dequantize(q)), X)
    np.testing.assert_array_equal(run(daq.nnx_with(model, q), X), wanted)
    assert np.abs(wanted - run(model, X)).max() > 0


# --- Exported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform",
    ["cpu", pytest.param("cuda", marks=pytest.mark.slow), pytest.param("tpu", marks=pytest.mark.slow)],
)
def test_a_quantized_model_is_exported_and_read_again(platform):
    pytest.importorskip("flatbuffers")
    model, variables, x = nn.Dense(16), None, X
    if platform != "cpu":  # a whole stack of layers takes its time
        model, x, _ = LINEN["scan along 0"]
    variables = model.init(jax.random.key(0), x)
    q, _ = quantized(variables)
    held = daq.linen_variables(q)
    for apply, tree in ((model.apply, held), (lambda q, x: model.apply(daq.dequantize(q), x), q)):
        exported = jax.export.export(jax.jit(apply), platforms=(platform, "cpu"))(tree, x)
        again = jax.export.deserialize(exported.serialize())
        assert platform in again.platforms
        np.testing.assert_allclose(again.call(tree, x), jax.jit(apply)(tree, x), rtol=1e-5, atol=1e-5)


def test_a_quantized_nnx_model_prints():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    assert "InPlace" in repr(daq.nnx_with(model, daq.quantize(state, state, daq.recipes.absmax)))


@pytest.mark.slow
def test_a_quantized_nnx_model_is_exported():
    graph, state = nnx.split(
        daq.nnx_with(NNXBlock(nnx.Rngs(0)), quantized(nnx.state(NNXBlock(nnx.Rngs(0))))[0])
    )
    leaves_, tree = jax.tree.flatten(state)  # jax.export cannot write an nnx.State

    def apply(leaves, x):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x)

    leaves_ = [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves_]
    exported = jax.export.export(jax.jit(apply), platforms=("cpu", "cuda", "tpu"))(leaves_, X)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(leaves_, X), jax.jit(apply)(leaves_, X), rtol=1e-5, atol=1e-5)


# --- Models of a real size ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_transformer_of_60_million_parameters_takes_half_the_memory(library):
    with jax.numpy_dtype_promotion("standard"):
        size = flax_models.SIZES["cpu"]._replace(inputs={"prompt": (1, 8)})
        row = flax_models.measure(library, "fp8 block", size, repeats=1)
    assert row["parameters"] > 50e6
    assert row["quantized_parameters"] > 0.9 * row["parameters"]
    assert row["beside_bf16"] < 0.51
    assert row["prompt"]["error_of_logits"] < 1e-2


# --- A weight in place --------------------------------------------------------------------------------------

VIEWS = {
    "plain": ((40, 24), ((0,), (1,)), []),
    "stored [out, in]": ((24, 40), ((1,), (0,)), []),
    "experts": ((3, 40, 24), ((-2,), (-1,)), [0]),
    "maxtext query": ((40, 5, 3, 8), ((0,), (2, 3)), [1]),
    "maxtext out": ((3, 5, 8, 40), ((0, 2), (3,)), [1]),
    "maxtext experts": ((3, 5, 40, 24), ((-2,), (-1,)), [0, 1]),
    "outputs apart": ((3, 40, 8), ((1,), (0, 2)), []),
}


VIEW_RUNS = [("maxtext out", "block")]
VIEW_RUNS += [
    pytest.param(n, r, marks=pytest.mark.slow) for n in VIEWS for r in RECIPES if (n, r) not in VIEW_RUNS
]


@pytest.mark.parametrize(("name", "recipe"), VIEW_RUNS)
def test_a_weight_in_place_is_the_weight_and_a_slice_is_its_slice(name, recipe):
    shape, matrix, batch = VIEWS[name]
    w = jax.random.normal(jax.random.key(3), shape)
    q = daq.quantize(w, w, RECIPES[recipe], rules=[daq.use("", matrix=matrix)])
    held, whole = InPlace.of(q), np.asarray(q.dequantize())
    assert {a.ndim for a in jax.tree.leaves(held)} == {len(shape)}
    np.testing.assert_array_equal(held.unbox(), whole)
    for axis in batch:
        sliced = jax.tree.map(lambda x, axis=axis: jnp.take(x, 2, axis), held)
        np.testing.assert_array_equal(sliced.unbox(), whole.take(2, axis))
        out = jax.vmap(lambda w: w.unbox(), in_axes=axis, out_axes=axis)(held)
        np.testing.assert_array_equal(out, whole)


@pytest.mark.parametrize("name", ["plain", "maxtext out", "maxtext experts", "experts apart", "square stack"])
def test_a_weight_is_known_when_its_batch_axes_are_moved_sliced_and_stacked(name):
    shape, matrix, batch = {
        **VIEWS,
        "experts apart": ((3, 8, 4, 8), ((1,), (3,)), [0, 2]),
        "square stack": ((4, 4, 4, 4), ((0,), (3,)), [1, 2]),
    }[name]
    w = jax.random.normal(jax.random.key(3), shape)
    q = daq.quantize(w, w, RECIPES["group"], rules=[daq.use("", matrix=matrix)])
    held, whole = InPlace.of(q), np.asarray(q.dequantize())
    stacked = jax.tree.map(lambda x: jnp.stack([x, x], -1), held)
    np.testing.assert_array_equal(stacked.unbox(), np.stack([whole, whole], -1))
    for axis in batch:
        moved = jax.tree.map(lambda x, axis=axis: jnp.moveaxis(x, axis, 0), held)
        np.testing.assert_array_equal(moved.unbox(), np.moveaxis(whole, axis, 0))
        _, layers = jax.lax.scan(lambda _, layer: (None, layer.unbox()), None, moved)
        np.testing.assert_array_equal(layers, np.moveaxis(whole, axis, 0))


def test_a_weight_cut_along_its_inputs_is_an_error():
    held = InPlace.of(daq.quantize(X[0], X[0], RECIPE))
    with pytest.raises(daq.DaqError, match="along an input or output axis"):
        dataclasses.replace(held, codes=held.codes[0], axes=jnp.zeros(0, jnp.int8)).unbox()
