"""Quantize on several hosts: every process holds its own shards of the weights, the codes and the checkpoint.

    python examples/pod.py                                                        # one process
    python examples/pod.py --coordinator HOST:PORT --processes 2 --process 0 --folder SHARED  # on one host
    python examples/pod.py --coordinator HOST:PORT --processes 2 --process 1 --folder SHARED  # on the other

On a TPU pod and under Slurm, `jax.distributed.initialize()` finds the first three by itself.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import daq_jax as daq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--coordinator", default="127.0.0.1:12357", help="address of process 0")
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0, help="number of this process")
parser.add_argument("--folder", help="where all processes can write; a temporary one if there is one process")
args = parser.parse_args()
if args.processes > 1:  # before anything else of JAX
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
folder = pathlib.Path(args.folder or tempfile.mkdtemp())


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2)


# Weights that are made, or loaded by `daq.load_weights(path, sharding=...)`, right where they belong.
devices = jax.device_count()
sharding = NamedSharding(mesh_of(devices, 1), PartitionSpec("data", "model"))


@jax.jit(out_shardings=sharding)
def weights(seed: int) -> dict:
    keys = dict(zip(("up", "down"), jax.random.split(jax.random.key(seed)), strict=True))
    return {name: jax.random.normal(key, (1024, 512), jnp.bfloat16) for name, key in keys.items()}


base = weights(0)
base = daq.dequantize(daq.quantize(base, base, daq.recipes.absmax))  # as a base that was shipped in FP8
tuned = jax.jit(lambda w, tune: jax.tree.map(lambda w, t: w + 0.01 * t, w, tune))(base, weights(1))
# Choices within a tile need no communication where shards are whole tiles of 128 by 128.
q = daq.quantize(base, tuned, daq.Recipe(rounding=daq.UnbiasedGain()))
table = daq.compare(base, tuned, q)  # figures of all shards, the same in every process

daq.save(folder / "quantized", q)  # each process writes its shards
other = NamedSharding(mesh_of(1, devices), PartitionSpec("data", "model"))
loaded = daq.load(folder / "quantized", sharding=other)  # and reads those that it needs on another mesh


@jax.jit
def fingerprint(q: dict) -> jax.Array:
    """One number from all codes, the same however they are sharded."""
    bits = [jax.lax.bitcast_convert_type(x.codes, jnp.uint8).astype(jnp.uint32) for x in q.values()]
    return sum(
        jnp.sum(b.ravel() * (jnp.arange(b.size, dtype=jnp.uint32) + 7), dtype=jnp.uint32) for b in bits
    )


print(
    f"process {jax.process_index()} of {jax.process_count()}, "
    f"{jax.local_device_count()} of {devices} devices: "
    f"projection {table.total.projection:.3f}, codes {int(fingerprint(q)):08x}, "
    f"loaded onto another mesh {int(fingerprint(loaded)):08x}"
)
