"""Which quantization a folder says it has, and which of those are read.

A config names it under `quantization_config`, a config of several models under its `text_config`, and
ModelOpt in `hf_quant_config.json`. Weights of another quantizer would be copied as they are, under a config
that does not know them: so every method without a name here is refused before any work.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from daq_jax.errors import DaqError
from daq_jax.io.hf.architectures import part_of

QUANTIZATION_FILE = "hf_quant_config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_METHODS = (
    "fp8",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "compressed-tensors",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mxfp8",
)
_ALGORITHMS = (
    "FP8",
    "FP8_PB_WO",
    "FP8_PB_REAL",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "NVFP4",
    "W4A16_NVFP4",
    "MXFP4",
)
_ALGORITHMS += ("MXFP8", "MIXED_PRECISION")
_FORMS = ("dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mixed-precision")
_FORMS += ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of quantization, by the key of the whole or of `text_config`; empty for nothing."""
    places = config, part_of(config, "text_config")
    found = (part_of(place, key) for place in places for key in QUANTIZATION_KEYS)
    return next((how for how in found if how), {})


def refuse_unknown(config: Mapping[str, Any], beside: Mapping[str, Any], where: Path) -> None:
    """Refuses a folder that another quantizer made than those that are read.

    Args:
        config: the folder's `config.json`.
        beside: the folder's `hf_quant_config.json`; empty if it has none.
        where: path of the folder, for messages.

    Raises:
        DaqError: naming the method.
    """
    words = [_unknown(part_of(beside, "quantization").get("quant_algo"), _ALGORITHMS)]
    for how in _quantizations(config):
        words += [_unknown(_method(how), _METHODS), _unknown(how.get("quant_algo"), _ALGORITHMS)]
        words += [_unknown(form, _FORMS) for form in _forms(how)]
        words += ["transform_config"] if part_of(how, "transform_config").get("config_groups") else []
    word = next((word for word in words if word), "")
    if word:
        raise DaqError(
            f"{where}: quantized by {word!r}, which is not read; needed plain weights, or one of "
            f"{', '.join(_METHODS)}: dequantize the folder with the tool that made it."
        )


def uses_static_inputs(config: Mapping[str, Any], beside: Mapping[str, Any]) -> bool:
    """Whether servers read the scales of activations that a folder with such a config holds."""
    how = quantization_of(config)
    groups = part_of(how, "config_groups")
    inputs = [part_of(part_of(groups, name), "input_activations").get("dynamic") for name in groups]
    modelopt = str(how.get("quant_method")).startswith("modelopt") or bool(beside)
    return modelopt or how.get("activation_scheme") == "static" or any(x in (False, "local") for x in inputs)


def quantizes_cache(config: Mapping[str, Any], beside: Mapping[str, Any]) -> bool:
    """Whether servers read the scales of the cache that a folder with such a config holds."""
    places = quantization_of(config), part_of(beside, "quantization")
    return any(how.get(key) for how in places for key in ("kv_cache_scheme", "kv_cache_quant_algo"))


def _quantizations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All that a config says of quantization, for the whole model and for each model inside it."""
    for key, value in config.items():
        if key in QUANTIZATION_KEYS and value and not isinstance(value, Mapping):
            yield {"quant_method": str(value)}
        elif isinstance(value, Mapping):
            if key in (*QUANTIZATION_KEYS, "quantization"):  # the last as MLX has it
                yield value
            else:
                yield from _quantizations(value)


def _forms(how: Mapping[str, Any]) -> list[Any]:
    """The forms of packing that a config of compressed-tensors names, of the whole and of each group."""
    groups = part_of(how, "config_groups")
    parts = [how, part_of(how, "sparsity_config"), *(part_of(groups, name) for name in groups)]
    return [part.get("format") for part in parts]


def _method(how: Mapping[str, Any]) -> Any:
    if "quant_method" in how:
        return how["quant_method"]
    if how.get("load_in_8bit") or how.get("load_in_4bit"):
        return "bitsandbytes"
    return f"no method, {how['bits']} bits" if "bits" in how else None  # as MLX and older GPTQ have it


def _unknown(word: Any, known: tuple[str, ...]) -> str:
    """A word that is not among those known; "" for one that is, or for none."""
    return word if isinstance(word, str) and word not in known else ""
