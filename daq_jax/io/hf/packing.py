"""How codes and scales become the numbers of a file: as they are, or several codes to a byte or a word.

| packing | stored | code |
|---|---|---|
| `Plain` | the dtype of the format, `[..., out, in]` | as it is |
| `Words(4)` | I32 `[out, ceil(in / 8)]` | code + 8, the first in the lowest bits |
| `Words(8)` | I32 `[out, ceil(in / 4)]` | code + 128, the first in the lowest byte |
| `Nibbles` | U8 or I8 `[..., out, in / 2]` | a 4-bit float, the first in the low nibble |
| `Nibbles(blocks=16)` | U8 `[..., out, in / 32, 16]` | as `Nibbles` |

Sources: compressed-tensors 0.20 for words and for nibbles, gpt-oss for blocks of nibbles.
"""

import abc
import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from daq_jax.io.hf.tensor_files import TensorSpec

_SMALLEST_EXPONENT = 1  # of a normal float32: a scale of 2^-127 would be zero on an accelerator


def _pairs(of_nibble: np.ndarray) -> np.ndarray:
    """Of each byte the low and the high nibble, each turned into a byte by a table of 16, as uint16."""
    both = np.empty((256, 2), np.uint8)
    nibbles = np.arange(256)
    both[:, 0], both[:, 1] = of_nibble[nibbles & 15], of_nibble[nibbles >> 4]
    return both.view("<u2")[:, 0]


_FLOATS = _pairs(np.arange(16, dtype=np.uint8))
_INTEGERS = _pairs((np.arange(16) - 8).astype(np.int8).view(np.uint8))


class Packing(abc.ABC):
    """How the codes of a weight `[..., out, in]` are stored: a frozen value."""

    @abc.abstractmethod
    def spec(self, shape: Sequence[int]) -> TensorSpec:
        """Dtype and shape in which the codes of a weight are stored."""

    @abc.abstractmethod
    def unpack(
        self, stored: Shaped[np.ndarray, "..."], inputs: int, dtype: np.dtype
    ) -> Shaped[np.ndarray, "... out inputs"]:
        """The codes, or those of a band of the first axis.

        Args:
            stored: what the file holds of the band.
            inputs: length of the last axis of the weight.
            dtype: storage dtype of the format.
        """

    @abc.abstractmethod
    def pack(self, codes: Shaped[np.ndarray, "... out inputs"]) -> Shaped[np.ndarray, "..."]:
        """The inverse of `unpack`."""


@dataclasses.dataclass(frozen=True)
class Plain(Packing):
    """Codes as they are; `dtype` is the file's word for it, such as "F8_E4M3"."""

    dtype: str

    def spec(self, shape: Sequence[int]) -> TensorSpec:
        """See `Packing.spec`."""
        return TensorSpec(self.dtype, tuple(shape))

    def unpack(self, stored: np.ndarray, inputs: int, dtype: np.dtype) -> np.ndarray:
        """See `Packing.unpack`."""
        return stored

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """See `Packing.pack`."""
        return codes


@dataclasses.dataclass(frozen=True)
class Words(Packing):
    """Integers of 4 or 8 bits in 32-bit words; a last word that is not full ends with zero bits.

    >>> hex(Words(4).pack(np.array([[-8, -7, 0, 0, 0, 0, 0, 7]], np.int8)).view(np.uint32).item())
    '0xf8888810'
    """

    bits: int

    @property
    def each(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    def spec(self, shape: Sequence[int]) -> TensorSpec:
        """See `Packing.spec`."""
        *before, inputs = shape
        return TensorSpec("I32", (*before, -(-inputs // self.each)))

    def unpack(self, stored: np.ndarray, inputs: int, dtype: np.dtype) -> np.ndarray:
        """See `Packing.unpack`."""
        data = np.ascontiguousarray(stored.astype("<i4", copy=False)).view(np.uint8)
        codes = _INTEGERS[data].view(np.int8) if self.bits == 4 else (data ^ 128).view(np.int8)
        return np.ascontiguousarray(codes[..., :inputs]).view(dtype)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """See `Packing.pack`."""
        data = np.ascontiguousarray(codes).view(np.uint8)
        # Adds the offset in two's complement.
        data = (data & 15) ^ 8 if self.bits == 4 else data ^ 128
        missing = -data.shape[-1] % self.each
        if missing:
            data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, missing)])
        data = data[..., ::2] | data[..., 1::2] << np.uint8(4) if self.bits == 4 else data
        return np.ascontiguousarray(data).view("<i4")


@dataclasses.dataclass(frozen=True)
class Nibbles(Packing):
    """Floats of 4 bits, two to a byte.

    Attributes:
        dtype: the file's word for the dtype of a byte: "U8" or "I8".
        blocks: bytes along the last axis, which is then split in two; 0 for all of a row.
    """

    dtype: str = "U8"
    blocks: int = 0

    def spec(self, shape: Sequence[int]) -> TensorSpec:
        """See `Packing.spec`."""
        *before, inputs = shape
        last = (inputs // 2 // self.blocks, self.blocks) if self.blocks else (inputs // 2,)
        return TensorSpec(self.dtype, (*before, *last))

    def unpack(self, stored: np.ndarray, inputs: int, dtype: np.dtype) -> np.ndarray:
        """See `Packing.unpack`."""
        before = stored.shape[:-2] if self.blocks else stored.shape[:-1]
        return _FLOATS[stored.view(np.uint8)].view(dtype).reshape(*before, inputs)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """See `Packing.pack`."""
        data = np.ascontiguousarray(codes).view(np.uint8) & 15
        data = data[..., ::2] | data[..., 1::2] << np.uint8(4)
        data = data.reshape(*data.shape[:-1], -1, self.blocks) if self.blocks else data
        return data.view(np.int8) if self.dtype == "I8" else data


def powers_of(stored: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The powers of two whose exponents, with a bias of 127, are stored, float32; NaN for 255.

    The smallest, 2^-127, is read as 2^-126: it is no normal float32, and its group holds zeros.
    """
    exponents = np.maximum(stored.view(np.uint8), _SMALLEST_EXPONENT)
    return exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def exponents_of(scale: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The inverse of `powers_of`, uint8, of float32 powers of two."""
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    assert not (bits & 0x7FFFFF).any(), "a scale is no power of two"
    return (bits >> 23).astype(np.uint8)
