"""Several processes on one machine stand for the hosts of a pod."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import daq_jax as daq
from tests.hf_folders import BF16

EXAMPLE = str(pathlib.Path(__file__).parents[1] / "examples" / "pod.py")
DEVICES = 8

# Each process checks its own shards against the whole weight, quantized on its first device alone.
CHECKS = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import daq_jax as daq
from daq_jax import leaves

address, processes, process, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(address, processes, process)
assert (jax.process_count(), jax.device_count()) == (processes, 8)
rng = np.random.default_rng(0)
base = rng.normal(0, 0.02, (256, 512)).astype(jnp.bfloat16)
tuned = (base.astype(np.float32) + rng.normal(0, 4e-4, base.shape).astype(np.float32)).astype(jnp.bfloat16)
alone = tuple({"w": jax.device_put(x, jax.local_devices()[0])} for x in (base, tuned))

def same(got, wanted):
    wanted = np.asarray(wanted)
    for shard in got.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(wanted[shard.index]).tobytes()

for axis_type in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("x", "y"), (axis_type,) * 2)
    sharding = NamedSharding(mesh, P("x", "y"))
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    pair = {"w": put(base)}, {"w": put(tuned)}
    for recipe in (daq.recipes.absmax, daq.recipes.paper_sign, daq.Recipe(tiling=daq.PerTensor())):
        q, wanted = daq.quantize(*pair, recipe), daq.quantize(*alone, recipe)
        (base_leaf,), (tuned_leaf,) = (tree.values() for tree in pair)
        program = leaves.lowered(base_leaf, tuned_leaf, recipe=recipe, matrix=((-2,), (-1,))).compile()
        collective = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        found = re.search(collective, program.as_text())
        assert (found is None) == (recipe.tiling == daq.Block()), found
        same(q["w"].codes, wanted["w"].codes)
        same(q["w"].scale, wanted["w"].scale)
        table, one = daq.compare(*pair, q).total, daq.compare(*alone, wanted).total
        np.testing.assert_allclose(table.projection, one.projection, rtol=1e-5)
    daq.save(f"{folder}/{axis_type}", {**q, "kept": pair[0]["w"], "step": 3})
    turned = NamedSharding(jax.make_mesh((4, 2), ("x", "y"), (axis_type,) * 2), P("y", "x"))
    loaded = daq.load(f"{folder}/{axis_type}", sharding=turned)
    assert loaded["w"].codes.sharding == turned and loaded["step"] == 3
    same(loaded["w"].codes, wanted["w"].codes)
    same(loaded["kept"], base)
    everywhere = daq.load(f"{folder}/{axis_type}")
    same(everywhere["w"].scale, wanted["w"].scale)
    same(daq.load_weights(f"{folder}/{axis_type}", {"kept": pair[0]["w"]})["kept"], base)
"""

# The victim is gone before the others save; the coordinator of JAX misses it after ten seconds.
DEATH = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import daq_jax as daq

address, process, folder, victim = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(address, 4, process, heartbeat_timeout_seconds=10)
rng = np.random.default_rng(0)
base = rng.normal(0, 0.02, (256, 512)).astype(jnp.bfloat16)
tuned = (base.astype(np.float32) + rng.normal(0, 4e-4, base.shape).astype(np.float32)).astype(jnp.bfloat16)
sharding = NamedSharding(jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2), P("x", "y"))
put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
q = jax.block_until_ready(daq.quantize({"w": put(base)}, {"w": put(tuned)}, daq.recipes.absmax))
if process == victim:
    os.kill(os.getpid(), signal.SIGKILL)
daq.save(f"{folder}/out", q)
"""


def run(processes, command):
    """Outputs of as many processes, each with its share of the devices; none of them fails."""
    found = ended(processes, command)
    for status, _, error in found:
        assert status == 0, error[-3000:]
    return [output for _, output, _ in found]


def ended(processes, command):
    """Exit status, output and messages of as many processes, each with its share of the devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, *command(address, process)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one_device_and_do_not_communicate_where_tiles_align(tmp_path, processes):
    run(processes, lambda address, i: ["-c", CHECKS, address, str(processes), str(i), str(tmp_path)])


@pytest.mark.slow
def test_the_example_gives_the_same_codes_on_one_two_and_four_processes(tmp_path):
    found = set()
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        words = ["--processes", str(processes), "--folder", str(folder)]
        outputs = run(
            processes,
            lambda address, i, words=words: [EXAMPLE, *words, "--coordinator", address, "--process", str(i)],
        )
        for output in outputs:
            (line,) = [x for x in output.splitlines() if x.startswith("process ")]
            found.add(line.partition("projection")[2])
    assert len(found) == 1
    codes, loaded = [part.split()[-1] for part in found.pop().split(",")[1:]]
    assert codes == loaded


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_the_same_call_saves_the_checkpoint(tmp_path):
    def command(victim):
        return lambda address, i: ["-c", DEATH, address, str(i), str(tmp_path), str(victim)]

    found = ended(4, command(victim=3))
    assert found.pop(3)[0] == -signal.SIGKILL
    for status, _, error in found:
        assert status != 0
        assert "Task 3 heartbeat timeout" in error
    assert not (tmp_path / "out").exists()
    run(4, command(victim=-1))
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, (256, 512)).astype(BF16)
    tuned = (base.astype(np.float32) + rng.normal(0, 4e-4, base.shape).astype(np.float32)).astype(BF16)
    loaded = daq.load(tmp_path / "out")["w"]
    wanted = daq.quantize({"w": base}, {"w": tuned}, daq.recipes.absmax)["w"]
    assert np.asarray(loaded.codes).tobytes() == np.asarray(wanted.codes).tobytes()
    assert np.asarray(loaded.scale).tobytes() == np.asarray(wanted.scale).tobytes()
