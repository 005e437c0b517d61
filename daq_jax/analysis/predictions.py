"""How far apart are the predictions of two models? The KL divergence of any model, and its losses.

Figures of the weights say what was kept of a change; the predictions decide whether that is enough. Letters:
`V` entries of the vocabulary, `*p` positions, whatever their axes. Everything is in nats.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from daq_jax.errors import DaqError

# Below, the series of `exp(r) - 1 - r` to its 6th power is exact to a float32's last bits; above, so is the
# difference itself.
_SMALL = 0.1


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far the predictions of a quantized model are from those of the model before.

    Attributes:
        kl: mean KL divergence from the model's distributions to the quantized model's, nats per position; 0
            where both predict the same.
        positions: number of predictions that were compared.
        loss: mean loss of the model before, nats per position; None where no targets were known.
        quantized_loss: mean loss of the quantized model, nats per position; None where no targets were known.
    """

    kl: float
    positions: int
    loss: float | None = None
    quantized_loss: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """All figures by name, as JSON has them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        losses = "" if self.loss is None else f"; loss {self.loss:.4f} -> {self.quantized_loss:.4f}"
        return f"KL {self.kl:.2e} nats a position, over {self.positions:,} positions{losses}"


def divergence(
    apply: Callable[[Any, Any], Array],
    params: Any,
    quantized: Any,
    batches: Iterable[Any],
    *,
    targets: Callable[[Any], Array] | None = None,
) -> Divergence:
    """Mean KL divergence from the predictions of a model to those of the same model quantized.

    Both models see each batch in one compiled program, and only sums are kept: `batches` may be a generator
    over more data than fits into memory. Every position has the same weight, whatever the sizes of the
    batches. A batch of another shape compiles once more.

    The program is kept for later calls with the same function `apply`, so define that once, outside of loops.

    Args:
        apply: `apply(params, batch)` gives the logits, `[*p, V]` of any float dtype. It is called with
            `params` and with `quantized`, each as it is; if `quantized` has QTensors, begin it with
            `params = daq.dequantize(params)`, which leaves arrays alone, or use `daq.linen_apply`. Anything
            that `apply` finds elsewhere is a constant of the compiled program.
        params: pytree of arrays, the model to compare with: the tuned one, before it was quantized.
        quantized: pytree of arrays and QTensors, the quantized model.
        batches: any iterable of batches, at least one. A batch is an array or a pytree of arrays.
        targets: `targets(batch)` gives the true entry of the vocabulary at each position, `[*p]` of any
            integer dtype. A negative one marks a position that is not to be counted at all, such as padding.
            None if no targets are known: then every position counts, and there are no losses.

    Returns:
        The means over all positions. Logarithms are taken in float32, and sums over batches in float64.

    Raises:
        DaqError: if there is no batch or no position that counts, if the logits of both models or the targets
            differ in shape, if a target is not in the vocabulary, or if logits are not finite at a position
            that counts. Logits of minus infinity are allowed where both models have them, as for entries that
            are masked out.

    >>> import daq_jax as daq
    >>> tuned = jax.random.normal(jax.random.key(0), (64, 32))
    >>> q = daq.quantize(tuned, tuned, daq.recipes.absmax)
    >>> batches = [jax.random.normal(jax.random.key(i), (8, 64)) for i in range(4)]
    >>> found = divergence(lambda w, x: x @ daq.dequantize(w), tuned, q, batches)
    >>> found.positions, 0 < found.kl < 0.1
    (32, True)
    """
    if isinstance(batches, Mapping):
        raise DaqError("`batches` must be an iterable of batches; got one mapping. Pass `[batch]`.")
    try:
        hash((apply, targets))
    except TypeError as error:
        way_out = "Wrap it in a function: `def apply(params, batch): ...`."
        raise DaqError(
            f"`apply` and `targets` must be hashable, to be compiled once; {error}. {way_out}"
        ) from None
    positions, sums, number = 0, [0.0, 0.0, 0.0], -1
    for number, batch in enumerate(batches):
        found = jax.device_get(_sums_of(apply, targets, params, quantized, batch))
        _refuse_unusable(found, number)
        positions += int(found.positions)
        sums = [total + float(x) for total, x in zip(sums, found.sums, strict=True)]
    if not positions:
        got = f"{number + 1} batches with no position that counts" if number >= 0 else "no batch"
        raise DaqError(f"`batches` must hold at least one position to compare; got {got}.")
    kl, loss, quantized_loss = (total / positions for total in sums)
    return Divergence(kl, positions, *((loss, quantized_loss) if targets else ()))


def kl_divergences(log_p: Float[Array, "*p V"], log_q: Float[Array, "*p V"]) -> Float[Array, "*p"]:
    """KL divergence from `p` to `q`, both given by their logarithms, without the definition's cancellation.

    Each entry adds `q - p - p log(q / p)`, which is never negative. The sum is the divergence, as `p` and `q`
    both sum to 1. An error in the norm of either changes it in second order alone.

    Args:
        log_p: logarithms of the distributions to measure from, float32; `-inf` for an entry of probability 0.
        log_q: logarithms of the distributions to measure to, float32.

    Returns:
        Nats, float32; `inf` where `q` is 0 and `p` is not.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    possible = p > 0
    r = jnp.where(possible, log_q - jnp.where(possible, log_p, 0), 0)
    small = jnp.abs(r) < _SMALL
    s = jnp.where(small, r, 0)
    series = s * s * (1 / 2 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s / 720))))
    return jnp.sum(jnp.where(possible & small, p * series, q - p - p * r), axis=-1)


class _Sums(NamedTuple):
    """Of one batch, over the positions that count: divergence, both losses, and what makes it unusable."""

    sums: tuple[Array, ...]  # float32: divergence, loss, loss of the quantized model
    positions: Array
    broken: tuple[Array, ...]  # positions with NaN or infinite logits, of each model
    outside: Array  # targets that the vocabulary lacks


@partial(jax.jit, static_argnums=(0, 1))
def _sums_of(apply: Any, targets: Any, params: Any, quantized: Any, batch: Any) -> _Sums:
    named = {"params": apply(params, batch), "quantized": apply(quantized, batch)}
    for name, logits in named.items():
        _check_logits(name, logits)
    shapes = {name: logits.shape for name, logits in named.items()}
    if shapes["params"] != shapes["quantized"]:
        raise DaqError(f"the logits of both models must have one shape; got {shapes}.")
    logits = [x.astype(jnp.float32) for x in named.values()]
    log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in logits)
    if targets is None:
        wanted = jnp.zeros(log_p.shape[:-1], jnp.int32)
    else:
        wanted = jnp.asarray(targets(batch))
        if wanted.shape != log_p.shape[:-1] or not jnp.issubdtype(wanted.dtype, jnp.integer):
            needed = f"integers of shape {log_p.shape[:-1]}, as the logits are {log_p.shape}"
            raise DaqError(f"`targets` must give {needed}; got {wanted.dtype} of shape {wanted.shape}.")
    counts = wanted >= 0
    at = jnp.clip(wanted, 0, log_p.shape[-1] - 1)[..., None]
    losses = (-jnp.take_along_axis(x, at, axis=-1)[..., 0] for x in (log_p, log_q))
    return _Sums(
        tuple(_sum(x, counts) for x in (kl_divergences(log_p, log_q), *losses)),
        jnp.sum(counts),
        tuple(jnp.sum(counts & jnp.any(jnp.isnan(x) | (x == jnp.inf), axis=-1)) for x in logits),
        jnp.sum(wanted >= log_p.shape[-1]),
    )


def _sum(x: Float[Array, "*p"], counts: Bool[Array, "*p"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(counts, x, 0))


def _check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, jax.Array):
        raise DaqError(
            f"`apply` must return one array of logits; for `{name}` it returned a {type(logits).__name__}."
        )
    if logits.ndim < 1 or not logits.size or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = f"{logits.dtype} of shape {logits.shape}"
        raise DaqError(
            f"`apply` must return logits, floating, `[..., vocabulary]`; for `{name}` it returned {got}."
        )


def _refuse_unusable(found: _Sums, number: int) -> None:
    """Raises DaqError for a batch, counted from 0, whose sums mean nothing."""
    for name, broken in zip(("params", "quantized"), found.broken, strict=True):
        if broken:
            where = f"at {int(broken)} of {int(found.positions)} positions of batch {number}"
            raise DaqError(
                f"the logits of `{name}` are NaN or infinite {where}; nothing can be compared there."
            )
    if found.outside:
        raise DaqError(
            f"{int(found.outside)} targets of batch {number} are beyond the vocabulary of the logits."
        )
    names = ("divergence", "loss of `params`", "loss of `quantized`")
    for name, total in zip(names, found.sums, strict=True):
        if not math.isfinite(total):
            why = "a logit is minus infinity where one model needs it; mask the same entries in both"
            raise DaqError(f"the {name} of batch {number} is not finite: {why}.")
