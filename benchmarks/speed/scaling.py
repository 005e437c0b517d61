"""How much faster are all GPUs of a host than one of them? Needs two or more.

    python -m benchmarks scaling

One weight, sharded by rows, is quantized on one device and on all; codes and scales must agree, and the
program for all is searched for collectives. Writes `scaling_DEVICE.json`. On CPUs, devices share their cores:
`--quick`, which makes two of them, only shows that it runs.
"""

import functools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import daq_jax as daq
from benchmarks import common, workloads
from benchmarks.speed.programs import compiled
from benchmarks.speed.study import RECIPES

COMPARED = ("absmax", "paper_sign", "paper_cosine", "unbiased_gain")
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def measure(recipe: str, shape: tuple[int, int], devices: list[jax.Device], repeats: int) -> dict[str, Any]:
    """Seconds a call, alone and in a row; the collectives in the program; the result, to compare."""
    where = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x", None))
    base, tuned = (jax.device_put(x, where) for x in workloads.pair(shape))
    call = functools.partial(daq.quantize, base, tuned, RECIPES[recipe], rules=())
    _, program = compiled(base, tuned, RECIPES[recipe])
    times = common.seconds(call, repeats)
    queued = common.queued_seconds(functools.partial(call, check_finite=False), repeats)
    codes, scale = (
        np.asarray(x) for x in (jax.lax.bitcast_convert_type(call().codes, jnp.uint8), call().scale)
    )
    found = sorted(set(re.findall(COLLECTIVES, program.as_text())))
    seconds = {"seconds": statistics.median(times), "queued_seconds": queued}
    return seconds | {"collectives": found, "codes": codes, "scale": scale}


def main(
    *,
    rows: int = 65536,
    columns: int = 16384,
    repeats: int = 10,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Times one device against all.

    Args:
        rows: of the weight, a multiple of 128 for each device.
        columns: of the weight.
        repeats: timed calls.
        out: folder for the results; None for `benchmarks/results`.
        quick: a small weight on two CPU devices, to see that it runs.
    """
    if quick:
        jax.config.update("jax_num_cpu_devices", 2)
        rows, columns, repeats = 512, 256, 2
    devices, found = jax.local_devices(), []
    if len(devices) < 2:
        raise SystemExit("scaling needs two devices or more; there is one")
    for recipe in COMPARED:
        sides = (devices[:1], devices)
        one, many = (measure(recipe, (rows, columns), some, repeats) for some in sides)
        if not all(np.array_equal(one.pop(part), many.pop(part)) for part in ("codes", "scale")):
            raise SystemExit(f"{recipe}: WRONG: {len(devices)} devices give other codes or scales than one")
        faster = {f"times_faster_{name}": one[name] / many[name] for name in ("seconds", "queued_seconds")}
        found.append({"recipe": recipe, "one": one, "all": many, **faster})
        print(json.dumps(found[-1]), flush=True)
    report = common.environment() | {"shape": (rows, columns), "rows": found}
    common.write(common.named("scaling", report, common.results(out, quick)), report)


COMMANDS = {"scaling": main}
