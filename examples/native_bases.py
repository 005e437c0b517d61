"""Fine-tunes of bases that ship in 4 bits, back into the base's own format: three models, made small.

| base | weights |
|---|---|
| like gpt-oss | stacks of experts in MXFP4, `_blocks` and `_scales`; the rest in bfloat16 |
| like Kimi K3 | experts one by one in MXFP4 by the names of compressed-tensors; the rest in bfloat16 |
| like DeepSeek V4 | experts one by one in MXFP4, the other layers in FP8 blocks, `.scale` as exponents |

Each base is made from random weights by `--format`, and tuned by a LoRA adapter of rank 2, or in bfloat16 for
gpt-oss. What the script calls is what `daq-jax quantize base tuned out` calls.

    python examples/native_bases.py
"""

import contextlib
import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import daq_jax as daq
from daq_jax.io.hf.folders import open_folder

N = 128  # rows and columns of every matrix
EXPERTS = "model.layers.0.mlp.experts"
KIMI = [f"{EXPERTS}.0.{name}_proj" for name in ("gate", "up", "down")]
V4 = ["model.layers.0.attn.wq_a", *(f"model.layers.0.ffn.experts.0.w{i}" for i in (1, 2, 3))]
RNG = np.random.default_rng(0)
BF16 = ml_dtypes.bfloat16


def write(path: Path, tensors: dict, config: dict, file: str = "model.safetensors") -> Path:
    """A folder as Hugging Face lays it out, or an adapter as PEFT does."""
    path.mkdir(parents=True)
    save_file(tensors, path / file)
    name = "config.json" if file == "model.safetensors" else "adapter_config.json"
    (path / name).write_text(json.dumps(config))
    return path


def base_of(path: Path, format: str, kind: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A base in a format, from random weights."""
    weights = {name: (0.02 * RNG.normal(size=shape)).astype(BF16) for name, shape in shapes.items()}
    plain = write(path / "plain", weights, {"model_type": kind, "torch_dtype": "bfloat16"})
    daq.quantize_folder(plain, plain, path / "base", daq.recipes.absmax, format=format)
    return path / "base"


def adapter_of(path: Path, modules: list[str]) -> Path:
    """A LoRA adapter of rank 2 whose changes are a few percent of the weights."""
    tensors = {}
    for module in modules:
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = RNG.normal(size=(2, N)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = (4e-4 * RNG.normal(size=(N, 2))).astype(np.float32)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules}
    return write(path / "adapter", tensors, config, "adapter_model.safetensors")


def tuned_of(path: Path, base: Path) -> Path:
    """A tuned gpt-oss in bfloat16: stacks of experts are `[experts, in, out]` there."""
    tuned = {}
    with contextlib.closing(open_folder(base)) as folder:
        for name in folder.tensors:
            weight = np.asarray(folder.read(name).dequantize(np.float32))  # [experts, out, in]
            experts, outputs, inputs = weight.shape
            change = RNG.normal(size=(experts, outputs, 2)) @ RNG.normal(size=(experts, 2, inputs))
            tuned[name] = np.swapaxes(weight + 4e-4 * change, -1, -2).astype(BF16)
    tuned = {name: np.ascontiguousarray(x) for name, x in tuned.items()}
    return write(path / "tuned", tuned, {"model_type": "gpt_oss", "torch_dtype": "bfloat16"})


def back(name: str, base: Path, tuned: Path) -> None:
    """Quantizes a tune into the format of its base, and says what is left of it."""
    report = daq.quantize_folder(base, tuned, base.parent / "out")
    projection, identity = report["total"]["projection"], report["identity"]
    print(
        f"{name}: projection {projection:.2f}; {identity['untouched']} of {identity['tensors']} tensors "
        f"untouched; {identity['moved_codes']:.1%} of the codes and {identity['moved_scales']:.1%} of the "
        "scales moved in the others"
    )
    if not 0.8 < projection < 1.2:
        raise SystemExit(f"{name}: the change was kept at {projection} of its size")


def main() -> None:
    here = Path(tempfile.mkdtemp())
    stack = {f"{EXPERTS}.down_proj": (2, N, N)}
    base = base_of(here / "gpt-oss", "gpt-oss", "gpt_oss", stack)
    back("like gpt-oss", base, tuned_of(base.parent, base))

    base = base_of(here / "kimi", "mxfp4", "kimi_k3", {f"{m}.weight": (N, N) for m in KIMI})
    back("like Kimi K3", base, adapter_of(base.parent, KIMI[:2]))  # one weight is left alone

    base = base_of(here / "v4", "deepseek-v4", "deepseek_v4", {f"{m}.weight": (N, N) for m in V4})
    back("like DeepSeek V4", base, adapter_of(base.parent, V4[1:]))  # experts alone


if __name__ == "__main__":
    main()
