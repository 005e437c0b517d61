"""The result of quantizing one weight: codes, scales, and what they mean."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from daq_jax.errors import DaqError
from daq_jax.formats import Format, round_to_dtype, weights_of
from daq_jax.numerics.machine import on_tpu
from daq_jax.numerics.sharding import run_sharded, sharding_of
from daq_jax.tilings import DEFAULT_MATRIX, Matrix, TileView, Tiling

FLOATS = ("bfloat16", "float16", "float32")  # dtypes of a weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight: `float32(code) * scale`, each scale spread over its tile.

    With a `zero` it is `(float32(code) - zero) * scale`. A pytree whose leaves are `codes`, `scale` and
    `zero`, where there is one; the rest is static. Functions of jnp and NumPy take it in place of an array
    (it becomes one, in its original dtype); for lax functions call `dequantize` first. `==` asks whether two
    hold the same objects as arrays, or equal shapes and the like in their places.

    Attributes:
        codes: storage dtype of the format, in the weight's own shape and axis order.
        scale: float32 `[batch..., grid rows, grid columns]`, weight units per code unit; see `tilings`.
        format: the number format of the codes.
        tiling: which elements share a scale.
        dtype: dtype of the weight that was quantized.
        matrix: input axes and output axes of the weight; all other axes are a batch.
        zero: float32 in the shape of `scale`, the value that stands for weight 0, in code units and not
            necessarily that of a code; None for 0 everywhere.
    """

    codes: Any  # an array; what stands for one (a shape, a sharding) in a tree mapped over a tree
    scale: Any
    format: Format = dataclasses.field(metadata={"static": True})
    tiling: Tiling = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    matrix: Matrix = dataclasses.field(default=DEFAULT_MATRIX, metadata={"static": True})
    zero: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zeros in memory."""
        return sum(x.nbytes for x in (self.codes, self.scale, self.zero) if x is not None)

    @property
    def view(self) -> TileView:
        """How the weight is cut into tiles."""
        return TileView(self.shape, self.matrix, self.tiling)

    def values(self) -> Array:
        """Float32 weights, before the cast to a dtype, cut into tiles by `view`."""
        view = self.view
        zero = None if self.zero is None else view.spread(self.zero)
        return weights_of(self.format.decode(view.cut(self.codes)), view.spread(self.scale), zero)

    def in_lines(self) -> "QTensor":
        """The same weights with a scale for each line of a tile; see `TileView.lines`."""
        view = self.view
        scale, zero = (x if x is None else view.in_lines(x) for x in (self.scale, self.zero))
        return dataclasses.replace(self, scale=scale, zero=zero, tiling=view.lines.tiling)

    def values_on_tpu(self) -> Array:
        """As `values`, cut by `view.lines`, in the form that a TPU's compiler makes one program of.

        Without the barriers it moves the cut behind the decoding and writes scales out at the weight's size.
        """
        q = self.in_lines()
        codes, scale, zero = lax.optimization_barrier((q.view.cut(q.codes), q.scale, q.zero))
        zero = None if zero is None else q.view.spread(zero)
        return weights_of(q.format.decode(codes), q.view.spread(scale), zero)

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> Array:
        """The weight as an array again: one product and one cast.

        Args:
            dtype: of the result; None gives the dtype of the weight that was quantized.

        Raises:
            DaqError: if there is no such dtype.
        """
        return _dequantize(self, _dtype_of(self.dtype if dtype is None else dtype))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QTensor) or self._rest != other._rest:
            return False
        pairs = zip(self._arrays, other._arrays, strict=True)
        return all(a is b or (not isinstance(a, jax.Array | np.ndarray) and a == b) for a, b in pairs)

    def __hash__(self) -> int:
        return hash(self._rest)

    @property
    def _arrays(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero

    @property
    def _rest(self) -> tuple[Any, ...]:
        return self.format, self.tiling, self.dtype, self.matrix

    def __repr__(self) -> str:
        arrays = {"codes": self.codes, "scale": self.scale}
        arrays |= {} if self.zero is None else {"zero": self.zero}
        said = [f"{name}={_briefly(x)}" for name, x in arrays.items()]
        said += [f"format={self.format.name}", f"tiling={self.tiling!r}", f"dtype={self.dtype}"]
        said += [f"matrix={self.matrix}"] if self.matrix != DEFAULT_MATRIX else []
        return f"QTensor({', '.join(said)})"

    def __jax_array__(self) -> Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dequantize(), dtype)


def _briefly(x: Any) -> str:
    """An array as its dtype and shape: a tree of many is to be read."""
    is_array = isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]" if is_array else repr(x)


def _dtype_of(dtype: jax.typing.DTypeLike) -> np.dtype:
    try:
        return np.dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise DaqError(f"dtype: got {dtype!r}; needed bfloat16, float16 or float32.") from error


def _dequantize(q: QTensor, dtype: np.dtype) -> Array:
    def run(codes: Array, scale: Array, zero: Array | None) -> Array:
        part = dataclasses.replace(q, codes=codes, scale=scale, zero=zero)

        def plain(q: QTensor) -> Array:
            return round_to_dtype(q.view.join(q.values()), dtype)

        def tpu(q: QTensor) -> Array:
            return q.view.lines.join(round_to_dtype(q.values_on_tpu(), dtype))

        return on_tpu(tpu, plain, part)

    sharding = sharding_of(q.codes)
    return run_sharded(run, sharding)(q.codes, q.scale, q.zero)


def as_array(x: ArrayLike | QTensor) -> ArrayLike:
    """A weight as an array: a QTensor dequantized to its original dtype, anything else as it is."""
    return x.dequantize() if isinstance(x, QTensor) else x


def codes_of(x: Any) -> Any:
    """The array that tells the devices of a weight: the codes of a QTensor, anything else as it is."""
    return x.codes if isinstance(x, QTensor) else x
