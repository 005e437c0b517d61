"""Watch, while tuning, what quantization would keep: every few steps inside the jitted training step."""

import jax
import jax.numpy as jnp
import optax

import daq_jax as daq

EVERY = 20  # steps
recipes = {"absmax": daq.recipes.absmax, "unbiased": daq.Recipe(rounding=daq.UnbiasedGain())}
optimizer = optax.adam(1e-4)


def apply(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((apply(params, x) - y) ** 2)


def look(base: dict, params: dict, x: jax.Array, y: jax.Array) -> dict:
    """By recipe, the kept projection of the change and the loss of the quantized model."""
    found = {}
    for name, recipe in recipes.items():
        q = daq.quantize(base, params, recipe)
        found[name] = daq.compare(base, params, q).total.projection, loss(daq.dequantize(q), x, y)
    return found


@jax.jit
def step(i: jax.Array, base: dict, params: dict, state: tuple, x: jax.Array, y: jax.Array) -> tuple:
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
    params = optax.apply_updates(params, updates)
    nothing = {name: (jnp.float32(jnp.nan),) * 2 for name in recipes}
    seen = jax.lax.cond(
        i % EVERY == 0, lambda: look(base, params, x, y), lambda: nothing
    )  # both compiled once
    return params, state, loss(params, x, y), seen


keys = jax.random.split(jax.random.key(0), 4)
init = {
    "up": {"kernel": jax.random.normal(keys[0], (256, 512)) / 16},
    "down": {"kernel": jax.random.normal(keys[1], (512, 256)) / 22},
}
base = daq.dequantize(daq.quantize(init, init, daq.recipes.absmax))  # as a base that was shipped in FP8
x = jax.random.normal(keys[2], (64, 256))
y = apply(base, x) + 0.1 * jax.random.normal(keys[3], (64, 256))

params, state = base, optimizer.init(base)
for i in range(1, 61):
    params, state, value, seen = step(jnp.int32(i), base, params, state, x, y)
    if i % EVERY == 0:
        kept = ", ".join(f"{name}: projection {p:.2f}, loss {v:.4f}" for name, (p, v) in seen.items())
        print(f"step {i}: loss {value:.4f}; quantized by {kept}")
