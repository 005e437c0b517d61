"""A small byte-level language model and its training: something real to tune, quantize and judge.

Flax Linen holds the weights, optax the optimizer. Training is a `jax.lax.scan` over steps inside one
jitted call, and draws its batches on the device from a uint8 text, so the host only waits. Learning
rates go in as an array: any schedule, and one compiled program for texts of one length.

Letters: `B` sequences, `L` bytes of context, `M = L + 1` with the byte that comes next, `V` bytes in the
vocabulary, `S` steps, `N` bytes of text. Losses and divergences are in nats per byte.
"""

import dataclasses
import typing
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from daq_jax.analysis.predictions import kl_divergences
from daq_jax.errors import DaqError

Params = Any  # a nested dict of arrays, as Linen makes it


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What shapes a model.

    Each layer has four matrices `[in, out]`: `[width, 3 width]`, `[width, width]`, `[width, 4 width]` and
    `[4 width, width]`. With experts, the last two are stacks `[experts, in, out]`.
    """

    layers: int = 2
    width: int = 256
    heads: int = 4
    context: int = 64  # bytes that a prediction can see
    vocab: int = 256
    experts: int = 0  # perceptrons of a layer, of which each byte takes two; 0 for one perceptron

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.context, self.vocab) < 1:
            raise DaqError(f"each size must be 1 or more; got {self}.")
        if self.experts != 0 and self.experts < 2:
            raise DaqError(f"`experts` must be 0, or 2 and more, since each byte takes two; got {self}.")
        if self.width % (2 * self.heads):
            raise DaqError(
                f"`width` must be a multiple of 2 * `heads`, to rotate pairs within a head; got {self}."
            )


def rotate(x: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
    """Rotary positions (arXiv:2104.09864): turns pairs `(i, i + D/2)`, further at each place."""
    _, length, _, depth = x.shape
    speed = 10000.0 ** (-jnp.arange(depth // 2, dtype=x.dtype) / (depth // 2))
    angle = jnp.arange(length, dtype=x.dtype)[:, None, None] * speed
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Experts(nn.Module):
    """Two-layer perceptrons, of which each byte takes the two that a router prefers, by their softmax."""

    size: ModelSize

    @nn.compact
    def __call__(self, x: Float[Array, "B L width"]) -> Float[Array, "B L width"]:
        """The next hidden state, before it is added. All experts are computed: simple, for small models."""
        size, init = self.size, nn.initializers.lecun_normal(batch_axis=(0,))
        up = self.param("up_proj", init, (size.experts, size.width, 4 * size.width))
        down = self.param("down_proj", init, (size.experts, 4 * size.width, size.width))
        preferred = nn.Dense(size.experts, use_bias=False, name="router")(x)
        second = jax.lax.top_k(preferred, 2)[0][..., 1:]
        shares = jax.nn.softmax(jnp.where(preferred >= second, preferred, -jnp.inf), axis=-1)
        h = nn.gelu(jnp.einsum("blw,ewh->bleh", x, up)) * shares[..., None]
        return jnp.einsum("bleh,ehw->blw", h, down)


class Layer(nn.Module):
    """Attention to what came before, then a two-layer perceptron, each added to its input."""

    size: ModelSize

    @nn.compact
    def __call__(self, x: Float[Array, "B L width"]) -> Float[Array, "B L width"]:
        """The next hidden state."""
        size = self.size
        heads = (*x.shape[:2], size.heads, size.width // size.heads)

        h = nn.RMSNorm(name="attention_norm")(x)
        h = nn.Dense(3 * size.width, use_bias=False, name="qkv_proj")(h)
        query, key, value = (part.reshape(heads) for part in jnp.split(h, 3, axis=-1))
        h = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(size.width, use_bias=False, name="out_proj")(h)

        h = nn.RMSNorm(name="mlp_norm")(x)
        if size.experts:
            return x + Experts(size, name="experts")(h)
        h = nn.gelu(nn.Dense(4 * size.width, use_bias=False, name="up_proj")(h))
        return x + nn.Dense(size.width, use_bias=False, name="down_proj")(h)


class Decoder(nn.Module):
    """Bytes to the logits of each next byte, in the dtype of the weights."""

    size: ModelSize

    @nn.compact
    def __call__(self, text: UInt8[Array, "B L"]) -> Float[Array, "B L V"]:
        """The logits."""
        x = nn.Embed(self.size.vocab, self.size.width, name="embed")(text.astype(jnp.int32))
        for i in range(self.size.layers):
            x = Layer(self.size, name=f"layer_{i}")(x)
        x = nn.RMSNorm(name="final_norm")(x)
        return nn.Dense(self.size.vocab, use_bias=False, name="lm_head")(x)


@partial(jax.jit, static_argnames="size")
def make_params(size: ModelSize, key: Array) -> Params:
    """Fresh float32 weights."""
    return Decoder(size).init(key, jnp.zeros((1, size.context), jnp.uint8))["params"]


def to_dtype(params: Params, dtype: jnp.dtype | type) -> Params:
    """A copy of the weights in another dtype."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), params)


def next_byte_log_probs(size: ModelSize, params: Params, text: UInt8[Array, "B M"]) -> Float[Array, "B L V"]:
    """Log-probabilities of the byte after each of `text[:, :-1]`."""
    logits = typing.cast(Array, Decoder(size).apply({"params": params}, text[:, :-1]))
    return jax.nn.log_softmax(logits, axis=-1)


def losses(log_probs: Float[Array, "B L V"], text: UInt8[Array, "B M"]) -> Float[Array, "B L"]:
    """Nats that the true next bytes of `text` cost under `log_probs`."""
    true = text[:, 1:, None].astype(jnp.int32)
    return -jnp.take_along_axis(log_probs, true, axis=-1)[..., 0]


class TrainState(NamedTuple):
    """Weights and the running means of Adam, all float32."""

    params: Params
    adam: optax.OptState


# The first gradients can be huge, so they are clipped; runs are short, so the second mean forgets sooner.
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))


def start_training(params: Params) -> TrainState:
    """A state to train from: a float32 copy of the weights, and an optimizer that has seen nothing."""
    params = to_dtype(params, jnp.float32)
    return TrainState(params, ADAM.init(params))


def learning_rates(steps: int, peak: float, *, warmup: int) -> Float[Array, " S"]:
    """A linear rise to `peak` over `warmup` steps, then half a cosine down to zero. `0 < warmup < steps`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    return jnp.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(1.0, steps + 1)), jnp.float32)


@partial(jax.jit, static_argnames=("size", "batch"), donate_argnames="state")
def train(
    state: TrainState,
    text: UInt8[Array, " N"],
    rates: Float[Array, " S"],
    key: Array,
    *,
    size: ModelSize,
    batch: int,
    weights: Float[Array, " N"] | None = None,
) -> tuple[TrainState, Float[Array, " S"]]:
    """Takes one Adam step for each learning rate, in one compiled loop.

    Args:
        state: from `start_training`. Its buffers are reused: it cannot be used again.
        text: what to learn. Each sequence of a batch starts at a random place in it.
        rates: from `learning_rates`, or a slice of it.
        key: random key, for the places.
        size: of the model.
        batch: sequences in a step.
        weights: what the loss of each byte of `text` is multiplied by: below 0, the byte is unlearned by
            gradient ascent. None for 1 everywhere.

    Returns:
        The state after the last step, and the training loss before each.
    """

    def loss_of(params: Params, places: Array) -> Array:
        sequences = text[places]
        found = losses(next_byte_log_probs(size, params, sequences), sequences)
        return jnp.mean(found if weights is None else found * weights[places[:, 1:]])

    def step(state: TrainState, inputs: tuple[Array, Array]) -> tuple[TrainState, Array]:
        rate, step_key = inputs
        starts = jax.random.randint(step_key, (batch, 1), 0, len(text) - size.context)
        places = starts + jnp.arange(size.context + 1)
        loss, gradient = jax.value_and_grad(loss_of)(state.params, places)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, adam = ADAM.update(gradient, state.adam)
        params = jax.tree.map(lambda leaf, update: leaf - rate * update, state.params, updates)
        return TrainState(params, adam), loss

    return jax.lax.scan(step, state, (rates, jax.random.split(key, len(rates))))


def cut_windows(text: UInt8[Array, " N"], context: int) -> UInt8[Array, "B M"]:
    """Sequences in which each byte but the first is predicted once. An unfilled last sequence is dropped."""
    starts = jnp.arange((len(text) - 1) // context)[:, None] * context
    return text[starts + jnp.arange(context + 1)]


@partial(jax.jit, static_argnames=("size", "batch"))
def mean_loss(
    params: Params, text: UInt8[Array, " N"], *, size: ModelSize, batch: int = 32
) -> Float[Array, ""]:
    """Mean loss on a text, `batch` sequences at a time."""

    def one(window: Array) -> Array:
        return jnp.mean(losses(next_byte_log_probs(size, params, window[None]), window[None]))

    return jnp.mean(jax.lax.map(one, cut_windows(text, size.context), batch_size=batch))


@partial(jax.jit, static_argnames=("size", "batch"))
def mean_divergence(
    reference: Params, params: Params, text: UInt8[Array, " N"], *, size: ModelSize, batch: int = 32
) -> Float[Array, ""]:
    """Mean KL divergence on a text, from the next-byte distributions of `reference` to those of `params`."""

    def one(window: Array) -> Array:
        log_p = next_byte_log_probs(size, reference, window[None])
        return jnp.mean(kl_divergences(log_p, next_byte_log_probs(size, params, window[None])))

    return jnp.mean(jax.lax.map(one, cut_windows(text, size.context), batch_size=batch))
