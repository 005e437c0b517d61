"""`daq-jax doctor` tells what it can, and of the rest why it cannot."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

import daq_jax as daq
from daq_jax import cli
from daq_jax.display import doctor
from daq_jax.numerics import kernel_choice

PYPROJECT = pathlib.Path(__file__).parents[2] / "pyproject.toml"


def test_versions_and_devices_are_those_of_this_process():
    found = doctor.examine()
    versions = found["versions"]
    assert versions["daq_jax"].startswith(daq.__version__)
    assert versions["numpy"] == np.__version__
    assert versions["jax"] == jax.__version__
    assert set(map(str, jax.local_devices())) <= set(found["devices"])
    assert re.match(r"[\d.]+ GiB, [\d.]+ GiB unused; `quantize` takes", found["machine"]["memory"])


def test_every_dependency_is_among_the_versions():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    needed = {re.split(r"[\[><=]", line)[0] for line in project["dependencies"]}
    assert needed - {"etils"} <= set(doctor.PACKAGES)
    plot = {re.split(r"[><=]", line)[0] for line in project["optional-dependencies"]["plot"]}
    assert plot == {name for name, (_, install) in doctor.EXTRAS.items() if "daq-jax[plot]" in install}


def test_a_missing_package_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.examine()["extras"]["jinja2"].endswith("pip install 'daq-jax[plot]'")
    assert doctor.examine()["extras"]["qwix"].startswith("missing: ")


def test_what_cannot_be_found_out_is_told_and_the_rest_too(monkeypatch):
    def broken(*_):
        raise OSError("no such\n  thing")

    monkeypatch.setattr(os, "sysconf", broken)
    monkeypatch.setattr(jax, "local_devices", broken)
    monkeypatch.setattr(importlib.metadata, "version", broken)
    found = doctor.examine()
    assert found["machine"]["memory"] == "could not be found out: OSError: no such thing"
    assert found["devices"]["JAX"].startswith(
        "does not start: OSError: no such thing. Is JAX_PLATFORMS right"
    )
    assert found["versions"]["jax"] == "could not be found out: OSError: no such thing"
    assert found["machine"]["cores"]
    assert doctor.text(found).count("\n  ") == sum(map(len, found.values()))


@pytest.mark.parametrize(("capability", "why"), [("8.0", "8.0 has no FP8 instructions"), ("9.0", "")])
def test_kernels_are_refused_to_gpus_without_fp8(capability, why, monkeypatch):
    class Gpu:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Gpu()])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    assert re.search(why, kernel_choice.why_no_kernels.__wrapped__())
    assert bool(why) == bool(kernel_choice.why_no_kernels.__wrapped__())


def test_the_cache_has_a_folder_and_a_size(tmp_path, monkeypatch):
    (tmp_path / "program").write_bytes(bytes(3 * 2**19))
    monkeypatch.setattr(doctor, "_cache", lambda: tmp_path)
    assert doctor.examine()["compiled programs"] == {"folder": str(tmp_path), "size": "1.5 MiB in 1 files"}


def test_the_command_prints_lines_or_one_json_object(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "versions"
    assert any(line.startswith("  GPU kernels  ") for line in lines)
    assert cli.main(["doctor", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [line for line in lines if line and line[0] != " "]


def test_the_command_does_not_fail_where_jax_does_not_start():
    call = "import sys; from daq_jax.cli import main; sys.exit(main(['doctor']))"
    environment = os.environ | {"JAX_PLATFORMS": "nothing_of_the_kind"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "  does not start: " in done.stdout
