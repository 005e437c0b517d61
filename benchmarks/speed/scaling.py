"""How much faster are 2, 4 or 8 GPUs of a host than one of them? Needs two or more.

    python -m benchmarks scaling

Strong scaling: one weight, sharded over its outputs, its inputs or both, and the matrices of some layers of
Llama 7B, each sharded over its outputs. Weak scaling: a stack of experts that grows with the devices, sharded
over experts. Codes and scales must be those of one device: bit for bit for recipes that go tile by tile, and
`ALIKE` of the codes for the default, whose products of matrices round by their shape. Beside the times stand
the bytes that the compiled program sends between devices. Then two layers run on codes in tensor parallelism,
and at last the sharded result goes through Orbax.
Writes `scaling_DEVICE.json` and `.md`. On CPUs, devices share their cores: `--quick`, which makes two of
them, only shows that it runs.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import daq_jax as daq
from benchmarks import common, workloads
from benchmarks.speed.collectives import collectives
from benchmarks.speed.programs import compiled
from benchmarks.speed.study import RECIPES, Tree

COMPARED = ("absmax", "paper_cosine", "unbiased_gain", "default")
WHOLE = ("default",)  # recipes that see whole matrices
RATES = ("save_gb_per_s", "load_gb_per_s")
PARTS = ("quantize", "forward", "orbax")
ALIKE = 0.998  # share of codes; the libraries of a GPU differ by as much from run to run


class Case(NamedTuple):
    """A workload, how it is sharded, and whether it grows with the devices.

    Attributes:
        name: for the table.
        shapes: of the leaves.
        spec: axis names of the mesh, for each axis of a weight.
        grows: the first axis is multiplied by the number of devices.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    spec: tuple[str | None, ...]
    grows: bool = False


def cases(rows: int, columns: int, layers: int, experts: int) -> list[Case]:
    """All that is measured."""
    one = {"kernel": (rows, columns)}
    llama = workloads.WORKLOADS["llama_7b"].shapes
    some = {path: shape for path, shape in llama.items() if int(path.partition("/")[0]) < layers}
    stack = {"experts": (experts, 2048, 1408)}
    return [
        Case("one weight, over outputs", one, (None, "xy")),
        Case("one weight, over inputs", one, ("xy", None)),
        Case("one weight, over both", one, ("x", "y")),
        *([Case(f"{layers} layers of Llama 7B, over outputs", some, (None, "xy"))] if layers else []),
        *([Case(f"{experts} experts a device", stack, ("xy", None, None), grows=True)] if experts else []),
    ]


def placed(case: Case, devices: list[jax.Device]) -> tuple[Tree, Tree]:
    """The pair of a case on some devices."""
    side = 2 if len(devices) > 1 else 1
    mesh = Mesh(np.array(devices).reshape(-1, side), ("x", "y"))
    spec = PartitionSpec(*(("x", "y") if axis == "xy" else axis for axis in case.spec))
    base, tuned = {}, {}
    for path, shape in case.shapes.items():
        times = len(devices) if case.grows else 1  # the same experts again on each device
        base[path], tuned[path] = (
            jax.device_put(np.concatenate([x] * times), NamedSharding(mesh, spec))
            for x in workloads.pair(shape)
        )
    return base, tuned


class Result(NamedTuple):
    """Codes and scales on the host, to compare."""

    codes: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


def measure(
    case: Case, recipe: str, devices: list[jax.Device], repeats: int
) -> tuple[dict[str, Any], Result]:
    """One row of the table, and the first leaf's result."""
    base, tuned = placed(case, devices)
    call = functools.partial(daq.quantize, base, tuned, RECIPES[recipe], rules=())
    path = next(iter(base))
    sent = collectives(compiled(base[path], tuned[path], RECIPES[recipe])[1].as_text())
    q = call()[path]
    result = Result(
        {path: np.asarray(jax.lax.bitcast_convert_type(q.codes, jnp.uint8))}, {path: np.asarray(q.scale)}
    )
    del q
    times = common.seconds(call, repeats)
    queued = common.queued_seconds(functools.partial(call, check_finite=False), repeats)
    elements = sum(x.size for x in base.values())
    row = {"case": case.name, "recipe": recipe, "devices": len(devices), "elements": elements}
    return row | {"seconds": statistics.median(times), "queued_seconds": queued, "sent_bytes": sent}, result


def check(row: dict[str, Any], one: Result, many: Result) -> dict[str, float]:
    """Holds the result of many devices against that of one.

    Raises:
        SystemExit: with what differs.
    """
    path = next(iter(one.codes))
    share = float(np.mean(one.codes[path] == many.codes[path]))
    scales = np.array_equal(one.scales[path], many.scales[path])
    tile_local = row["recipe"] not in WHOLE
    if not scales or share < (1 if tile_local else ALIKE) or (tile_local and row["sent_bytes"]):
        raise SystemExit(f"{row}: WRONG: {share:.5f} of the codes are those of one device, scales {scales}")
    return {"codes_alike": share}


def through_orbax(case: Case, devices: list[jax.Device]) -> dict[str, Any]:
    """Saves and loads a sharded result."""
    base, tuned = placed(case, devices)
    q = jax.block_until_ready(daq.quantize(base, tuned, daq.recipes.absmax, rules=()))
    size = sum(x.nbytes for x in jax.tree.leaves(q))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        daq.save(Path(folder) / "q", q)
        saved = time.perf_counter()
        again = jax.block_until_ready(daq.load(Path(folder) / "q", q))
        loaded = time.perf_counter()
    same = all(bool(jnp.all(a == b)) for a, b in zip(*map(jax.tree.leaves, (q, again)), strict=True))
    if not same:
        raise SystemExit("WRONG: what Orbax gives back is not what was saved")
    rates = dict(zip(RATES, (size / (saved - start) / 1e9, size / (loaded - saved) / 1e9), strict=True))
    return {"devices": len(devices), "bytes": size, **rates}


def forward(columns: int, devices: list[jax.Device], repeats: int) -> dict[str, Any]:
    """Two layers of a quantized model, `columns` to four times as many and back, in tensor parallelism."""
    mesh = Mesh(np.array(devices), ("x",))
    place = functools.partial(NamedSharding, mesh)
    specs = {"up": PartitionSpec(None, "x"), "down": PartitionSpec("x", None)}
    shapes = {"up": (columns, 4 * columns), "down": (4 * columns, columns)}
    tree = {name: jax.device_put(workloads.pair(shapes[name])[1], place(specs[name])) for name in specs}
    q = daq.quantize(tree, tree, daq.recipes.absmax, rules=())
    x = jax.device_put(jnp.ones((64, columns), jnp.bfloat16), place(PartitionSpec()))

    @jax.jit
    def layers(q: Tree, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(daq.dot(x, q["up"]))
        return daq.dot(hidden, q["down"], out_sharding=place(PartitionSpec()))

    sent = collectives(layers.lower(q, x).compile().as_text())
    result = np.asarray(layers(q, x), np.float32)
    times = common.seconds(lambda: layers(q, x), repeats)
    row = {"devices": len(devices), "seconds": statistics.median(times), "sent_bytes": sent}
    return row | {"size": float(np.linalg.norm(result))}


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "case": lambda r: r["case"],
    "recipe": lambda r: r["recipe"],
    "devices": lambda r: str(r["devices"]),
    "ms": lambda r: f"{1e3 * r['seconds']:.3g}",
    "ms, queued": lambda r: f"{1e3 * r['queued_seconds']:.3g}",
    "times one device": lambda r: f"{r['times_faster']:.2f}",
    "queued": lambda r: f"{r['times_faster_queued']:.2f}",
    "MB sent a device": lambda r: f"{sum(r['sent_bytes'].values()) / 1e6:.3g}",
    "codes of one device": lambda r: f"{r['codes_alike']:.4%}",
}


def faster(row: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """Elements a second, over those of one device."""
    more = row["elements"] / one["elements"]
    return {
        "times_faster": more * one["seconds"] / row["seconds"],
        "times_faster_queued": more * one["queued_seconds"] / row["queued_seconds"],
    }


def compared(
    case: Case, recipe: str, devices: list[jax.Device], counts: list[int], repeats: int
) -> list[dict[str, Any]]:
    """The rows of a case and a recipe, one for each number of devices; the first number is 1."""
    rows: list[dict[str, Any]] = []
    reference = None
    for n in counts:
        row, result = measure(case, recipe, devices[:n], repeats)
        if case.grows:  # other experts on more devices: the first are those of one device
            one = len(next(iter(result.codes.values()))) // n
            result = Result(*({p: x[:one] for p, x in part.items()} for part in result))
        reference = reference or result
        rows.append(row | check(row, reference, result) | faster(row, rows[0] if rows else row))
        print(" ".join(cell(rows[-1]) for cell in COLUMNS.values()), flush=True)
    return rows


def table_of(report: dict[str, Any]) -> str:
    """The parts that were run, as tables."""
    found = []
    if report["rows"]:
        found.append(common.table(COLUMNS, ([cell(r) for cell in COLUMNS.values()] for r in report["rows"])))
    if rows := report.get("forward"):
        heads = ("devices", "ms of two layers", "times one device", "MB sent a device")
        cells = (
            [
                str(r["devices"]),
                f"{1e3 * r['seconds']:.3g}",
                f"{rows[0]['seconds'] / r['seconds']:.2f}",
                f"{sum(r['sent_bytes'].values()) / 1e6:.3g}",
            ]
            for r in rows
        )
        found.append(common.table(heads, cells))
    if rows := report["orbax"]:
        heads = ("devices", "GB", "saved, GB/s", "loaded, GB/s")
        cells = (
            [str(r["devices"]), f"{r['bytes'] / 1e9:.3g}", *(f"{r[k]:.3g}" for k in RATES)] for r in rows
        )
        found.append(common.table(heads, cells))
    return "\n\n".join(found) + "\n"


def main(
    *,
    rows: int = 65536,
    columns: int = 16384,
    layers: int = 8,
    experts: int = 16,
    repeats: int = 10,
    recipe: tuple[str, ...] = COMPARED,
    parts: tuple[Literal[*PARTS], ...] = PARTS,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Times one device against 2, 4 and 8.

    Args:
        rows: inputs of the weight, a multiple of 128 for each device.
        columns: outputs of the weight.
        layers: of the Llama of 7B parameters, from 0 to 32.
        experts: for each device.
        repeats: timed calls.
        recipe: recipes by name.
        parts: what is run; of some of them the files are called `scaling_DEVICE_PARTS`.
        out: folder for the results; None for `benchmarks/results`.
        quick: small weights on two CPU devices, to see that it runs.
    """
    if quick:
        jax.config.update("jax_num_cpu_devices", 2)
        rows, columns, layers, experts, repeats = 512, 512, 0, 0, 2
    devices = jax.local_devices()
    if len(devices) < 2:
        raise SystemExit("scaling needs two devices or more; there is one")
    counts = [n for n in (1, 2, 4, 8) if n <= len(devices)]
    report = common.environment() | {"shape": (rows, columns), "rows": [], "orbax": []}
    kind = "scaling" if parts == PARTS else f"scaling_{'_'.join(parts)}"
    name = common.named(kind, report, common.results(out, quick))
    if "quantize" in parts:
        for case in cases(rows, columns, layers, experts):
            for recipe_name in recipe:
                report["rows"] += compared(case, recipe_name, devices, counts, repeats)
                common.write(name, report, table_of(report))
    if "forward" in parts:
        report["forward"] = [forward(columns, devices[:n], repeats) for n in counts]
        sizes = [row["size"] for row in report["forward"]]
        if not np.allclose(sizes, sizes[0], rtol=1e-2):
            raise SystemExit(f"WRONG: the outputs of the layers have the norms {sizes}")
    if "orbax" in parts:
        for n in counts:
            report["orbax"].append(through_orbax(cases(rows, columns, 0, 0)[0], devices[:n]))
    common.write(name, report, table_of(report))


COMMANDS = {"scaling": main}
