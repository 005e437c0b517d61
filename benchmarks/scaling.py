"""How much faster are all GPUs of a host than one of them? Needs two or more.

    python benchmarks/scaling.py

One weight, sharded by rows, is quantized on one device and on all; codes and scales must agree, and the
program for all is searched for collectives. Writes `scaling_DEVICE.json`. On CPUs, devices share their cores:
`XLA_FLAGS=--xla_force_host_platform_device_count=2` and a small `--rows` only show that it runs.
"""

import argparse
import functools
import json
import pathlib
import re
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run
import workloads
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import daq_jax as daq

RECIPES = ("absmax", "paper_sign", "paper_cosine", "unbiased_gain")
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def measure(recipe: str, shape: tuple[int, int], devices: list[jax.Device], repeats: int) -> dict[str, Any]:
    """Seconds a call, alone and in a row; the collectives in the program; the result, to compare."""
    where = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x", None))
    base, tuned = (jax.device_put(x, where) for x in workloads.pair(shape))
    call = functools.partial(daq.quantize, base, tuned, run.RECIPES[recipe], rules=())
    ((_, program),) = run.compiled_by(call)
    times = run.seconds(call, repeats)
    queued = run.queued_seconds(functools.partial(call, check_finite=False), repeats)
    codes, scale = (
        np.asarray(x) for x in (jax.lax.bitcast_convert_type(call().codes, jnp.uint8), call().scale)
    )
    found = sorted(set(re.findall(COLLECTIVES, program.as_text())))
    seconds = {"seconds": statistics.median(times), "queued_seconds": queued}
    return seconds | {"collectives": found, "codes": codes, "scale": scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=run.HERE / "results")
    args = parser.parse_args()
    shape, devices, rows = (args.rows, args.columns), jax.local_devices(), []
    if len(devices) < 2:
        sys.exit("scaling.py needs two devices or more; there is one")
    for recipe in RECIPES:
        one, many = (measure(recipe, shape, some, args.repeats) for some in (devices[:1], devices))
        if not all(np.array_equal(one.pop(part), many.pop(part)) for part in ("codes", "scale")):
            sys.exit(f"{recipe}: WRONG: {len(devices)} devices give other codes or scales than one")
        faster = {f"times_faster_{name}": one[name] / many[name] for name in ("seconds", "queued_seconds")}
        rows.append({"recipe": recipe, "one": one, "all": many, **faster})
        print(json.dumps(rows[-1]), flush=True)
    report = run.environment() | {"devices": len(devices), "shape": shape, "rows": rows}
    report["command"] = " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    args.out.mkdir(parents=True, exist_ok=True)
    run.result_path("scaling", report, args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
