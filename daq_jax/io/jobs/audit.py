"""What a result in the format of its base has in common with the base: which codes and which scales moved."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from daq_jax.qtensor import QTensor, as_array


@dataclasses.dataclass(frozen=True)
class Audit:
    """Counts over one tensor, or over several.

    Attributes:
        codes: number of codes.
        moved_codes: codes of another value than the code of the base.
        scales: number of scales.
        moved_scales: scales of another value than the scale of the base.
        untouched: whether no weight of the tensor changed, so that it has the bytes of the base.
    """

    codes: int = 0
    moved_codes: int = 0
    scales: int = 0
    moved_scales: int = 0
    untouched: bool = True

    @classmethod
    def of(cls, base: QTensor, q: QTensor) -> "Audit":
        """The audit of a tensor, or of a band of it, in the format and the tiling of its base."""
        codes, scales = jax.device_get(_moved(base, q))
        return cls(q.codes.size, int(codes), q.scale.size, int(scales), untouched=False)

    @classmethod
    def of_untouched(cls, base: QTensor) -> "Audit":
        """The audit of a tensor, or of a band of it, that has the bytes of the base."""
        return cls(codes=base.codes.size, scales=base.scale.size)

    def __add__(self, other: "Audit") -> "Audit":
        """Both together."""
        return Audit(
            self.codes + other.codes,
            self.moved_codes + other.moved_codes,
            self.scales + other.scales,
            self.moved_scales + other.moved_scales,
            self.untouched and other.untouched,
        )


@jax.jit
def _moved(base: QTensor, q: QTensor) -> tuple[Array, Array]:
    before, after = (x.format.decode(x.codes) for x in (base, q))  # by value: there are two zeros
    return jnp.count_nonzero(before != after), jnp.count_nonzero(base.scale != q.scale)


def is_untouched(base: QTensor, tuned: ArrayLike | QTensor) -> bool:
    """Whether tuned weights are those that the base dequantizes to, in their dtype."""
    return bool(_alike(base, tuned))


@jax.jit
def _alike(base: QTensor, tuned: ArrayLike | QTensor) -> Array:
    return jnp.all(base.dequantize() == as_array(tuned))


def identity_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says under "identity", from the records of all units; nothing for other formats.

    Returns:
        `{"identity": ...}`: tensors, those untouched, and the shares of codes and of scales that moved in the
        others; and `moved_codes` and `moved_scales` of each tensor as shares.
    """
    audits = {name: Audit(**found) for record in records for name, found in record.get("audits", {}).items()}
    if not audits:
        return {}
    touched = [audit for audit in audits.values() if not audit.untouched]
    total = sum(touched, Audit())
    leaves = {
        name: {
            "untouched": audit.untouched,
            "moved_codes": audit.moved_codes / max(audit.codes, 1),
            "moved_scales": audit.moved_scales / max(audit.scales, 1),
        }
        for name, audit in audits.items()
    }
    found = {
        "tensors": len(audits),
        "untouched": len(audits) - len(touched),
        "moved_codes": total.moved_codes / max(total.codes, 1),
        "moved_scales": total.moved_scales / max(total.scales, 1),
        "leaves": leaves,
    }
    return {"identity": found}


def identity_line(report: Mapping[str, Any]) -> str:
    """The audit of a report in one sentence; "" if it has none."""
    found = report.get("identity")
    if not found:
        return ""
    moved = f"{found['moved_codes']:.2%} of the codes and {found['moved_scales']:.2%} of the scales moved"
    return (
        f"of {found['tensors']} quantized tensors {found['untouched']} are untouched and keep the bytes of "
        f"the base; in the others {moved}"
    )
