"""A PEFT LoRA adapter on its base, as the folder of a tuned model that exists nowhere on the disk.

    base = open_folder("some/model")
    tuned = open_tuned("some/adapter", base)
    tuned.read("model.layers.0.mlp.up_proj.weight")  # float32: the base's weight + scale * B A

The sum is float32 whatever the dtype of the base, so the change is not rounded to a grid of bfloat16. Tensors
that the adapter leaves alone are those of the base, byte for byte.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from daq_jax.errors import DaqError, refuse
from daq_jax.io.disk.links import refuse_links
from daq_jax.io.hf.architectures import interleaves_experts, turns_experts, turns_linear_layers
from daq_jax.io.hf.codings import HF_MATRIX
from daq_jax.io.hf.folders import (
    ADAPTER,
    Folder,
    Tensor,
    is_adapter,
    open_safetensors,
    refuse_two_models,
)
from daq_jax.io.hf.lora import (
    AddedBias,
    Both,
    Change,
    Contents,
    LowRank,
    Module,
    Orientation,
    Place,
    Replaced,
    check_finite,
    fits,
    places_of,
    sort_tensors,
)
from daq_jax.io.hf.lora_config import CONFIG, LoraConfig, read_lora_config
from daq_jax.io.hf.tensor_files import TensorReader, TensorSpec
from daq_jax.qtensor import QTensor

_MOST = 2**22  # elements that are copied at a time
# How names begin in a model in memory and in its checkpoint: the first pair that fits all is taken.
_RENAMED = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("", "model."),
)


def open_tuned(path: str | Path, base: Folder) -> Folder:
    """Opens the folder of a tuned model: a checkpoint, or an adapter of `base`.

    Raises:
        DaqError: as `open_safetensors`; of an adapter, naming each tensor that is not read or that fits no
            tensor of the base.
    """
    path = Path(path)
    refuse_two_models(path)
    return AdaptedFolder(base, path) if is_adapter(path) else open_safetensors(path)


class AdaptedFolder(Folder):
    """A base with a PEFT LoRA adapter on it; `close` leaves the base open."""

    working_dtype = np.dtype(np.float32)

    def __init__(self, base: Folder, path: Path) -> None:
        self.path, self.overlay = base.path, path
        self.config, self.dtype = base.config, base.dtype
        self._base = base
        refuse_links(path, (CONFIG, ADAPTER))
        lora = read_lora_config(path)
        self._reader = TensorReader(_file_of(path))
        self.files = [path / CONFIG, path / ADAPTER]
        try:
            self._changes = _Matching(base, self._reader, lora).found()
        except BaseException:
            self.close()
            raise
        self.tensors = {n: self._after(t) if n in self._changes else t for n, t in base.tensors.items()}

    def _after(self, tensor: Tensor) -> Tensor:
        """A tensor that the adapter changes: as it is read, and as it is stored where it is not quantized."""
        stored = tensor.copied or tensor.spec
        if tensor.coding is not None:
            stored = TensorSpec.of(self.dtype, tensor.plain_shape)
        tuned = Tensor(tensor.name, TensorSpec("F32", tensor.shape), tensor.file, None, HF_MATRIX, stored)
        return dataclasses.replace(tuned, turned=tensor.turned)

    def read(
        self, name: str, band: slice = slice(None), dtype: np.dtype | None = None
    ) -> np.ndarray | QTensor:
        """See `Folder.read`; a tensor that the adapter changes is float32."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name, band, dtype or self.working_dtype)
        before = self._base.read(name, band, dtype or self.working_dtype)
        before = np.asarray(jax.device_get(before.dequantize()) if isinstance(before, QTensor) else before)
        first = band.indices(self.tensors[name].shape[0])[0] if before.ndim else 0
        return check_finite(change.add_to(before.astype(np.float32, copy=False), first), name)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """See `Folder.chunks`."""
        if name not in self._changes:
            yield from self._base.chunks(name)
            return
        tensor, step = self.tensors[name], self._base.tensors[name].band_step
        assert tensor.copied is not None
        length = tensor.shape[0] if tensor.shape else 1
        rows = max(step, _MOST * length // max(tensor.spec.size, 1) // step * step)
        for i in range(0, length, rows):
            tuned = self.read(name, slice(i, min(i + rows, length)))
            assert isinstance(tuned, np.ndarray)
            narrow = check_finite(tuned.astype(tensor.copied.numpy_dtype), name)
            yield (
                np.ascontiguousarray(np.swapaxes(narrow, -1, -2) if tensor.turned else narrow)
                .reshape(-1)
                .view(np.uint8)
            )

    def close(self) -> None:
        """Closes the adapter; its base stays open."""
        self._reader.close()


def _file_of(path: Path) -> Path:
    if (path / ADAPTER).is_file():
        return path / ADAPTER
    if (path / "adapter_model.bin").exists():
        raise DaqError(f"{path}: holds a pickled adapter, which is never read; save it as {ADAPTER}.")
    raise DaqError(f"{path}: has {CONFIG} but no {ADAPTER}; save the adapter again.")


class _Matching:
    """The tensors of an adapter, matched with those of a base."""

    def __init__(self, base: Folder, reader: TensorReader, lora: LoraConfig) -> None:
        self.base, self.reader, self.lora = base, reader, lora
        self.shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
        contents = sort_tensors(reader)
        self.problems = list(contents.problems)
        self.contents, self.begins = contents, self._renaming(contents)
        self.changes: dict[str, Change] = {}

    def found(self) -> dict[str, Change]:
        """What the adapter does to each tensor of the base, by name.

        Raises:
            DaqError: naming each tensor that is not read, or that fits none of the base.
        """
        for module in self.contents.modules:
            self._add_module(module)
        for name, stored in self.contents.whole.items():
            self._add_whole(name, stored)
        self._check_tied()
        if not self.changes and not self.problems:
            self.problems.append("it changes nothing")
        if self.problems:
            refuse(
                f"{self.reader.path}: does not fit {self.base.path}",
                self.problems,
                "Pass the base that the adapter was trained on, or merge the two with peft.",
                one_line=True,
            )
        return self.changes

    def _renaming(self, contents: Contents) -> tuple[str, str]:
        """How names begin in the adapter and in the base."""
        for pair in _RENAMED:
            known = (self._in_base(m, pair) for m in contents.modules)
            if all(map(self._places, known)):
                return pair
        return "", ""

    @staticmethod
    def _in_base(module: Module, begins: tuple[str, str]) -> Module:
        return dataclasses.replace(module, name=_renamed(module.name, begins))

    def _places(self, module: Module) -> list[list[Place]]:
        return places_of(module, self.shapes, interleaves_experts(self.base.config))

    def _add_module(self, module: Module) -> None:
        here = self._in_base(module, self.begins)
        parameters = self._places(here)
        a, b = (self.reader.entries[module.tensors[side]].spec.shape for side in "AB")
        fitting = [(p, ways) for p in parameters if (ways := self._ways(p[0], a, b, module))]
        if not fitting:
            there = ", ".join(f"{p[0].name!r} {p[0].shape}" for p in parameters)
            why = f"fits none of {there}" if parameters else _why_unmatched(here.name, self.shapes)
            self.problems.append(f"module {module.name!r} with A {a} and B {b} {why}")
            return
        parameter, ways = fitting[0]
        alone = parameter[0].experts == 1
        key = module.name if alone else f"{module.name}.{_parameter_name(parameter[0].name)}"
        rank = a[0] // parameter[0].experts
        if rank != self.lora.rank_of(key):
            self.problems.append(
                f"module {key!r} has rank {rank} but the config says {self.lora.rank_of(key)}"
            )
        elif len(ways) > 1:
            self.problems.append(f"module {key!r} is square, and nothing says which of its axes are inputs")
        else:
            self._put(module, here, parameter, ways[0], self.lora.scale_of(key))

    def _put(
        self, module: Module, here: Module, parameter: list[Place], way: Orientation, scale: float
    ) -> None:
        names = module.tensors
        for place in parameter:
            where = place.experts, place.expert, place.first_row, place.step
            change = LowRank(self.reader, names["A"], names["B"], scale, *where, way)
            self._change(place.name, change)
        if "bias" in names:
            stored, bias = self.reader.entries[names["bias"]].spec.shape, f"{here.name}.bias"
            if self.shapes.get(bias) != stored:
                self.problems.append(f"{names['bias']!r} {stored} has no partner {bias!r} of its shape")
            else:
                self._change(bias, AddedBias(self.reader, names["bias"], scale))

    def _ways(
        self, place: Place, a: tuple[int, ...], b: tuple[int, ...], module: Module
    ) -> list[Orientation]:
        """The ways in which factors give a tensor, or the parameter that it is a part of."""
        *_, outputs, inputs = place.shape
        ways = fits((place.rows or outputs, inputs), a, b, place.experts)
        if place.experts > 1:
            # In a model that holds stacks [experts, in, out] peft keeps the order of inputs.
            turned = self.base.tensors[place.name].turned or turns_experts(self.base.config)
            return ["out_in"] if turned and "out_in" in ways else ways if not turned else []
        stored_in_out = module.table or (
            not place.name.endswith("lm_head.weight")
            and (self.lora.fan_in_fan_out or turns_linear_layers(self.base.config))
        )
        wanted: Orientation = "in_out" if stored_in_out else "out_in"
        return [wanted] if wanted in ways else []

    def _add_whole(self, name: str, stored: str) -> None:
        here, shape = _renamed(name, self.begins), self.reader.entries[stored].spec.shape
        parts, is_bias = name.split("."), name.endswith(".bias") and self.lora.biases
        is_table = any(x in parts for x in ("embed_tokens", "lm_head", "wte"))
        if not (is_bias or is_table or set(parts) & set(self.lora.saved)):
            self.problems.append(f"{stored!r} is neither of LoRA nor in modules_to_save")
        elif here not in self.shapes:
            self.problems.append(f"{stored!r} matches no tensor of the base")
        elif self.shapes[here] != shape:
            self.problems.append(f"{stored!r} is {shape} but {here!r} of the base is {self.shapes[here]}")
        elif ".base_layer" in stored and here in self.changes:
            self.changes[here] = Both(Replaced(self.reader, stored), self.changes[here])
        else:
            self._change(here, Replaced(self.reader, stored))

    def _change(self, name: str, change: Change) -> None:
        if name in self.changes:
            self.problems.append(f"{name!r} of the base is changed twice")
        elif self.base.tensors[name].coding is None and not _is_float(self.base.tensors[name]):
            self.problems.append(
                f"{name!r} of the base is {self.base.tensors[name].spec.dtype} without a scale"
            )
        self.changes[name] = change

    def _check_tied(self) -> None:
        """An embedding that is the head too must have changed as one."""
        if self.base.config.get("tie_word_embeddings") is not True or self.lora.ties:
            return
        for name in self.changes:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                self.problems.append(
                    f"{name!r} is changed, but the base ties embedding and head (tie_word_embeddings), which "
                    "the adapter would part"
                )


def _renamed(name: str, begins: tuple[str, str]) -> str:
    old, new = begins
    return new + name.removeprefix(old) if name.startswith(old) else name


def _parameter_name(name: str) -> str:
    """Name of the parameter of a stack of experts that a tensor is, or is a part of."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return "down_proj" if last in ("down_proj", "w2") else "gate_up_proj"


def _why_unmatched(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why no tensor of the base is that of a module."""
    experts, found, part = module.partition(".experts.")
    stack = f"{experts}.experts.{_parameter_name(part)}"
    if not found or stack not in shapes:
        return "matches no tensor of the base"
    return (
        f"is of one expert, and the base holds experts as the stack {stack!r}: save the model that it was "
        "trained on with the adapter merged, and pass that folder"
    )


def _is_float(tensor: Tensor) -> bool:
    return tensor.spec.dtype in ("BF16", "F16", "F32")
