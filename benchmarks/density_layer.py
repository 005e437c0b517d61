"""What does density-aware 4-bit quantization of one large layer take in time and memory?

    python benchmarks/density_layer.py

Quantizes a `[4096, 4096]` kernel to nf4 in groups of 128, with the Gram matrix
of 2 x 512 random inputs. For each set of stages: the output's loss must be below that of the plain scales,
or the exit status is 1; then seconds, compilation apart, and the memory that the program needs beside its
arguments and results, in float32 copies of the layer. Writes `density_layer_DEVICE.json`.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import run

import daq_jax as daq
from daq_jax.density.grams import Grams, KernelInputs

RECIPES = {
    "stages 1, 2": daq.DensityRecipe(sweeps=0),
    "stages 1, 2, rounding": daq.DensityRecipe(),
    "stages 1, 2, rounding, row": daq.DensityRecipe(loss="row"),
}
PLAIN = daq.DensityRecipe(centre=None, adjust=None, sweeps=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--out", type=pathlib.Path, default=run.HERE / "results")
    args = parser.parse_args()
    size = args.size
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": 0.02 * jax.random.normal(keys[0], (size, size))}
    spread = jnp.exp(jax.random.normal(keys[1], (size,)))  # some inputs matter more, as in a model
    inputs = jax.random.normal(keys[2], (1024, size)) * spread
    gram = inputs.T @ inputs / len(inputs)
    grams = Grams({"kernel": gram}, (KernelInputs("kernel", (0,), size),), joint=True)

    def loss(recipe: daq.DensityRecipe) -> float:
        error = daq.quantize_density(params, grams, recipe)["kernel"].dequantize() - params["kernel"]
        return float(jnp.sum(error * (gram @ error)))

    report = run.environment() | {"size": size, "rows": []}
    report["command"] = f"python benchmarks/density_layer.py --size {size}"
    plain, repeats = loss(PLAIN), 3
    for name, recipe in RECIPES.items():
        if not loss(recipe) < plain:
            sys.exit(f"{name}: WRONG: the output's loss {loss(recipe):.6g} is not below {plain:.6g}")
        call = functools.partial(daq.quantize_density, params, grams, recipe)
        program = (
            jax.jit(functools.partial(daq.quantize_density, recipe=recipe)).lower(params, grams).compile()
        )
        row = {
            "stages": name,
            "loss_beside_plain": loss(recipe) / plain,
            "seconds": statistics.median(run.seconds(call, repeats)),
            "memory_in_layers": program.memory_analysis().temp_size_in_bytes / (4 * size**2),
        }
        report["rows"].append(row)
        print(row, flush=True)
    run.result_path("density_layer", report, args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
