"""Rounding to nearest under the scale rules of other tools: the tensors of a weight, by the ends of names.

The rules are written anew in NumPy from the tools' sources; `installed` calls the tools' own functions. All
round to nearest.

| rule | scale | who |
|---|---|---|
| `mxfp4: ceil` | `2 ** ceil(log2(absmax / 6))` | ModelOpt, tinker-cookbook |
| `mxfp4: up from 1.75` | as `floor`, of absmax rounded up from a mantissa of 1.75 | llm-compressor |
| `mxfp4: floor` | `2 ** (floor(log2(absmax)) - 2)` | OCP Microscaling |
| `nvfp4: absmax / 6` | that in FP8, over `2688 / absmax` of the matrix | ModelOpt, llm-compressor |
| `int4: absmax / 7` | that in bfloat16; codes from -7 | tinker-cookbook |
| `int4: absmax / 7.5` | that in bfloat16; codes from -8 | llm-compressor |
| `...: base's scales` | those of the base | the plainest way to leave scales alone |
"""

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

Rule = Callable[[np.ndarray, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
MX, NV, INT = 32, 16, 32  # elements of a group


def in_groups(weight: np.ndarray, n: int) -> np.ndarray:
    """`[out, in]` as `[out, in / n, n]`."""
    return weight.reshape(weight.shape[0], -1, n)


def absmax(weight: np.ndarray, n: int) -> np.ndarray:
    """Largest magnitude of each group, `[out, in / n]`; no zero, which no scale can be made from."""
    return np.maximum(np.abs(in_groups(weight, n)).max(-1), np.float32(1e-30))


def nibbles(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The nearest 4-bit floats at scales `[out, groups]`, two to a byte, ties to even."""
    n = weight.shape[1] // scale.shape[1]
    values = np.clip(in_groups(weight, n) / scale[..., None], -6, 6).reshape(weight.shape)
    codes = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def words(weight: np.ndarray, scale: np.ndarray, lowest: int) -> np.ndarray:
    """The nearest integers from `lowest` to 7 at scales `[out, groups]`, eight to a word."""
    n = weight.shape[1] // scale.shape[1]
    codes = np.clip(np.rint(in_groups(weight, n) / scale[..., None]), lowest, 7).reshape(weight.shape)
    each = (codes + 8).astype(np.uint32)
    return sum(each[:, i::8] << np.uint32(4 * i) for i in range(8)).view(np.int32)


def mx(exponents: Callable[[np.ndarray], np.ndarray]) -> Rule:
    """MXFP4 whose exponents are a function of the largest magnitudes."""

    def rule(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        stored = (np.clip(exponents(absmax(weight, MX)), -126, 127) + 127).astype(np.uint8)
        return _mx(weight, stored)

    return rule


def _mx(weight: np.ndarray, stored: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.exp2(stored.astype(np.float32) - 127)
    return {"_packed": nibbles(weight, scale), "_scale": stored}


def _floor(largest: np.ndarray) -> np.ndarray:
    return np.floor(np.log2(largest)) - 2


def _up_from(mantissa: float) -> Callable[[np.ndarray], np.ndarray]:
    def exponents(largest: np.ndarray) -> np.ndarray:
        found = _floor(largest)
        return found + (largest >= mantissa * np.exp2(found + 2))

    return exponents


def nv(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """NVFP4 with a factor of its own for each matrix."""
    factor = np.float32(448 * 6) / np.abs(weight).max()
    local = (factor * absmax(weight, NV) / np.float32(6)).astype(E4M3)
    return _nv(weight, local, factor)


def _nv(weight: np.ndarray, local: np.ndarray, factor: np.float32) -> dict[str, np.ndarray]:
    codes = nibbles(weight, local.astype(np.float32) / factor)
    return {"_packed": codes, "_scale": local, "_global_scale": np.array([factor], np.float32)}


def integers(over: float, lowest: int) -> Rule:
    """INT4 in groups, with scales `absmax / over`."""

    def rule(weight: np.ndarray, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _int(weight, (absmax(weight, INT) / np.float32(over)).astype(BF16), lowest)

    return rule


def _int(weight: np.ndarray, scale: np.ndarray, lowest: int) -> dict[str, np.ndarray]:
    shape = np.array(weight.shape, np.int64)
    return {"_packed": words(weight, scale.astype(np.float32), lowest), "_scale": scale, "_shape": shape}


RULES: dict[str, Rule] = {
    "mxfp4: ceil": mx(lambda largest: np.ceil(np.log2(largest / 6))),
    "mxfp4: up from 1.75": mx(_up_from(1.75)),
    "mxfp4: floor": mx(_floor),
    "mxfp4: base's scales": lambda weight, base: _mx(weight, base["_scale"]),
    "nvfp4: absmax / 6": nv,
    "nvfp4: base's scales": lambda weight, base: _nv(weight, base["_scale"], base["_global_scale"][0]),
    "int4: absmax / 7": integers(7, -7),
    "int4: absmax / 7.5": integers(7.5, -8),
    "int4: base's scales": lambda weight, base: _int(weight, base["_scale"], -7),
}
