"""What the compiler of TPUs makes of our programs, where there is no TPU: memory, traffic, collectives, time.

    python -m benchmarks tpu [--topology v6e:2x2 ...] [--quick]

Needs the extra `tpu`, whose compiler (libtpu) works without a device. Nothing runs: all figures are the
compiler's own. Temporary memory and bytes accessed are for each weight, or each element, of one chip; a loop
counts once in the bytes, and its turns are not known in the cycles either, which are libtpu's own estimate.
A bfloat16 weight takes 2 bytes to read. Writes `tpu.json` and `.md`.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import daq_jax as daq
from benchmarks import common
from benchmarks.speed.collectives import collectives
from daq_jax.leaves import lowered
from daq_jax.tilings import DEFAULT_MATRIX

SHAPE, INPUTS = (4096, 14336), 16  # of a weight; rows of what it is multiplied with
ONE_CHIP = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
MESHES = ("v6e:2x2", "v5e:16x16")  # over both axes of a weight
LAYER = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "use_bias": False}
RECIPES = {
    "absmax": daq.recipes.absmax,
    "paper_cosine": daq.recipes.paper_cosine,
    "default": daq.recipes.default,
    "int4 group": daq.Recipe(
        format=daq.int4, tiling=daq.Group(128), search=daq.AbsMax(), rounding=daq.Nearest()
    ),
    "nf4 group": daq.Recipe(
        format=daq.nf4, tiling=daq.Group(128), search=daq.AbsMax(), rounding=daq.Nearest()
    ),
    "fp8 channel": daq.Recipe(tiling=daq.Channel(), search=daq.AbsMax(), rounding=daq.Nearest()),
}
_SETTINGS = {
    "JAX_PLATFORMS": "cpu",  # of what is run; libtpu only compiles
    "TPU_SKIP_MDS_QUERY": "1",  # asks no cloud what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock admits one process
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Found(NamedTuple):
    """What the compiler says of a program; sizes for each element of the weights that one chip holds."""

    temporary: float  # bytes
    accessed: float  # bytes
    cycles: int  # estimated
    code: float  # MB
    seconds: float  # of all processors, to compile
    sent: dict[str, int]  # bytes by kind of collective


def chips(topology: str) -> list[Any]:
    """The chips of a topology, which need not exist."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def has_compiler() -> bool:
    """Whether the extra `tpu` is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiled(program: jax.stages.Lowered, weights: int) -> Found:
    """Compiles a program.

    Args:
        program: lowered for TPUs.
        weights: how many of them one chip holds.
    """
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)  # whose programs no compiler alone can read
    compilation_cache.reset_cache()  # which remembers that it is used
    try:
        start = time.process_time()
        done = program.compile()
        seconds = time.process_time() - start
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()
    memory, cost, text = done.memory_analysis(), done.cost_analysis(), done.as_text()
    assert memory is not None
    assert text is not None
    return Found(
        round(memory.temp_size_in_bytes / weights, 2),
        round(cost["bytes accessed"] / weights, 2),
        sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)),
        round(memory.generated_code_size_in_bytes / 1e6, 2),
        round(seconds, 1),
        collectives(text),
    )


# --- Programs -----------------------------------------------------------------------------------------------


def on_one_chip(topology: str) -> SingleDeviceSharding:
    """The first chip of a topology."""
    return SingleDeviceSharding(chips(topology)[0])


def over_mesh(topology: str) -> NamedSharding:
    """Weights over both axes of a square mesh."""
    found = np.array(chips(topology))
    side = math.isqrt(len(found))
    return NamedSharding(Mesh(found.reshape(side, side), ("x", "y")), PartitionSpec("x", "y"))


def quantizing(recipe: str, where: Any) -> jax.stages.Lowered:
    """The program that quantizes one weight."""
    like = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=where)
    one = isinstance(where, SingleDeviceSharding)
    return lowered(like, like, recipe=RECIPES[recipe], matrix=DEFAULT_MATRIX, one_device=one)


def _quantized(recipe: str) -> Any:
    """A QTensor of shapes."""
    like = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    return jax.eval_shape(lambda w: daq.quantize({"w": w}, {"w": w}, RECIPES[recipe])["w"], like)


def _dequantize(recipe: str, x: Any) -> tuple[Callable[..., Any], tuple]:
    return (lambda q: q.dequantize(jnp.bfloat16)), (_quantized(recipe),)


def _dot(recipe: str, x: Any) -> tuple[Callable[..., Any], tuple]:
    return daq.dot, (x, _quantized(recipe))


def _bfloat16(recipe: str, x: Any) -> tuple[Callable[..., Any], tuple]:
    return (lambda x, w: jnp.dot(x, w)), (x, jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16))


def _linen(recipe: str, x: Any) -> tuple[Callable[..., Any], tuple]:
    module = nn.Dense(SHAPE[1], **LAYER)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    boxed = jax.eval_shape(lambda v: daq.linen_variables(daq.quantize(v, v, RECIPES[recipe])), variables)
    return module.apply, (boxed, x)


def _nnx(recipe: str, x: Any) -> tuple[Callable[..., Any], tuple]:
    model, graphs = nnx.eval_shape(lambda: nnx.Linear(*SHAPE, rngs=nnx.Rngs(0), **LAYER)), []

    def build(state: Any) -> Any:
        graph, new = nnx.split(daq.nnx_with(model, daq.quantize(state, state, RECIPES[recipe])))
        graphs.append(graph)
        return new

    state = jax.eval_shape(build, nnx.state(model))
    return (lambda state, x: nnx.merge(graphs[0], state)(x)), (state, x)


USES = {"bfloat16": _bfloat16, "dequantize": _dequantize, "dot": _dot, "Linen": _linen, "NNX": _nnx}


def using(use: str, recipe: str, where: Any) -> jax.stages.Lowered:
    """The program that computes with one quantized weight."""
    function, like = USES[use](recipe, jax.ShapeDtypeStruct((INPUTS, SHAPE[0]), jnp.bfloat16))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), like)
    return jax.jit(function).lower(*like)


# --- The table ----------------------------------------------------------------------------------------------


def main(topology: tuple[str, ...] = ONE_CHIP, quick: bool = False, out: Path | None = None) -> int:
    """Compiles the programs and writes the table.

    Args:
        topology: whose first chip programs are compiled for, such as v6e:2x2.
        quick: AbsMax and products on one kind of chip.
        out: folder for the results.
    """
    if not has_compiler():
        print("no libtpu here: pip install 'daq-jax[tpu]'")
        return 2
    weights, rows = math.prod(SHAPE), []

    def note(chip: str, what: str, program: Callable[[], jax.stages.Lowered], held: int = weights) -> None:
        found = compiled(program(), held)
        rows.append({"topology": chip, "program": what, **found._asdict()})
        print(rows[-1], flush=True)

    for chip in topology[:1] if quick else topology:
        where = on_one_chip(chip)
        for recipe in ["absmax"] if quick else RECIPES:
            if recipe != "default" or chip.startswith("v6e"):  # minutes
                note(chip, f"quantize, {recipe}", lambda r=recipe, w=where: quantizing(r, w))
        note(chip, "product, bfloat16", lambda w=where: using("bfloat16", "", w))
        for use, recipe in [
            ("dequantize", "absmax"),
            *((u, r) for u in ("dot", "Linen", "NNX") for r in ("absmax", "int4 group", "nf4 group")),
        ]:
            note(chip, f"{use}, {recipe}", lambda u=use, r=recipe, w=where: using(u, r, w))
    for mesh in () if quick else MESHES:
        where = over_mesh(mesh)
        held = weights // where.num_devices
        for recipe in ("absmax", "paper_cosine"):
            note(f"{mesh}, sharded", f"quantize, {recipe}", lambda r=recipe, w=where: quantizing(r, w), held)
    report = {**common.environment(), "shape": SHAPE, "inputs": INPUTS, "rows": rows}
    common.write(common.results(out, quick) / "tpu.json", report, markdown(report))
    return 0


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    heads = (
        "topology",
        "program",
        "temporary bytes",
        "bytes accessed",
        "million cycles",
        "MB of code",
        "CPU s to compile",
        "sent",
    )
    rows = [
        (
            row["topology"],
            row["program"],
            row["temporary"],
            row["accessed"],
            round(row["cycles"] / 1e6, 2),
            row["code"],
            row["seconds"],
            ", ".join(f"{kind} {n}" for kind, n in row["sent"].items()) or "nothing",
        )
        for row in report["rows"]
    ]
    shape = " x ".join(map(str, report["shape"]))
    opening = (
        f"# TPUs, by their compiler\n\nOne weight of {shape}, bfloat16 before it is quantized, and "
        f"{report['inputs']} rows to multiply with it. Compiled ahead of time; nothing was run on a TPU."
    )
    return f"{opening}\n\n{common.table(heads, rows)}\n\n{common.provenance(report)}\n"


COMMANDS = {"tpu": main}
