"""Other tools' own functions as rules, where the tools are installed; results say which.

tinker-cookbook's modules are loaded from their files, as its package asks for a client of its service.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np

from benchmarks.native_peers.rules import INT, MX, NV, Rule

_FORMS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized", "int4": "pack-quantized"}


def _array(x) -> np.ndarray:
    import torch

    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return x.numpy()


def tinker(name: str) -> ModuleType:
    """A module of tinker-cookbook's folder `weights`, without the rest of the package."""
    found = importlib.util.find_spec("tinker_cookbook")
    assert found is not None
    assert found.submodule_search_locations
    path = Path(found.submodule_search_locations[0], "weights", f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tinker_mxfp4(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    blocks, scales = tinker("_mxfp4").quantize_mxfp4(torch.from_numpy(weight))
    return {"_packed": blocks.reshape(len(weight), -1).numpy(), "_scale": scales.numpy()}


def tinker_int4(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    words, scale = tinker("_packed_int4").quantize_int4_group(torch.from_numpy(weight), INT)
    # Its nibbles are in two's complement; those of compressed-tensors have 8 added.
    stored = {"_packed": words.numpy() ^ np.uint32(0x88888888).view(np.int32), "_scale": _array(scale)}
    return stored | {"_shape": np.array(weight.shape, np.int64)}


def modelopt_mxfp4(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor

    found, scales = MXFP4QTensor.quantize(torch.from_numpy(weight), MX)
    codes = found._quantized_data.reshape(len(weight), -1).numpy()
    return {"_packed": codes, "_scale": scales.reshape(len(weight), -1).numpy()}


def modelopt_nvfp4(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    found, scales, factor = NVFP4QTensor.quantize(torch.from_numpy(weight), NV, try_tensorrt=False)
    codes = found._quantized_data.reshape(len(weight), -1).numpy()
    stored = {"_packed": codes, "_scale": _array(scales).reshape(len(weight), -1)}
    return stored | {"_global_scale": 1 / factor.reshape(1).float().numpy()}  # by which others divide


def compressed_tensors(kind: str) -> Rule:
    """The scales of `calculate_qparams` and the codes of the compressor, which llm-compressor uses."""

    def rule(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        wide = torch.from_numpy(weight)
        scheme = QuantizationScheme(targets=["Linear"], weights=_arguments(kind))
        group = wide.reshape(len(weight), -1, scheme.weights.group_size)
        low, high = group.amin(-1), group.amax(-1)
        more = {"weight_global_scale": generate_gparam(low.amin(), high.amax())} if kind == "nvfp4" else {}
        scale, zero = calculate_qparams(low, high, scheme.weights, more.get("weight_global_scale"))
        scale = scale.to(torch.bfloat16).float() if kind == "int4" else scale  # as the model's weights are
        compressor = BaseCompressor.get_value_from_registry(_FORMS[kind])
        state = {"weight": wide, "weight_scale": scale, "weight_zero_point": zero} | more
        found = compressor.compress(state, scheme)
        found = {name.removeprefix("weight"): x for name, x in found.items() if "zero_point" not in name}
        if kind == "int4":
            found["_scale"] = found["_scale"].to(torch.bfloat16)
        return {name: _array(x) for name, x in found.items()}

    return rule


def _arguments(kind: str) -> dict:
    integer = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": INT, "symmetric": True}
    if kind == "int4":
        return integer
    floats = integer | {"type": "float"}
    if kind == "mxfp4":
        return floats | {"group_size": MX, "scale_dtype": "torch.uint8"}
    return floats | {"strategy": "tensor_group", "group_size": NV, "scale_dtype": "torch.float8_e4m3fn"}


_ALL: dict[str, tuple[str, Callable]] = {
    "mxfp4: ModelOpt": ("nvidia-modelopt", modelopt_mxfp4),
    "mxfp4: tinker-cookbook": ("tinker-cookbook", tinker_mxfp4),
    "mxfp4: compressed-tensors": ("compressed-tensors", compressed_tensors("mxfp4")),
    "nvfp4: ModelOpt": ("nvidia-modelopt", modelopt_nvfp4),
    "nvfp4: compressed-tensors": ("compressed-tensors", compressed_tensors("nvfp4")),
    "int4: tinker-cookbook": ("tinker-cookbook", tinker_int4),
    "int4: compressed-tensors": ("compressed-tensors", compressed_tensors("int4")),
}


def version_of(package: str) -> str:
    """The installed version of a package; "" for none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


VERSIONS = {package: v for package, _ in _ALL.values() if (v := version_of(package))}
INSTALLED: dict[str, Rule] = {name: rule for name, (package, rule) in _ALL.items() if package in VERSIONS}
