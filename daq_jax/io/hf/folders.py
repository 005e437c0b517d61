"""A checkpoint folder as named tensors that are read when asked for.

    folder = open_folder("some/model")
    folder.tensors["model.layers.0.mlp.up_proj.weight"]  # shape, dtype, bytes, and whether it is quantized
    folder.read("model.layers.0.mlp.up_proj.weight")  # a NumPy array, or a QTensor of the stored codes

A folder is checked when it is opened, from headers, index and config alone. No pickle is ever read, and no
path that leads out of the folder is followed.
"""

import abc
import dataclasses
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from daq_jax.errors import DaqError
from daq_jax.io.disk.links import refuse_links
from daq_jax.io.disk.orbax_places import is_orbax
from daq_jax.io.hf.architectures import part_of, turns_experts
from daq_jax.io.hf.bands import rows_per_tile
from daq_jax.io.hf.codings import HF_MATRIX, Coding
from daq_jax.io.hf.lora_config import CONFIG as ADAPTER_CONFIG
from daq_jax.io.hf.methods import QUANTIZATION_FILE, refuse_unknown
from daq_jax.io.hf.orientation import turned_stacks
from daq_jax.io.hf.recognition import find_codings
from daq_jax.io.hf.tensor_files import TensorReader, TensorSpec, read_json
from daq_jax.io.hf.weight_names import is_matrix
from daq_jax.qtensor import QTensor
from daq_jax.tilings import Matrix

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"
_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a folder, before it is read.

    Attributes:
        name: name of the tensor in the folder.
        spec: dtype and shape as stored; of a quantized weight, dtype and shape of its codes, unpacked.
        file: name of the file that holds the tensor, relative to the folder.
        coding: how codes and scale make a weight; None for a tensor that is not quantized. The scale itself
            is not listed as a tensor of its own.
        matrix: input and output axes, if the tensor is a matrix.
        copied: dtype and shape in which a tensor that is not quantized is copied, where they are not `spec`.
        turned: whether the tensor is a stack of experts that the model holds as `[experts, in, out]`. It is
            read `[experts, out, in]`, and copied as it is stored; codes are stored `[experts, out, in]`.
    """

    name: str
    spec: TensorSpec
    file: str
    coding: Coding | None
    matrix: Matrix
    copied: TensorSpec | None = None
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of elements along each axis."""
        return self.spec.shape

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """Shape in which the tensor is stored where it is not quantized."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.turned else self.shape

    @property
    def dtype(self) -> np.dtype | None:
        """Dtype as stored; None for floats of 4 and 6 bits, which are copied but not read."""
        return self.spec.numpy_dtype

    @property
    def nbytes(self) -> int:
        """Stored bytes, without the bytes of a scale."""
        return self.spec.nbytes

    @property
    def band_step(self) -> int:
        """Bands of the first axis that begin at multiples of this number cut through no tile."""
        if self.coding is None or len(self.shape) != 2:
            return 1
        return rows_per_tile(self.coding.tiling, self.shape)


class Folder(abc.ABC):
    """What any checkpoint folder offers. Reading is safe from several threads.

    Attributes:
        path: path of the folder.
        tensors: all tensors of the folder by name, in the order of its files.
        config: the folder's `config.json`; empty if it has none.
        dtype: dtype that quantized weights dequantize to unless told otherwise: the dtype of the config.
        files: all files that tensors, index and config are read from.
        working_dtype: dtype that quantized weights must dequantize to beside the others; None for any.
        beside: the folder's `hf_quant_config.json`; empty if it has none.
        overlay: folder whose files of the tokenizer stand in place of those in `path`; None for none.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    dtype: np.dtype
    files: list[Path]
    working_dtype: np.dtype | None = None
    beside: Mapping[str, Any] = types.MappingProxyType({})
    overlay: Path | None = None

    @property
    def is_coded(self) -> bool:
        """Whether it holds quantized weights."""
        return any(tensor.coding for tensor in self.tensors.values())

    @abc.abstractmethod
    def read(
        self, name: str, band: slice = slice(None), dtype: np.dtype | None = None
    ) -> np.ndarray | QTensor:
        """A tensor, or a band of its first axis, in memory of its own.

        Args:
            name: one of `tensors`.
            band: rows of the first axis; of a quantized matrix they must not cut through a tile.
            dtype: dtype that a quantized weight dequantizes to; None for the dtype of the folder.

        Returns:
            An array as stored, or for a quantized weight a QTensor of the stored codes and scales.

        Raises:
            DaqError: naming the file and the tensor, if its bytes or its scales make no sense.
        """

    def stored(self, name: str, band: slice = slice(None)) -> dict[str, np.ndarray]:
        """What is stored of a quantized weight, or of a band of its first axis: codes and scales, by name.

        Args:
            name: one of `tensors` that has a coding.
            band: as of `read`.
        """
        raise NotImplementedError(f"{type(self).__name__} stores no codes")

    @abc.abstractmethod
    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The stored bytes of a tensor of any dtype, at most 16 MiB at a time."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes all files."""


def open_folder(path: str | Path) -> Folder:
    """Opens a checkpoint folder: Hugging Face safetensors, in one file or in shards.

    Raises:
        DaqError: in one sentence that names the file, and the tensor where one is at fault.
    """
    path = Path(path)
    if not path.is_dir():
        raise DaqError(f"{path}: not a folder; needed one that holds a checkpoint.")
    return HuggingFaceFolder(path)


def open_safetensors(path: str | Path) -> Folder:
    """Opens a Hugging Face folder, and says of an Orbax checkpoint what reads it.

    Raises:
        DaqError: as `open_folder`, and for an Orbax checkpoint.
    """
    if is_orbax(Path(path)):
        raise DaqError(
            f"{path}: an Orbax checkpoint, which this does not read; load it by `daq_jax.load_weights`, a "
            "quantized one by `daq_jax.load`, and call `daq_jax.inspect` or `daq_jax.compare` on the trees."
        )
    return open_folder(path)


class HuggingFaceFolder(Folder):
    """A `Folder` of safetensors files with a `config.json`, as Hugging Face lays them out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_links(path, (CONFIG, INDEX, SINGLE))
        config = path / CONFIG
        self.config = read_json(config, "the config") if config.is_file() else {}
        beside = path / QUANTIZATION_FILE
        self.beside = read_json(beside, "it") if beside.is_file() else {}
        refuse_unknown(self.config, self.beside, path)
        self.dtype = _dtype_of(self.config)
        self._readers: dict[str, TensorReader] = {}
        files = _weight_files(path)
        names = sorted(set(files.values())) if files else [SINGLE]
        refuse_links(path, names)
        try:
            for name in names:
                self._readers[name] = TensorReader(path / name)
            self._file_of = files or dict.fromkeys(self._readers[SINGLE].entries, SINGLE)
            self.tensors = self._tensors()
            known = (*self._readers, CONFIG, INDEX, QUANTIZATION_FILE)
            self.files = [path / name for name in known if (path / name).is_file()]
        except BaseException:
            self.close()
            raise

    def _tensors(self) -> dict[str, Tensor]:
        missing = [n for n, file in self._file_of.items() if n not in self._readers[file].entries]
        if missing:
            raise DaqError(
                f"{self.path / INDEX}: says that {missing[0]!r} is in {self._file_of[missing[0]]!r}, which "
                f"has no tensor of that name, nor {len(missing) - 1} others; the folder is incomplete."
            )
        unlisted = [
            n for file in self._readers for n in self._readers[file].entries if n not in self._file_of
        ]
        if unlisted:
            raise DaqError(
                f"{self.path / INDEX}: does not list {unlisted[0]!r}, nor {len(unlisted) - 1} others, which "
                "its shards hold and loaders read; save the model again, so that the index lists all."
            )
        placed = sorted(self._file_of, key=lambda n: (self._file_of[n], self._entry(n).start))
        specs = {name: self._entry(name).spec for name in placed}
        codings = find_codings(specs, self._stored, self.config, self.path)
        weight_of = {coding.codes: name for name, coding in codings.items()}
        beside = {part for coding in codings.values() for part in coding.specs} - weight_of.keys()
        turned = (
            specs
            if turns_experts(self.config)
            else turned_stacks(
                {n: spec for n, spec in specs.items() if n not in weight_of and n not in beside}
            )
        )
        found: dict[str, Tensor] = {}
        for stored in (name for name in specs if name not in beside):
            name, spec = weight_of.get(stored, stored), specs[stored]
            coding = codings.get(name)
            if coding is not None and coding.shape != spec.shape:
                spec = TensorSpec("I8", coding.shape)  # as it is read
            tensor = Tensor(name, spec, self._file_of[stored], coding, HF_MATRIX)
            found[name] = _turned(tensor) if stored in turned else tensor
        return found

    def _stored(self, name: str, band: slice = slice(None)) -> np.ndarray:
        return self._readers[self._file_of[name]].read(name, band)

    def _entry(self, name: str) -> Any:
        return self._readers[self._file_of[name]].entries[name]

    def read(
        self, name: str, band: slice = slice(None), dtype: np.dtype | None = None
    ) -> np.ndarray | QTensor:
        """See `Folder.read`."""
        tensor = self.tensors[name]
        coding = tensor.coding
        if coding is None:
            stored = self._stored(name, band)
            return np.ascontiguousarray(np.swapaxes(stored, -1, -2)) if tensor.turned else stored
        try:
            q = coding.decode(coding.stored(self._stored, band), dtype or self.dtype)
        except DaqError as error:
            raise DaqError(f"{self.path / tensor.file}: tensor {name!r}: {error}.") from error
        return dataclasses.replace(q, codes=jnp.asarray(q.codes), scale=jnp.asarray(q.scale))

    def stored(self, name: str, band: slice = slice(None)) -> dict[str, np.ndarray]:
        """See `Folder.stored`."""
        coding = self.tensors[name].coding
        assert coding is not None
        return coding.stored(self._stored, band)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """See `Folder.chunks`."""
        return self._readers[self.tensors[name].file].chunks(name)

    def close(self) -> None:
        """See `Folder.close`."""
        for reader in self._readers.values():
            reader.close()


def _turned(tensor: Tensor) -> Tensor:
    """A tensor; a stack of experts that is stored `[experts, in, out]` as it is read."""
    if len(tensor.shape) != 3 or not is_matrix(tensor.name, 3):
        return tensor
    if tensor.coding:
        return dataclasses.replace(tensor, turned=True)
    experts, inputs, outputs = tensor.shape
    spec = TensorSpec(tensor.spec.dtype, (experts, outputs, inputs))
    return dataclasses.replace(tensor, spec=spec, copied=tensor.spec, turned=True)


def _dtype_of(config: Mapping[str, Any]) -> np.dtype:
    for place in (config, part_of(config, "text_config")):
        for key in ("dtype", "torch_dtype"):
            found = place.get(key)
            if isinstance(found, str) and found.removeprefix("torch.") in _DTYPES:
                return _DTYPES[found.removeprefix("torch.")]
    return _DTYPES["bfloat16"]


def _weight_files(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name by the folder's index; None where all tensors are in the one file."""
    if (path / INDEX).is_file():
        files = _weight_map(path / INDEX)
        if (path / SINGLE).is_file() and SINGLE not in files.values():
            raise DaqError(
                f"{path}: holds {SINGLE} and, by {INDEX}, other shards: transformers loads the first, vLLM "
                "the others; remove whichever is not the model."
            )
        return files
    if not (path / SINGLE).is_file():
        raise DaqError(_nothing_to_read(path))
    return None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter of PEFT; its config alone, beside a whole model, does not count."""
    return (path / ADAPTER).exists() or ((path / ADAPTER_CONFIG).exists() and not _holds_model(path))


def _holds_model(path: Path) -> bool:
    return (path / INDEX).exists() or (path / SINGLE).exists()


def refuse_two_models(path: Path) -> None:
    """Refuses a folder that holds a whole model and an adapter, since either may be meant."""
    if (path / ADAPTER).exists() and _holds_model(path):
        raise DaqError(
            f"{path}: holds both a whole model and an adapter ({ADAPTER}); move one of them to a folder of "
            "its own."
        )


def _nothing_to_read(path: Path) -> str:
    if is_adapter(path):
        return (
            f"{path}: a LoRA adapter, not a whole model; pass it as TUNED beside its base, or merge it into "
            "its base (`merge_and_unload` and `save_pretrained` of peft) and pass the merged folder."
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return f"{path}: holds only pickled weights, which are never read; save it as safetensors first."
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if len(files) > 1:
        return (
            f"{path}: holds {files[0]} and {len(files) - 1} more, but no {INDEX}, which lists tensors: "
            'download it too, or write it: {"weight_map": {tensor name: file name, ...}}.'
        )
    if files:
        return (
            f"{path}: holds {files[0]}, which loaders do not look for; rename it {SINGLE} if it is the model."
        )
    return f"{path}: holds neither {INDEX} nor {SINGLE}; needed a Hugging Face folder of safetensors."


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index, "the index").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DaqError(f"{index}: `weight_map` must be an object of tensor names and file names.")
    there: set[str] = set()  # each file is looked for once
    for name, file in found.items():
        if isinstance(file, str) and file in there:
            continue
        if not isinstance(file, str) or set(file) & set("/\\\0") or not file.endswith(".safetensors"):
            raise DaqError(
                f"{index}: tensor {name!r} is said to be in {file!r}; needed a .safetensors file in it."
            )
        if not _is_file(index.parent / file):
            raise DaqError(f"{index}: tensor {name!r} is in {file!r}, which is not in the folder.")
        there.add(file)
    return found


def _is_file(path: Path) -> bool:
    """Whether a file is there; False for a name that no file can have."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False
