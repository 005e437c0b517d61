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
from tests.hf_folders import CONFIG, in_shards, llama, to_fp8, tuned_from, write_folder

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


@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=CASES <= 100,
)
@given(st.data())
def test_a_damaged_folder_gives_one_line_and_status_1_or_a_whole_result(folders, data):
    here = folders / "case"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folders / "sound", here)
    name = data.draw(st.sampled_from(FILES))
    (here / name).write_bytes(changed(data.draw, here / name))
    before, err = listing(folders), io.StringIO()
    words = ["base", "tuned", "out"]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        options = ["--recipe", "absmax", "--memory", "2"]
        status = cli.main(["quantize", *(str(here / word) for word in words), *options])
    outside = [x for x in listing(folders) if not x[0].startswith("case/out/")]
    assert outside == before
    assert (here / "out" / "config.json").exists() == (status == 0)
    if status:
        assert err.getvalue().startswith("daq-jax: ")
        assert err.getvalue().count("\n") == 1
        assert str(here) in err.getvalue() or "tensor" in err.getvalue()
