"""The memory that folder jobs take beside what their plans promise, on shapes and recipes drawn at random."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

from benchmarks import common
from benchmarks.folders.models import Model
from daq_jax.io.hf.tensor_files import TensorSpec

LLAMA = {"model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 32000}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
ANY = ("fp8-channel", "int8-channel")  # of formats, those that take any shape
ALL = (*ANY, "fp8-block", "int4-group", "mxfp4", "mxfp8", "nvfp4")
# Elements of the largest matrix: of a recipe that takes a second for so many, and of one that takes long.
QUICK, SLOW = 2**24, 2**21
RECIPES = {"absmax": QUICK, "mse": SLOW, "default": SLOW, "paper_cosine": SLOW}


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder job.

    Attributes:
        kind: what is special about its shapes, one of `KINDS`.
        model: the tuned model and its base.
        recipe: by name.
        format: as of `daq-jax quantize`; of "as-base FORMAT", the base is first written in that format.
        memory: GB, for `--memory` of the command.
    """

    kind: str
    model: Model
    recipe: str
    format: str
    memory: float


def spec(dtype: str, *shape: int) -> TensorSpec:
    """A tensor."""
    return TensorSpec(dtype, shape)


def layers(draw: random.Random, sizes: list[tuple[int, int]], dtypes: tuple[str, ...] = ("BF16",)) -> Model:
    """One matrix for each layer."""
    names = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(len(sizes)))
    return Model({n: spec(draw.choice(dtypes), *s) for n, s in zip(names, sizes, strict=True)}, LLAMA)


def near(draw: random.Random, size: float, step: int) -> int:
    """A multiple of `step`, by a fifth more or less than `size`."""
    return max(1, round(size * draw.uniform(0.8, 1.2) / step)) * step


def square(draw: random.Random, most: int) -> Model:
    """Matrices of several sizes."""
    side = math.sqrt(most)
    return layers(draw, [(near(draw, side, 128), near(draw, side, 128)) for _ in range(4)])


def odd(draw: random.Random, most: int) -> Model:
    """Matrices of which no size is round."""
    side = math.sqrt(most)
    return layers(draw, [(near(draw, side, 2) + 1, near(draw, side, 2) + 1) for _ in range(3)])


def tall(draw: random.Random, most: int) -> Model:
    """Many outputs of few inputs."""
    return layers(draw, [(near(draw, most / 128, 128), 128) for _ in range(3)])


def wide(draw: random.Random, most: int) -> Model:
    """Few outputs of many inputs."""
    return layers(draw, [(rows, near(draw, most / rows, 128)) for rows in (2, 3, 8)])


def one_row(draw: random.Random, most: int) -> Model:
    """Tensors of one row, which are kept, beside a small matrix."""
    return layers(draw, [(1, near(draw, 2 * most, 2)), (512, 512), (1, near(draw, most, 2))])


def experts(draw: random.Random, most: int) -> Model:
    """Many experts, a matrix each."""
    found, (outputs, inputs) = {}, (near(draw, 768, 128), near(draw, 1024, 128))
    for e in range(4 * most // (outputs * inputs)):
        block = f"model.layers.0.mlp.experts.{e}"
        found[f"{block}.up_proj.weight"] = spec("BF16", outputs, inputs)
        found[f"{block}.down_proj.weight"] = spec("BF16", inputs, outputs)
    return Model(found, LLAMA)


def tiny(draw: random.Random, most: int) -> Model:
    """Tens of thousands of tensors of a few elements, beside a matrix."""
    names = (
        f"model.layers.{i}.{'block.' * draw.randrange(1, 9)}bias"
        for i in range(draw.randrange(10**4, 3 * 10**4))
    )
    return Model({name: spec("BF16", 4) for name in names} | square(draw, most).tensors, LLAMA)


def mixed(draw: random.Random, most: int) -> Model:
    """Matrices of several dtypes."""
    side = math.sqrt(most)
    sizes = [(near(draw, side, 128), near(draw, side, 128)) for _ in range(4)]
    return layers(draw, sizes, ("BF16", "F32", "F16"))


def kept(draw: random.Random, most: int) -> Model:
    """A large head in FP8, which is kept, and is written in bfloat16."""
    rows, columns = near(draw, 24000, 128), near(draw, 4096, 128)
    head = {
        "lm_head.weight": spec("F8_E4M3", rows, columns),
        "lm_head.weight_scale_inv": spec("F32", rows // 128, columns // 128),
    }
    return Model(head | square(draw, most // 2).tensors, LLAMA | FP8)


KINDS: dict[str, tuple[Callable[[random.Random, int], Model], tuple[str, ...]]] = {
    "square": (square, ALL),
    "odd": (odd, ANY),
    "tall": (tall, ALL),
    "wide": (wide, ANY),
    "one row": (one_row, ALL),
    "experts": (experts, ALL),
    "tiny": (tiny, ALL),
    "mixed dtypes": (mixed, ALL),
    "kept FP8": (kept, ALL),
    "coded base": (
        square,
        tuple(f"as-base {word}" for word in ("fp8-block", "int4-group", "mxfp4", "nvfp4")),
    ),
}


def cases(count: int, seed: int = 0) -> list[Case]:
    """So many cases, of all kinds in turn."""
    draw, found = random.Random(seed), []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        make, formats = KINDS[kind]
        recipe = "absmax" if i < len(KINDS) else draw.choice(list(RECIPES))
        memory = draw.choice((1.2, 3.0)) if kind in ("square", "tall", "odd", "mixed dtypes") else 3.0
        model = make(draw, RECIPES[recipe])
        memory = max(memory, 1.5) if recipe == "default" else memory  # its matrices do not fit less
        found.append(Case(kind, model, recipe, draw.choice(formats), memory))
    return found


def markdown_of(report: dict[str, Any]) -> str:
    """The table."""
    heads = ("shapes", "recipe", "format", "--memory, GB", "tensors", "largest", "tuned, MB")
    heads += ("promise, MB", "peak, MB", "promise / peak")
    rows = []
    for job in report["jobs"]:
        words = [job[key] for key in ("kind", "recipe", "format", "memory_gb", "tensors")]
        sizes = [f"{job[key]:.0f}" for key in ("tuned_mb", "promise_mb", "peak_mb")]
        largest = " x ".join(map(str, job["largest"]))
        rows.append([*words, largest, *sizes, f"{job['promise / peak']:.2f}"])
    ratios = [job["promise / peak"] for job in report["jobs"]]
    above, close = sum(r < 1 for r in ratios), sum(1 <= r <= 1.15 for r in ratios)
    words = (
        f"Of {len(ratios)} jobs, {above} took more memory than the plan promised. The promise was at most "
        f"15 % above the peak in {close}, and {max(ratios):.2f} times the peak at most. Both count the whole "
        "process, interpreter and JAX included."
    )
    body = common.table(heads, rows)
    return f"# Promised and measured memory\n\n{words}\n\n{body}\n\n{common.provenance(report)}\n"
