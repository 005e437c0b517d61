"""What the content of a file is: its bytes and nothing else, whole where that is cheap."""

import os
import shutil

import pytest

from daq_jax.io.jobs import identity
from daq_jax.io.jobs.identity import Inputs, identity_of

MB = 2**20


@pytest.fixture
def sampled(monkeypatch) -> None:
    """Files of more than 2 MiB are large."""
    monkeypatch.setattr(identity, "_WHOLE", 2 * MB)


def write(path, size: int) -> None:
    path.write_bytes(bytes(size))


def change(path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x")


@pytest.mark.parametrize("at", [0, 1, MB - 1, MB, 2 * MB - 1, 2 * MB + 7])
def test_any_byte_of_a_small_file_counts(at, tmp_path):
    path = tmp_path / "a"
    write(path, 2 * MB + 8)
    before = identity_of(path)
    change(path, at)
    assert identity_of(path) != before
    assert identity_of(path)["bytes"] == 2 * MB + 8


@pytest.mark.parametrize("at", [0, MB - 1, 4 * MB, 4 * MB + 4095, 8 * MB, 9 * MB - 4096, 9 * MB - 1])
def test_of_a_large_file_the_header_the_windows_and_the_end_count(at, sampled, tmp_path):
    path = tmp_path / "a"
    write(path, 9 * MB)
    before = identity_of(path)
    change(path, at)
    assert identity_of(path) != before


def test_what_is_written_between_the_windows_of_a_large_file_is_not_seen(sampled, tmp_path):
    path = tmp_path / "a"
    write(path, 9 * MB)
    before = identity_of(path)
    change(path, 6 * MB)
    assert identity_of(path) == before  # as the module says


def test_every_tensor_as_large_as_a_step_is_seen(sampled, tmp_path):
    path = tmp_path / "a"
    write(path, 20 * MB)
    before = identity_of(path)
    for start in range(0, 16 * MB + 1, 3 * MB + 123):
        path.write_bytes(bytes(start) + b"x" * (4 * MB + 4096) + bytes(20 * MB - start - 4 * MB - 4096))
        assert identity_of(path) != before


def test_size_counts_and_time_permissions_and_place_do_not(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    write(one, 1000)
    shutil.copy(one, other)
    os.utime(other, ns=(1, 2))
    other.chmod(0o600)
    assert identity_of(one) == identity_of(other)
    os.truncate(other, 999)
    assert identity_of(one) != identity_of(other)


def test_changes_of_inputs_are_named(sampled, tmp_path):
    files = {name: tmp_path / name for name in ("same", "touched", "small", "gone", "new", "large", "longer")}
    for name in ("same", "touched", "small", "gone", "longer"):
        write(files[name], 1000)
    write(files["large"], 9 * MB)
    inputs = Inputs(files)
    assert inputs.identities["new"] is None
    assert inputs.changed() == ([], [])
    os.utime(files["touched"])
    files["same"].chmod(0o600)
    change(files["small"], 500)
    files["gone"].unlink()
    write(files["new"], 1)
    change(files["large"], 6 * MB)
    write(files["longer"], 1001)
    assert inputs.changed() == (["small", "gone", "new", "longer"], ["large"])


def test_files_that_nobody_touched_are_not_read_again(tmp_path, monkeypatch):
    write(tmp_path / "a", 1000)
    inputs = Inputs({"a": tmp_path / "a"})
    monkeypatch.setattr(identity, "identity_of", None)
    assert inputs.changed() == ([], [])
