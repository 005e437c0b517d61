"""Quantized weights as checkpoints store them: which tensors hold codes and scales, and how.

A weight in a Hugging Face folder is `[..., out, in]`, and its scale `[..., out tiles, in tiles]`. A `Coding`
turns the scale to the library's order, inputs first, and back. `daq_jax.io.hf.recognition` finds the codings
of the weights of a folder; `daq_jax.io.hf.layouts` makes those of weights to be written.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Shaped

from daq_jax.errors import DaqError
from daq_jax.formats import Format, int4, int4_full, int8, int8_full
from daq_jax.io.hf.bands import scale_rows
from daq_jax.io.hf.packing import Packing, exponents_of, powers_of
from daq_jax.io.hf.tensor_files import TensorSpec
from daq_jax.qtensor import QTensor
from daq_jax.scales import AnyScale, InDtype, PowerOfTwo, Scales, TwoLevel
from daq_jax.tilings import Matrix, Tiling

HF_MATRIX: Matrix = ((-1,), (-2,))  # [..., out, in]
_FULL: dict[Format, Format] = {int4: int4_full, int8: int8_full}


def _named(dtype: str) -> np.dtype:
    """The dtype in memory of one that a file names."""
    found = TensorSpec(dtype, ()).numpy_dtype
    assert found is not None, dtype
    return found


class ScaleStorage(abc.ABC):
    """How the scales of a weight are stored: a frozen value.

    Attributes:
        dtype: the file's word for the dtype of the tensor that holds them.
    """

    dtype: str

    @property
    def has_factor(self) -> bool:
        """Whether all scales of a weight share a factor of its own."""
        return False

    def factor_if(self, divides: bool) -> float | None:
        """That factor, if scales are divided by it or not as asked; None otherwise."""
        return None

    @property
    @abc.abstractmethod
    def rule(self) -> Scales:
        """Which scales can be stored."""

    @abc.abstractmethod
    def read(self, stored: Shaped[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
        """The scales that the stored numbers stand for, of the same shape."""

    @abc.abstractmethod
    def write(self, scale: Float32[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The inverse of `read`."""


@dataclasses.dataclass(frozen=True)
class Floats(ScaleStorage):
    """Scales as they are.

    Attributes:
        dtype: the file's word for their dtype: "F32", "BF16" or "F16".
        powers: whether all must be powers of two, as `scale_fmt: ue8m0` says.
    """

    dtype: str = "F32"
    powers: bool = False

    @property
    def rule(self) -> Scales:
        """See `ScaleStorage.rule`."""
        if self.powers:
            return PowerOfTwo()
        return AnyScale() if self.dtype == "F32" else InDtype(str(_named(self.dtype)))

    def read(self, stored: np.ndarray) -> np.ndarray:
        """See `ScaleStorage.read`."""
        return stored.astype(np.float32)

    def write(self, scale: np.ndarray) -> np.ndarray:
        """See `ScaleStorage.write`."""
        return scale.astype(_named(self.dtype))


@dataclasses.dataclass(frozen=True)
class Exponents(ScaleStorage):
    """Powers of two, by their exponents with a bias of 127.

    Attributes:
        dtype: the file's word for their dtype: "U8" or "F8_E8M0".
    """

    dtype: str = "U8"

    @property
    def rule(self) -> Scales:
        """See `ScaleStorage.rule`."""
        return PowerOfTwo()

    def read(self, stored: np.ndarray) -> np.ndarray:
        """See `ScaleStorage.read`."""
        return powers_of(stored)

    def write(self, scale: np.ndarray) -> np.ndarray:
        """See `ScaleStorage.write`."""
        return exponents_of(scale).view(_named(self.dtype))


@dataclasses.dataclass(frozen=True)
class TwoLevels(ScaleStorage):
    """Numbers of FP8 (e4m3), and one factor or divisor for the weight in a tensor of its own.

    Attributes:
        factor: the number in that tensor.
        divides: whether a scale is the FP8 number over `factor`, or times it.
    """

    factor: float
    divides: bool
    dtype: str = dataclasses.field(default="F8_E4M3", init=False)

    @property
    def has_factor(self) -> bool:
        """See `ScaleStorage.has_factor`."""
        return True

    def factor_if(self, divides: bool) -> float | None:
        """See `ScaleStorage.factor_if`."""
        return self.factor if divides == self.divides else None

    @property
    def rule(self) -> Scales:
        """See `ScaleStorage.rule`."""
        return TwoLevel(self.factor, self.divides)

    def read(self, stored: np.ndarray) -> np.ndarray:
        """See `ScaleStorage.read`."""
        factor, local = np.float32(self.factor), stored.astype(np.float32)
        return local / factor if self.divides else local * factor

    def write(self, scale: np.ndarray) -> np.ndarray:
        """See `ScaleStorage.write`."""
        factor = np.float32(self.factor)
        local = scale * factor if self.divides else scale / factor
        return local.astype(_named(self.dtype))  # the nearest: all but one rounding apart


@dataclasses.dataclass(frozen=True)
class Coding:
    """How a quantized weight is stored.

    Attributes:
        shape: shape of the weight, `[..., out, in]`.
        format: number format of the codes.
        tiling: which elements share a scale.
        codes: name of the tensor that holds the codes.
        packing: how it holds them.
        scale: name of the tensor that holds the scales.
        scale_shape: its shape, in which axes of length 1 may be missing.
        storage: how it holds the scales.
        constants: what else is stored of the weight, by name, which depends on no band: the factor of its
            scales, the shape of packed codes.
    """

    shape: tuple[int, ...]
    format: Format
    tiling: Tiling
    codes: str
    packing: Packing
    scale: str
    scale_shape: tuple[int, ...]
    storage: ScaleStorage
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def full_format(self) -> Format:
        """The format with every code that files of this coding may hold, the lowest of integers included."""
        return _FULL.get(self.format, self.format)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that hold the weight."""
        own = {
            self.codes: self.packing.spec(self.shape),
            self.scale: TensorSpec(self.storage.dtype, self.scale_shape),
        }
        return own | {name: TensorSpec.of(x.dtype, x.shape) for name, x in self.constants.items()}

    def _scale_band(self, band: slice) -> slice:
        """The band of the scale's first axis that belongs to a band of the weight's first axis.

        Raises:
            DaqError: if the band cuts through a tile.
        """
        if len(self.shape) > 2:
            return band if self.scale_shape[:1] == self.shape[:1] else slice(None)
        return scale_rows(self.tiling, self.shape, band)

    def stored(
        self, read: Callable[[str, slice], np.ndarray], band: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """What is stored of a band: codes and scales, by name.

        Args:
            read: gives a band of the first axis of a stored tensor.
            band: of the weight's first axis.

        Raises:
            DaqError: if the band cuts through a tile.
        """
        return {self.codes: read(self.codes, band), self.scale: read(self.scale, self._scale_band(band))}

    def decode(self, stored: Mapping[str, np.ndarray], dtype: np.dtype) -> QTensor:
        """The weight, or a band of it, on the host.

        Args:
            stored: as `stored` gives it.
            dtype: dtype that the weight dequantizes to.

        Raises:
            DaqError: if a scale is not a positive finite number.
        """
        kind = np.dtype(self.format.dtype)
        codes = self.packing.unpack(stored[self.codes], self.shape[-1], kind)
        *batch, outputs, inputs = codes.shape
        tile_in, tile_out = self.tiling.tile(inputs, outputs)
        scale = self.storage.read(stored[self.scale])
        scale = scale.reshape(*batch, -(-outputs // tile_out), -(-inputs // tile_in))
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise DaqError("it has a scale that is not a positive finite number; mend the checkpoint")
        scale = np.ascontiguousarray(np.swapaxes(scale, -1, -2))
        return QTensor(codes, scale, self.format, self.tiling, dtype, HF_MATRIX)

    def encode(self, q: QTensor) -> dict[str, np.ndarray]:
        """What is stored of a weight `[..., out, in]`, or of its next band: the inverse of `decode`."""
        scale = np.ascontiguousarray(np.swapaxes(np.asarray(q.scale), -1, -2))
        return {self.codes: self.packing.pack(np.asarray(q.codes)), self.scale: self.storage.write(scale)}


def scale_grid(shape: Sequence[int], tiling: Tiling) -> tuple[int, ...]:
    """Shape `[..., out tiles, in tiles]` of the scales of a weight `[..., out, in]`."""
    *batch, outputs, inputs = shape
    tile_in, tile_out = tiling.tile(inputs, outputs)
    return (*batch, -(-outputs // tile_out), -(-inputs // tile_in))


@functools.cache
def storage_of(dtype: str, powers: bool) -> ScaleStorage | None:
    """How scales of a dtype are stored without a second level; None for a dtype that holds no scales."""
    if dtype in ("U8", "F8_E8M0"):
        return Exponents(dtype)
    return Floats(dtype, powers) if dtype in ("F32", "BF16", "F16") else None
