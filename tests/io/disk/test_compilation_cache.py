"""Programs that one process compiled are read by the next, from a folder of the user's own."""

import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest

import daq_jax as daq

PROCESS = """
import jax, jax.numpy as jnp, daq_jax as daq
hits = []
jax.monitoring.register_event_listener(lambda event, **facts: hits.append(event.endswith("cache_hits")))
folder = daq.enable_compilation_cache()
weight = jnp.ones((128, 128))
daq.quantize({"kernel": weight}, {"kernel": weight * 1.01})
print(folder, sum(hits))
"""


def run(**settings: str) -> list[str]:
    left = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    found = subprocess.run(
        [sys.executable, "-c", PROCESS], env=left | settings, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


@pytest.fixture
def config():
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    first = run(XDG_CACHE_HOME=str(tmp_path))
    again = run(XDG_CACHE_HOME=str(tmp_path))
    folder, hits = first[0], int(first[1])
    assert folder.startswith(str(tmp_path / "daq_jax" / "compiled-"))
    assert (hits, again[0]) == (0, folder)
    assert int(again[1]) > 0
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_what_the_user_set_up_stays(tmp_path, config):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert daq.enable_compilation_cache() == tmp_path / "theirs"
    assert daq.enable_compilation_cache(tmp_path / "asked for") == tmp_path / "asked for"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "asked for")


def test_no_folder_is_no_fault_unless_it_was_asked_for(tmp_path, config, monkeypatch):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert daq.enable_compilation_cache() is None
    with pytest.raises(OSError, match="file"):
        daq.enable_compilation_cache(tmp_path / "file" / "below")


def test_a_user_without_a_home_has_no_cache(config, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert daq.enable_compilation_cache() is None
