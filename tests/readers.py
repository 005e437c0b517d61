"""The readers of files that others wrote, each as a function of the bytes of one such file.

Whatever the bytes are, a reader gives a result or raises a `DaqError`. `benchmarks/fuzz.py` looks for bytes
of which it does neither, and `tests/io/test_corpus.py` tries all that it has found.
"""

import abc
import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import socket
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy

import daq_jax as daq
from daq_jax.io.disk import locks
from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.folders import Folder, open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from daq_jax.io.hf.tensor_files import TensorReader
from daq_jax.io.jobs.as_base import plan_as_base
from daq_jax.io.jobs.compare_folders import facts_of_folders
from daq_jax.io.jobs.journal import Journal, Work
from daq_jax.io.jobs.options import in_layout
from daq_jax.io.jobs.planning import make_plan
from tests.adapters import CONFIG as ADAPTER_CONFIG
from tests.adapters import lora, write_adapter
from tests.hf_folders import CONFIG, Tensors, in_shards, llama, to_fp8, tuned_from, write_folder

CORPUS = pathlib.Path(__file__).parent / "corpus"  # a list of texts for each reader, one character a byte
LARGEST = 2**22  # bytes of tensors that are made for a header
BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}
BYTES |= {"I64": 8, "F64": 8, "BOOL": 1}
MODULE = "model.layers.0.mlp.up_proj"
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            "input_activations": {"dynamic": True},
        }
    },
    "ignore": ["lm_head", "re:.*gate$"],
    "kv_cache_scheme": None,
}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": []}}


class Reader(abc.ABC):
    """A reader of one kind of file.

    Attributes:
        name: what it reads, one word.
        file: path of the file below the folder that it works in.
    """

    name: str
    file: str

    def __init__(self, here: pathlib.Path) -> None:
        self.here, self.path = here, here / self.file
        self.prepare()

    @abc.abstractmethod
    def prepare(self) -> None:
        """Makes the folders in which the file stands."""

    @abc.abstractmethod
    def seeds(self) -> list[bytes]:
        """Sound files to begin with."""

    @abc.abstractmethod
    def look(self) -> None:
        """Reads the file, and does with what it says all that a job does before its work."""

    def read(self, data: bytes) -> str:
        """What a `DaqError` says of a file of these bytes; "" if there is none."""
        self.put(data)
        try:
            self.look()
        except daq.DaqError as error:
            return str(error)
        return ""

    def put(self, data: bytes) -> None:
        """Writes the file."""
        self.path.write_bytes(data)


class Header(Reader):
    """A whole safetensors file."""

    name, file = "header", "model.safetensors"

    def prepare(self) -> None:
        self.here.mkdir(parents=True)

    def seeds(self) -> list[bytes]:
        arrays = np.arange(4, dtype=np.float32), np.ones((2, 3), np.int8), np.zeros((), np.int64)
        return [safetensors.numpy.save(dict(zip("abc", arrays, strict=True))), whole({})]

    def look(self) -> None:
        reader = TensorReader(self.path)
        with contextlib.closing(reader):
            for name in reader.entries:
                with contextlib.suppress(daq.DaqError):  # of a dtype that is only copied
                    reader.read(name)
                list(reader.chunks(name))


class Index(Reader):
    """The index of a folder in shards."""

    name, file = "index", "folder/model.safetensors.index.json"

    def prepare(self) -> None:
        write_folder(self.path.parent, in_shards(small(), 2))

    def seeds(self) -> list[bytes]:
        return [self.path.read_bytes()]

    def look(self) -> None:
        plan(self.path.parent)


class Config(Reader):
    """The config of a model whose weights are partly in FP8."""

    name, file = "config", "folder/config.json"

    def prepare(self) -> None:
        write_folder(self.path.parent, [in_fp8()])

    def seeds(self) -> list[bytes]:
        values = CONFIG, CONFIG | FP8, CONFIG | {"quantization_config": COMPRESSED}
        more = {"num_experts": 8, "vocab_size": 300, "text_config": CONFIG | FP8, "architectures": ["A"]}
        return [json.dumps(value).encode() for value in (*values, CONFIG | more)]

    def look(self) -> None:
        plan(self.path.parent)


class Quantization(Config):
    """The file in which ModelOpt names a quantization."""

    name, file = "quantization", "folder/hf_quant_config.json"

    def seeds(self) -> list[bytes]:
        cache = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}}
        mixed = {"quantized_layers": {MODULE: {"quant_algo": "W4A16_NVFP4"}}, "quant_algo": "MIXED_PRECISION"}
        return [json.dumps(value).encode() for value in (MODELOPT, cache, {"quantization": mixed})]


class Names(Reader):
    """The header of a model, over tensors of zeros: names, dtypes and shapes say what is quantized."""

    name, file = "names", "folder/model.safetensors"

    def prepare(self) -> None:
        write_folder(self.path.parent, [in_fp8()], CONFIG | FP8)

    def seeds(self) -> list[bytes]:
        rows = 64
        found: list[dict[str, tuple[str, tuple[int, ...]]]] = [
            {"": ("F8_E4M3", (rows, 64)), "_scale_inv": ("F32", (1, 1))},
            {"": ("I8", (rows, 64)), "_scale": ("BF16", (rows, 1)), "_zero_point": ("I8", (rows, 1))},
            {"_packed": ("I32", (rows, 8)), "_scale": ("BF16", (rows, 2)), "_shape": ("I64", (2,))},
            {"_packed": ("U8", (rows, 32)), "_scale": ("U8", (rows, 2))},
            {
                "_packed": ("U8", (rows, 32)),
                "_scale": ("F8_E4M3", (rows, 4)),
                "_global_scale": ("F32", (1,)),
            },
            {"": ("U8", (rows, 32)), "_scale": ("F8_E4M3", (rows, 4)), "_scale_2": ("F32", ())},
            {"_blocks": ("U8", (2, rows, 2, 16)), "_scales": ("U8", (2, rows, 2))},
            {"": ("BF16", (rows, 64)), ".input_scale": ("F32", ())},
        ]
        return [
            self.text({f"{MODULE}.weight{end}": spec for end, spec in case.items()} | self.others())
            for case in found
        ]

    @staticmethod
    def others() -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensors that are copied."""
        return {"model.norm.weight": ("BF16", (64,)), "lm_head.weight": ("F32", (4, 64))}

    @staticmethod
    def text(specs: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
        """A header as JSON, without offsets."""
        return json.dumps({name: [dtype, *shape] for name, (dtype, shape) in specs.items()}).encode()

    def put(self, data: bytes) -> None:
        """Writes a file whose tensors are those of a JSON object: name -> [dtype, *shape]."""
        self.path.write_bytes(whole(tensors_of(data)))

    def look(self) -> None:
        plan(self.path.parent)


class Adapter(Reader):
    """The config of an adapter."""

    name, file = "adapter", "adapter/adapter_config.json"

    def prepare(self) -> None:
        self.base = open_folder(write_folder(self.here / "base", [small()]))
        write_adapter(self.path.parent, lora({MODULE: (64, 64)}))

    def seeds(self) -> list[bytes]:
        patterns = {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"^model\\..*up_proj$": 2.5}}
        saved = {"modules_to_save": ["lm_head"], "bias": "all", "use_rslora": True, "fan_in_fan_out": True}
        return [json.dumps(ADAPTER_CONFIG | more).encode() for more in ({}, patterns, saved)]

    def look(self) -> None:
        with contextlib.closing(open_tuned(self.here / "adapter", self.base)) as tuned:
            for name in tuned.tensors:
                with contextlib.suppress(daq.DaqError):
                    tuned.read(name)


class AdapterNames(Adapter):
    """The header of an adapter, over tensors of zeros."""

    name, file = "adapter_names", "adapter/adapter_model.safetensors"
    text = staticmethod(Names.text)
    put = Names.put

    def prepare(self) -> None:
        self.base = open_folder(write_folder(self.here / "base", [small()]))
        write_adapter(
            self.path.parent, {"x": np.zeros(1, np.float32)}, bias="all", modules_to_save=["lm_head"]
        )

    def seeds(self) -> list[bytes]:
        start = f"base_model.model.{MODULE}"
        pair = {f"{start}.lora_A.weight": ("F32", (4, 64)), f"{start}.lora_B.weight": ("F32", (64, 4))}
        whole_head = {"base_model.model.lm_head.weight": ("BF16", (20, 64))}
        table = {
            "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (4, 20)),
            "base_model.model.model.embed_tokens.lora_embedding_B": ("BF16", (64, 4)),
            "base_model.model.model.embed_tokens.base_layer.weight": ("F16", (20, 64)),
        }
        other = {
            f"{start}.base_layer.lora_A.default.weight": ("F32", (4, 64)),
            f"{start}.lora_magnitude_vector": ("F32", (64,)),
            "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (4, 20)),
            "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", (64, 4)),
        }
        return [self.text(case) for case in (pair, pair | whole_head, pair | other, pair | table, table)]


class Records(Reader):
    """What a job that goes on has noted: what it is, and what is finished."""

    name, file = "records", "out/.daq/work.json"

    def prepare(self) -> None:
        self.path.parent.mkdir(parents=True)
        identity = {"bytes": 8, "content": "00ff"}
        settings = {"version": "0.1.0", "recipe": {"type": "Recipe", "search": None}, "rows": {MODULE: 4}}
        self.work = Work({"base/config.json": identity, "tuned/a": identity}, settings, ["config.json"])
        self.journal = Journal(self.path.parent, self.here / "out", self.work)

    def seeds(self) -> list[bytes]:
        self.journal.open()
        begun = self.path.read_bytes()
        self.journal.finish("unit", {"crc32": {"a": 1}, "figures": {"a": {"count": 1.0}}})
        return [begun, (self.path.parent / "unit.json").read_bytes()]

    def look(self) -> None:
        begun = self.journal.begun
        if begun is not None:
            self.work.unlike(begun)
        shutil.copy(self.path, self.path.parent / "unit.json")
        self.journal.record("unit")


class Lock(Reader):
    """The lock that another process left, where files can be locked and where they cannot."""

    name, file = "lock", "out/.daq.lock"

    def prepare(self) -> None:
        self.path.parent.mkdir(parents=True)

    def seeds(self) -> list[bytes]:
        owners = locks.Owner("here", "", 2**22 + 1, "2026"), locks.Owner("elsewhere", "00-11", 7, "2026")
        return [json.dumps(dataclasses.asdict(owner)).encode() for owner in owners]

    def look(self) -> None:
        with mock.patch.object(socket, "gethostname", return_value="here"):
            with mock.patch.object(locks, "_held", return_value=None), contextlib.suppress(daq.DaqError):
                self.take()
            self.take()

    def take(self) -> None:
        """Takes the lock."""
        with locks.one_writer(self.here / "out" / ".daq", self.here / "out", (1, 1), take_over=False):
            pass


class Report(Reader):
    """The report of a complete result, of which a later call looks whether it is whole."""

    name, file = "report", "out/daq_report.json"

    def prepare(self) -> None:
        base = {name: x for name, x in small().items() if MODULE in name}
        write_folder(self.here / "base", [base])
        write_folder(self.here / "tuned", [tuned_from(base)])
        self.look()

    def seeds(self) -> list[bytes]:
        return [self.path.read_bytes()]

    def look(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.here / "out" / ".daq.lock").unlink()
        folders = [self.here / word for word in ("base", "tuned", "out")]
        facts_of_folders(*folders)
        daq.quantize_folder(*folders, daq.recipes.absmax, format="fp8-channel", memory_gb=2)


READERS: dict[str, type[Reader]] = {
    kind.name: kind
    for kind in (Header, Index, Config, Quantization, Names, Adapter, AdapterNames, Records, Lock, Report)
}


def small() -> Tensors:
    """A model of few and small tensors."""
    found = llama(layers=1, width=64, inner=64)
    return {n: x[:20] if n.startswith(("lm_head", "model.embed")) else x for n, x in found.items()}


def in_fp8() -> Tensors:
    """The same, its layer's weights in FP8."""
    found: Tensors = {}
    for name, x in small().items():
        found[name] = x
        if "_proj" in name:
            found[name], found[f"{name}_scale_inv"] = to_fp8(x.astype(np.float32))
    return found


def plan(path: pathlib.Path) -> None:
    """All plans of a folder as its own base."""
    with contextlib.closing(open_folder(path)) as folder:
        for layout in ("fp8-block", "int4-group"):
            with contextlib.suppress(daq.DaqError):
                plan_in(folder, layout)
        plan_as_base(folder, folder, daq.recipes.absmax, memory=2 * 10**9)


def plan_in(folder: Folder, layout: str) -> None:
    """The plan of a folder in a layout."""
    recipe = in_layout(daq.recipes.absmax, LAYOUTS[layout])
    make_plan(folder, folder, recipe, LAYOUTS[layout], memory=2 * 10**9)


def tensors_of(data: bytes) -> dict[str, Any]:
    """The header of tensors that a JSON object names: name -> [dtype, *shape], one after another.

    What cannot be laid out so, or is too large to be made, is left out.
    """
    try:
        wanted = json.loads(data)
    except (ValueError, RecursionError):
        wanted = {}
    end, found = 0, {}
    for name, entry in wanted.items() if isinstance(wanted, dict) else ():
        dtype, *shape = entry if isinstance(entry, list) and entry else [None]
        if (
            isinstance(dtype, str)
            and dtype in BYTES
            and all(type(n) is int and 0 <= n <= LARGEST for n in shape)
        ):
            nbytes = math.prod(shape) * BYTES[dtype]
            if end + nbytes <= LARGEST:
                found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
                end += nbytes
    return found


def whole(header: dict[str, Any]) -> bytes:
    """A safetensors file with this header. Numbers of I64, which hold shapes, are 64; other bytes are 1."""
    text = json.dumps(header, ensure_ascii=True).encode()
    body = b""
    for entry in header.values():
        start, end = entry["data_offsets"]
        body += (
            b"\x40\0\0\0\0\0\0\0" * ((end - start) // 8) if entry["dtype"] == "I64" else b"\1" * (end - start)
        )
    return len(text).to_bytes(8, "little") + text + body
