"""Products of activations and quantized weights.

Where a scale does not vary along the inputs of a weight, the activations are multiplied by the codes and the
product by the scale. Codes of 8 bits and fewer are exact in bfloat16 and float16.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from daq_jax.errors import DaqError
from daq_jax.formats import Format, codes_are_values, round_to_dtype
from daq_jax.numerics.arithmetic import divide
from daq_jax.numerics.machine import on_tpu
from daq_jax.numerics.sharding import is_explicit, run_sharded, sharding_of
from daq_jax.qtensor import QTensor
from daq_jax.scales import absmax_scale


def dot(
    x: Float[Array, "..."],
    q: QTensor,
    *,
    activations: Format | None = None,
    out_sharding: NamedSharding | None = None,
) -> Float[Array, "..."]:
    """`x` times a quantized weight, decoded within the product; for use inside `jax.jit`.

    Args:
        x: `[batch..., ..., inputs...]` float: first the batch axes of the weight, last its input axes, both
            in their order in the weight.
        q: the weight.
        activations: None, or a format to round `x` to, with one AbsMax scale for each vector of inputs. Both
            factors are then narrow, and on hardware with FP8 units the product is an FP8 product. Needs a
            weight with one scale per output (`Channel`) or per matrix (`PerTensor`), and formats whose codes
            are numbers.
        out_sharding: of the result. None leaves it to the compiler and, where mesh axes are Explicit, to the
            rules of `jax.lax.dot_general`, which asks for it where both factors are sharded over the inputs.

    Returns:
        `[batch..., ..., outputs]` in the dtype of `x`, summed in float32.

    Raises:
        DaqError: if the shapes do not match, or for `activations` with other tilings or formats.

    >>> from daq_jax import quantize
    >>> weight = quantize(jnp.ones((4, 8)), jnp.full((4, 8), 0.5))
    >>> dot(jnp.ones((2, 4)), weight)[0, 0]
    Array(2., dtype=float32)
    """
    batch, rows, columns = q.view.axes
    first = x.ndim - len(rows)
    shared = tuple(q.shape[a] for a in batch)
    inputs = tuple(q.shape[a] for a in rows)
    if first < len(batch) or x.shape[first:] != inputs or x.shape[: len(batch)] != shared:
        raise DaqError(f"x is {x.shape}; for this weight it must be {(*shared, '...', *inputs)}.")
    contracted = (tuple(range(first, x.ndim)), rows), (tuple(range(len(batch))), batch)
    late = _scale_can_wait(q)
    if activations is not None and not (late and codes_are_values(activations)):
        raise DaqError(
            f"activations={activations.name} needs a weight in Channel() or PerTensor() and formats whose "
            f"codes are numbers; the weight is in {q.tiling}, {q.format.name}."
        )

    def run(x: Array, q: QTensor) -> Array:
        if activations is not None:
            codes, scale = _rounded(x, activations, first)
            product = lax.dot_general(codes, q.codes, contracted, preferred_element_type=jnp.float32)
            product *= scale.reshape(*x.shape[:first], *[1] * len(columns))
        elif late:
            codes = q.codes.astype(x.dtype)
            product = lax.dot_general(x, codes, contracted, preferred_element_type=jnp.float32)
        else:

            def plain(x: Array, q: QTensor) -> Array:
                weight = q.dequantize(x.dtype)
                return lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32)

            product = on_tpu(_product_on_tpu, plain, x, q)
        return (product * _after(q, first) if late else product).astype(x.dtype)

    return run_sharded(run, _sharding_of_product(x, q, contracted, out_sharding))(x, q)


def _sharding_of_product(
    x: Array, q: QTensor, contracted: Any, wanted: NamedSharding | None
) -> NamedSharding | None:
    """What is wanted; or what JAX gives a product, if mesh axes of a factor are Explicit; else None."""
    if wanted is not None or not any(map(is_explicit, (x, q.codes))):
        return wanted
    weight = jax.ShapeDtypeStruct(q.shape, x.dtype, sharding=sharding_of(q.codes))
    product = jax.eval_shape(lambda x, w: lax.dot_general(x, w, contracted), x, weight)
    return sharding_of(product)


def _product_on_tpu(x: Array, q: QTensor) -> Array:
    """The product before the cast, of a weight that stays cut: joined, it would be written out decoded."""
    view = q.view.lines
    batch, rows, columns = view.axes
    weight = round_to_dtype(q.values_on_tpu(), x.dtype)
    free = x.shape[len(batch) : x.ndim - len(rows)]
    x = x.reshape(*view.batch, *free, view.rows)
    whole = view.grid[-2] * view.tile[0]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, whole - view.rows)])
    x = x.reshape(*x.shape[:-1], view.grid[-2], view.tile[0])
    inputs = (view.grid_axes[0], view.tile_axes[0])
    outputs = (view.grid_axes[1], view.tile_axes[1])
    stacked = tuple(a for a in range(weight.ndim) if a not in inputs + outputs)
    contracted = ((x.ndim - 2, x.ndim - 1), inputs), (tuple(range(len(batch))), stacked)
    product = lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32)
    product = product.reshape(*product.shape[:-2], -1)[..., : view.columns]
    return product.reshape(*product.shape[:-1], *(view.shape[a] for a in columns))


def _scale_can_wait(q: QTensor) -> bool:
    """Whether codes are numbers, exact in 16 bits, and no scale varies along the inputs."""
    return codes_are_values(q.format) and q.zero is None and q.view.grid[-2] == 1


def _after(q: QTensor, first: int) -> Array:
    """The scales of a weight, spread over its outputs, in a shape that broadcasts over the product."""
    batch, _, columns = q.view.axes
    outputs = [q.shape[a] for a in columns]
    width = q.view.tile[1]
    scale = jnp.repeat(q.scale[..., 0, :], width, axis=-1)[..., : q.view.columns]
    return scale.reshape(*q.view.batch, *[1] * (first - len(batch)), *outputs)


def _rounded(x: Array, number: Format, first: int) -> tuple[Array, Array]:
    """Codes of activations and their scale for each row of inputs, which keeps the axes of those."""
    axes = tuple(range(first, x.ndim))
    x = x.astype(jnp.float32)
    scale = absmax_scale(x, axes, largest=number.largest)
    return number.encode(number.round(divide(x, scale))), scale
