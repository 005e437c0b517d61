"""A LoRA tune of a Flax NNX model that ships in FP8: watched while it is trained, merged, quantized, run."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import daq_jax as daq


class MLP(nnx.Module):
    """Two layers, each beside a low-rank pair."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.LoRALinear(256, 512, lora_rank=32, rngs=rngs)
        self.down = nnx.LoRALinear(512, 256, lora_rank=32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The outputs."""
        return self.down(nnx.gelu(self.up(x)))


model = MLP(nnx.Rngs(0))
shipped = daq.quantize(nnx.state(model, nnx.Param), nnx.state(model, nnx.Param), daq.recipes.absmax)
nnx.update(model, daq.dequantize(shipped))  # a model that was shipped in FP8
base = jax.tree.map(jnp.array, nnx.state(model))

# What it is to learn: the same, with its outputs slightly mixed.
x = jax.random.normal(jax.random.key(1), (1024, 256))
mixed = jnp.eye(256) + 0.2 * jnp.outer(*jax.random.normal(jax.random.key(2), (2, 256))) / 16
goal = model(x) @ mixed
optimizer = nnx.Optimizer(model, optax.adam(2e-4), wrt=nnx.LoRAParam)


@nnx.jit
def step(model: MLP, optimizer: nnx.Optimizer) -> jax.Array:
    """One step on the pairs alone; returns the loss before it."""
    pairs = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - goal) ** 2), argnums=pairs)(model)
    optimizer.update(model, gradient)
    return loss


@jax.jit
def kept(base: nnx.State, now: nnx.State) -> dict[str, dict[str, jax.Array]]:
    """What quantizing now would keep of the change, by recipe."""
    before, after = daq.merge(base, now)
    recipes = {"default": daq.recipes.default, "AbsMax": daq.recipes.absmax}
    return {
        name: daq.compare(before, after, daq.quantize(before, after, recipe)).total.to_dict()
        for name, recipe in recipes.items()
    }


for i in range(301):
    loss = step(model, optimizer)
    if i % 100 == 0:
        shares = {
            name: f"{figures['projection']:.2f}" for name, figures in kept(base, nnx.state(model)).items()
        }
        print(f"step {i}: loss {loss:.2e}, share of the change kept {shares}")

before, after = daq.merge(base, nnx.state(model))
quantized = daq.quantize(before, after)
for name, weights in {"base": before, "tuned": after, "quantized": quantized}.items():
    print(f"{name}: loss {jnp.mean((daq.nnx_with(model, weights)(x) - goal) ** 2):.2e}")
