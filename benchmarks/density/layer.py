"""What does density-aware 4-bit quantization of one large layer take in time and memory?

    python -m benchmarks density_layer

Quantizes a `[4096, 4096]` kernel to nf4 in groups of 128, with the Gram matrix
of 2 x 512 random inputs. For each set of stages: the output's loss must be below that of the plain scales,
or the exit status is 1; then seconds, compilation apart, and the memory that the program needs beside its
arguments and results, in float32 copies of the layer. Writes `density_layer_DEVICE.json`.
"""

import functools
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp

import daq_jax as daq
from benchmarks import common
from daq_jax.density.grams import Grams, KernelInputs

RECIPES = {
    "stages 1, 2": daq.DensityRecipe(sweeps=0),
    "stages 1, 2, rounding": daq.DensityRecipe(),
    "stages 1, 2, rounding, row": daq.DensityRecipe(loss="row"),
}
PLAIN = daq.DensityRecipe(centre=None, adjust=None, sweeps=0)


def main(*, size: int = 4096, out: Path | None = None, quick: bool = False) -> None:
    """Times one layer.

    Args:
        size: inputs and outputs of the layer.
        out: folder for the results; None for `benchmarks/results`.
        quick: a layer of 256 inputs, to see that it runs.
    """
    size = 256 if quick else size
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": 0.02 * jax.random.normal(keys[0], (size, size))}
    spread = jnp.exp(jax.random.normal(keys[1], (size,)))  # some inputs matter more, as in a model
    inputs = jax.random.normal(keys[2], (1024, size)) * spread
    gram = inputs.T @ inputs / len(inputs)
    grams = Grams({"kernel": gram}, (KernelInputs("kernel", (0,), size),), joint=True)

    def loss(recipe: daq.DensityRecipe) -> float:
        error = daq.quantize_density(params, grams, recipe)["kernel"].dequantize() - params["kernel"]
        return float(jnp.sum(error * (gram @ error)))

    report = common.environment() | {"size": size, "rows": []}
    plain, repeats = loss(PLAIN), 3
    for name, recipe in RECIPES.items():
        if not loss(recipe) < plain:
            raise SystemExit(f"{name}: WRONG: the output's loss {loss(recipe):.6g} is not below {plain:.6g}")
        call = functools.partial(daq.quantize_density, params, grams, recipe)
        program = (
            jax.jit(functools.partial(daq.quantize_density, recipe=recipe)).lower(params, grams).compile()
        )
        row = {
            "stages": name,
            "loss_beside_plain": loss(recipe) / plain,
            "seconds": statistics.median(common.seconds(call, repeats)),
            "memory_in_layers": program.memory_analysis().temp_size_in_bytes / (4 * size**2),
        }
        report["rows"].append(row)
        print(row, flush=True)
    common.write(common.named("density_layer", report, common.results(out, quick)), report)


COMMANDS = {"density_layer": main}
