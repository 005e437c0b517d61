"""What does a Flax model cost to hold and to run on FP8 weights, beside bfloat16 ones?

    python -m benchmarks flax_models --size cpu

Makes one transformer in Flax Linen and one in Flax NNX, with random bfloat16 weights, and runs each on its
plain weights and on quantized ones, held as codes and scales and decoded inside `jit`. First the logits are
compared with those of the dequantized weights, and a difference above 1e-2 of the largest ends the run with
exit status 1. Reported are tokens a second and the bytes of the weights. Writes `flax_models_DEVICE.json`.

`--size gpu` is meant for a GPU and takes about a minute there.
"""

import functools
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import daq_jax as daq
from benchmarks import common

TOLERATED = 1e-2  # of the largest logit
RECIPES = {
    "fp8 block": daq.recipes.absmax,
    "fp8 channel": daq.Recipe(tiling=daq.Channel()),
}


class Size(NamedTuple):
    """Of a model, and of the inputs that it is run on, each (sequences, tokens of one)."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    inputs: dict[str, tuple[int, int]]


SIZES = {
    "tiny": Size(2, 64, 4, 256, {"prompt": (2, 8), "token": (2, 1)}),
    "cpu": Size(8, 768, 12, 4096, {"prompt": (2, 32), "token": (2, 1)}),
    "gpu": Size(16, 4096, 32, 16384, {"prompt": (8, 512), "token": (8, 1)}),
}

# --- The model, in both libraries ---------------------------------------------------------------------------


class LinenLayer(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        attention = nn.MultiHeadDotProductAttention(self.size.heads, **bf16)
        x = x + attention(nn.RMSNorm(**bf16)(x), mask=mask)
        up = nn.Dense(4 * self.size.width, name="up", **bf16)
        h = nn.gelu(up(nn.RMSNorm(**bf16)(x)))
        return x + nn.Dense(self.size.width, name="down", **bf16)(h), None


class LinenTransformer(nn.Module):
    """Tokens to logits; the layers are one stack, and the output is tied to the embedding."""

    size: Size

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size = self.size
        embed = nn.Embed(size.vocabulary, size.width, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        layers = nn.scan(LinenLayer, {"params": 0}, split_rngs={"params": True}, length=size.layers)
        return embed.attend(layers(size, name="layers")(embed(tokens), None)[0])


class NNXLayer(nnx.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        make = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(size.width, **make)
        self.attention = nnx.MultiHeadAttention(size.heads, size.width, decode=False, **make)
        self.mlp_norm = nnx.RMSNorm(size.width, **make)
        self.up = nnx.Linear(size.width, 4 * size.width, **make)
        self.down = nnx.Linear(4 * size.width, size.width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class NNXTransformer(nnx.Module):
    """Tokens to logits; the layers are one stack, and the output is tied to the embedding."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.embed = nnx.Embed(size.vocabulary, size.width, **bf16, rngs=rngs)
        self.layers = nnx.vmap(functools.partial(NNXLayer, size))(rngs.split(size.layers))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.embed.attend(run(self.embed(tokens), self.layers))


class Model(NamedTuple):
    """A model of either library: its weights, and how it runs on such weights or on quantized ones."""

    weights: Any
    hold: Callable[[Any], Any]  # quantized weights, as the model wants them
    apply: Callable[[Any, jax.Array], jax.Array]


def linen(size: Size) -> Model:
    """The Linen model."""
    model = LinenTransformer(size)
    weights = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return Model(weights, daq.linen_variables, jax.jit(model.apply))


def in_nnx(size: Size) -> Model:
    """The NNX model."""
    weights = nnx.state(nnx.jit(lambda: NNXTransformer(size, nnx.Rngs(0)))(), nnx.Param)
    abstract = nnx.eval_shape(lambda: NNXTransformer(size, nnx.Rngs(0)))
    run = nnx.jit(lambda model, tokens: model(tokens))

    def hold(q: Any) -> Any:
        return daq.nnx_with(abstract, q)

    return Model(weights, hold, lambda held, tokens: run(held, tokens))


MODELS = {"linen": linen, "nnx": in_nnx}

# --- Measuring ----------------------------------------------------------------------------------------------


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def shares(weights: Any, q: Any) -> dict[str, float]:
    """Parameters of the model and of its quantized leaves, and the bytes of those."""
    quantized = [x for x in jax.tree.leaves(q, is_leaf=is_qtensor) if is_qtensor(x)]
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(weights)),
        "quantized_parameters": sum(x.size for x in quantized),
        "bytes_of_quantized_leaves": sum(x.nbytes for x in quantized),
        "beside_bf16": sum(x.nbytes for x in quantized) / sum(2 * x.size for x in quantized),
    }


def is_qtensor(x: Any) -> bool:
    """Whether a node is a quantized weight."""
    return isinstance(x, daq.QTensor)


def speed(apply: Callable[[Any, jax.Array], jax.Array], held: Any, tokens: jax.Array, repeats: int) -> float:
    """Tokens a second, the median of several calls."""
    return tokens.size / statistics.median(common.seconds(lambda: apply(held, tokens), repeats))


def measure(library: str, recipe: str, size: Size, repeats: int) -> dict[str, Any]:
    """One row: a model of one library on weights quantized by one recipe, and on plain ones.

    Raises:
        SystemExit: if the logits on codes are not those on the dequantized weights.
    """
    model = MODELS[library](size)
    plain = held_plain(library, model.weights, size)
    q = daq.quantize(model.weights, model.weights, RECIPES[recipe])
    held = model.hold(q)
    row = {"library": library, "recipe": recipe, **shares(model.weights, q), "held_bytes": nbytes(q)}
    row |= {"bf16_bytes": nbytes(model.weights)}
    dequantized = held_plain(library, daq.dequantize(q), size)
    for name, shape in size.inputs.items():
        tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)
        got, wanted = (model.apply(x, tokens).astype(jnp.float32) for x in (held, dequantized))
        error = float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted)))
        if not error <= TOLERATED:
            raise SystemExit(
                f"{library}, {recipe}, {name}: WRONG: logits are off by {error:.1e} of the largest"
            )
        row[name] = {
            "tokens": tokens.size,
            "error_of_logits": error,
            "tokens_per_second": speed(model.apply, held, tokens, repeats),
            "bf16_tokens_per_second": speed(model.apply, plain, tokens, repeats),
        }
    return row


def held_plain(library: str, weights: Any, size: Size) -> Any:
    """Plain weights as the model wants them."""
    if library == "linen":
        return weights
    return daq.nnx_with(nnx.eval_shape(lambda: NNXTransformer(size, nnx.Rngs(0))), weights)


def main(
    *, size: Literal[*SIZES] = "cpu", repeats: int = 9, out: Path | None = None, quick: bool = False
) -> None:
    """Runs both models on weights of each recipe.

    Args:
        size: of the models.
        repeats: timed calls.
        out: folder for the results; None for `benchmarks/results`.
        quick: tiny models, to see that it runs.
    """
    size = "tiny" if quick else size
    rows = []
    for library in MODELS:
        for recipe in RECIPES:
            rows.append(measure(library, recipe, SIZES[size], repeats))
            print(json.dumps(rows[-1], indent=1), flush=True)
            gc.collect()
    report = common.environment() | {"size": size, **SIZES[size]._asdict(), "rows": rows}
    common.write(common.named("flax_models", report, common.results(out, quick)), report)


COMMANDS = {"flax_models": main}
