"""Four bits by density: calibrate a Flax model, and quantize it by what its layers put out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import daq_jax as daq


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name="down")(nn.gelu(nn.Dense(256, name="up")(x)))


model = Mlp()
batches = [0.3 + jax.random.normal(jax.random.key(i), (64, 128)) for i in range(4)]
params = model.init(jax.random.key(9), batches[0])["params"]

grams = daq.calibrate(model, params, batches, joint=True)  # no activation is kept
q = daq.quantize_density(params, grams, daq.DensityRecipe(format=daq.nf4, group=128, loss="row"))
print(q["up"]["kernel"].codes.dtype, q["up"]["kernel"].zero.shape)

recipe = daq.Recipe(format=daq.nf4, tiling=daq.Group(128), search=daq.AbsMax())
nearest = daq.quantize(params, params, recipe)
wanted = model.apply({"params": params}, batches[0])
for name, tree in (("nearest", nearest), ("density", q)):
    got = model.apply({"params": daq.dequantize(tree)}, batches[0])
    print(name, float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)))
