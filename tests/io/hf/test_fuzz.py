"""Folders with damaged headers, indexes and configs: one line and status 1, or a whole result; nothing else.

`DAQ_FUZZ_CASES=10000 pytest -n0 tests/io/test_fuzz.py` for more cases than the everyday few.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daq_jax import cli
from tests.adapters import lora, write_adapter
from tests.hf_folders import CONFIG, in_shards, llama, to_fp8, tuned_from, write_folder
from tests.stops import Disk, Killed

CASES = int(os.environ.get("DAQ_FUZZ_CASES", "40"))
NASTY = (
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    10**400,
    1.5,
    float("nan"),
    None,
    True,
    "",
    "F32",
    "F8_E4M3",
    "I8",
    "F4",
)
PATHS = (
    "[/x]",
    "../x.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "\0",
    "\n",
    "model.safetensors",
    "\ud800",
    "é",
)
VALUES = st.one_of(
    st.sampled_from([*NASTY, *PATHS]),
    st.recursive(
        st.sampled_from([*NASTY, *PATHS]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PATHS), inner, max_size=2)
        ),
        max_leaves=4,
    ),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """A base in FP8 and in one file, and a tuned model in two."""
    here = tmp_path_factory.mktemp("fuzz")
    base = llama(layers=1)
    coded = {}
    for name, x in base.items():
        if "_proj" in name:
            coded[name], coded[f"{name}_scale_inv"] = to_fp8(x)
        else:
            coded[name] = x
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write_folder(here / "sound" / "base", [coded], config)
    write_folder(here / "sound" / "tuned", in_shards(tuned_from(base), 2))
    return here


FILES = (
    "base/model.safetensors",
    "base/config.json",
    "tuned/model-00001-of-00002.safetensors",
    "tuned/model.safetensors.index.json",
    "tuned/config.json",
)


def change_json(draw: Any, value: Any) -> Any:
    """The value with one part of it replaced, removed or renamed, at any depth."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(list(value)))
        match draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename"])):
            case "inside":
                return value | {key: change_json(draw, value[key])}
            case "remove":
                return {k: v for k, v in value.items() if k != key}
            case _:
                new = draw(st.sampled_from([*value, *PATHS, f"{key}_scale_inv"]))
                return {new if k == key else k: v for k, v in value.items()}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], change_json(draw, value[at]), *value[at + 1 :]]
    return draw(VALUES)


def change_bytes(draw: Any, data: bytes, reach: int) -> bytes:
    """A few bytes overwritten, put in or cut off."""
    at = draw(st.integers(0, min(reach, len(data)) - 1))
    piece = draw(st.binary(max_size=9))
    return draw(
        st.sampled_from(
            [data[:at] + piece + data[at + len(piece) :], data[:at] + piece + data[at:], data[:at]]
        )
    )


def changed(draw: Any, path: pathlib.Path) -> bytes:
    data, in_bytes = path.read_bytes(), draw(st.booleans())
    if path.suffix == ".json":
        return change_bytes(draw, data, 10**6) if in_bytes else encode(change_json(draw, json.loads(data)))
    length = int.from_bytes(data[:8], "little")
    if in_bytes:
        return change_bytes(draw, data, 8 + length)
    header = encode(change_json(draw, json.loads(data[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def listing(folder: pathlib.Path) -> list[tuple[str, int]]:
    return sorted(
        (str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    )


FUZZED = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=CASES <= 100,
)


@FUZZED
@given(st.data())
def test_a_damaged_folder_gives_one_line_and_status_1_or_a_whole_result(folders, data):
    here = folders / "case"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folders / "sound", here)
    name = data.draw(st.sampled_from(FILES))
    (here / name).write_bytes(changed(data.draw, here / name))
    before = listing(folders)
    status, said = quantized(here, "tuned")
    outside = [x for x in listing(folders) if not x[0].startswith("case/out/")]
    assert outside == before
    assert (here / "out" / "config.json").exists() == (status == 0)
    if status:
        assert said.startswith("daq-jax: ")
        assert said.count("\n") == 1
        assert str(here) in said or "tensor" in said


def quantized(here: pathlib.Path, tuned: str, *more: str) -> tuple[int, str]:
    """Exit status and messages of the command in a folder."""
    err, words = io.StringIO(), [str(here / word) for word in ("base", tuned, "out")]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        return cli.main(["quantize", *words, "--recipe", "absmax", "--memory", "2", *more]), err.getvalue()


OF_ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
OF_A_JOB = ("out/.daq/work.json", "out/.daq/model-00001-of-00002.safetensors.json")
REPORT = "out/daq_report.json"


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> pathlib.Path:
    """An adapter and its base; the same with a job on them that was stopped, and with a complete one."""
    here = tmp_path_factory.mktemp("states")
    base = {name: x for name, x in llama(layers=1).items() if "mlp" not in name}
    sound = here / "adapter"
    write_folder(sound / "base", in_shards(base, 2))
    write_adapter(sound / "adapter", lora({n[:-7]: (128, 128) for n in base if "_proj" in n}))
    for word, point in (("stopped", 55), ("complete", None)):
        shutil.copytree(sound, here / word)
        disk = Disk(here / word, point)
        with contextlib.suppress(Killed), disk.watched():
            quantized(here / word, "adapter")
    assert all((here / "stopped" / name).exists() for name in OF_A_JOB)
    assert (here / "complete" / REPORT).exists()
    return here


@FUZZED
@given(st.data())
def test_damaged_adapters_and_records_of_jobs_give_one_line_and_status_1_or_a_whole_result(states, data):
    """What a stopped job finished is written anew where its record is damaged, or the job is refused."""
    state, names = data.draw(
        st.sampled_from([("adapter", OF_ADAPTER), ("stopped", OF_A_JOB), ("complete", (REPORT,))])
    )
    here = states / "case"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(states / state, here)
    name = data.draw(st.sampled_from(names))
    (here / name).write_bytes(changed(data.draw, here / name))
    more = ["--overwrite"] * data.draw(st.booleans())
    outside = [x for x in listing(states) if not x[0].startswith("case/out/")]
    status, said = quantized(here, "adapter", *more)
    assert [x for x in listing(states) if not x[0].startswith("case/out/")] == outside
    if status:
        assert status == 1
        assert said.startswith("daq-jax: ")
        assert said.count("\n") == 1
    else:
        assert (here / "out" / "config.json").exists()
