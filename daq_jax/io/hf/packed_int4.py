"""int4 in groups as compressed-tensors stores it (`pack-quantized`), which vLLM and transformers load.

| tensor, after the module's name | dtype | shape |
|---|---|---|
| `weight_packed` | I32 | `[out, ceil(in / 8)]` |
| `weight_scale` | F32 | `[out, in / group]` |
| `weight_shape` | I64 | `[2]`: out, in |

The words are those of `packing`. A weight is `code * scale`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from daq_jax.errors import DaqError
from daq_jax.io.hf.compressed_tensors import compressed_config, how_quantized
from daq_jax.io.hf.packing import Words
from daq_jax.qtensor import QTensor
from daq_jax.tilings import Tiling

_LARGE = 2**40  # rows or columns: more than any matrix has


def packing_problem(q: QTensor) -> str | None:
    """Why a weight cannot be stored this way, or None if it can."""
    if q.zero is not None:
        return (
            "it has a zero for each group, a real number, and these files hold whole zeros only: "
            "quantize with a symmetric recipe, DensityRecipe(format=int4, centre=None, shift=False)"
        )
    if q.format.name != "int4":
        return f"its format is {q.format.name}; these files hold int4"
    group = group_of(q.tiling)
    if group is None:
        return f"its tiling is {q.tiling}; these files hold groups: use Group(128)"
    if q.ndim != 2:
        return f"it is {q.shape}; these files hold matrices: split it"
    rows = q.view.rows
    if rows % group:
        return f"its {rows} inputs are no whole number of groups of {group}, which readers refuse"
    return None


def group_of(tiling: Tiling) -> int | None:
    """Inputs of one output that share a scale, if the number is the same for all matrices; None otherwise."""
    inputs, outputs = tiling.tile(_LARGE, _LARGE)
    return inputs if outputs == 1 and inputs < _LARGE else None


def packed_tensors(q: QTensor) -> dict[str, np.ndarray]:
    """The tensors of one weight, by the suffix to its module's name.

    Args:
        q: int4 in groups, without zeros; `[in, out]`, or `[out, in]` if its matrix view says so.

    Raises:
        DaqError: if it cannot be stored, with the reason.
    """
    why = packing_problem(q)
    if why:
        raise DaqError(f"a weight cannot be stored as pack-quantized int4: {why}.")
    codes = np.asarray(q.codes)
    codes = codes if q.view.axes[2] == (0,) else np.ascontiguousarray(codes.T)
    scale = np.ascontiguousarray(np.asarray(q.scale).T)
    shape = np.asarray(codes.shape, np.int64)
    return {"weight_packed": Words(4).pack(codes), "weight_scale": scale, "weight_shape": shape}


def packed_config(group: int, skipped: Sequence[str], bits: int = 4) -> dict[str, Any]:
    """`quantization_config` of a model's `config.json`.

    Args:
        group: inputs that share a scale.
        skipped: names of the linear modules that are not quantized.
        bits: bits of a code: 4 or 8.
    """
    weights = how_quantized(bits, "int", "group", group_size=group)
    return compressed_config("pack-quantized", skipped, weights=weights)
