"""A checkpoint takes the place of another only when it is whole, and of nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import daq_jax as daq
from daq_jax.io.disk.locks import one_writer
from daq_jax.io.orbax.replacing import lock_of, refuse_strangers, replace_later

OLD, NEW = {"kernel": jnp.zeros((8, 8))}, {"kernel": jnp.ones((8, 8))}


@pytest.fixture
def path(tmp_path):
    daq.save(tmp_path / "checkpoint", OLD)
    return tmp_path / "checkpoint"


def value(path) -> float:
    return float(np.asarray(daq.load(path)["kernel"])[0, 0])


def test_the_old_one_is_there_until_the_new_one_is(path):
    there = []

    class Saved:
        def result(self) -> None:
            there.append(value(path))
            daq.save(self.at, NEW)

    def save(at: str) -> Saved:
        Saved.at = at
        return Saved()

    replace_later(path, save).result()
    assert there == [0.0]
    assert value(path) == 1.0
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]


def test_a_save_that_fails_leaves_the_old_one(path):
    class Failing:
        def result(self) -> None:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_later(path, lambda at: Failing()).result()
    assert value(path) == 0.0
    daq.save(path, NEW, overwrite=True)
    assert value(path) == 1.0


@pytest.mark.parametrize("name", ["thesis.txt", "d/notes.md", "default/mine", "photos/7"])
def test_a_checkpoint_with_a_file_of_others_is_not_replaced(name, path):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"of no Orbax checkpoint: '{name}'"):
        daq.save(path, NEW, overwrite=True)
    assert (path / name).read_text() == "mine"
    (path / name).unlink()
    assert value(path) == 0.0


def test_a_folder_without_a_checkpoint_or_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/7").write_text("looks like a chunk of an array")
    with pytest.raises(ValueError, match="of no Orbax checkpoint"):
        daq.save(tmp_path / "a", NEW, overwrite=True)
    (tmp_path / "b").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        daq.save(tmp_path / "b", NEW, overwrite=True)
    refuse_strangers(tmp_path / "nothing")


@pytest.mark.parametrize("ocdbt", [True, False])
def test_any_checkpoint_of_orbax_is_known(ocdbt, tmp_path):
    options = ocp.options.ArrayOptions.Saving(use_ocdbt=ocdbt)
    with ocp.Context(array_options=ocp.options.ArrayOptions(saving=options)):
        ocp.save(tmp_path / "a", {"layer": OLD, "step": 3})
    refuse_strangers(tmp_path / "a")


def test_a_link_stays_a_link(path):
    link = path.parent / "latest"
    link.symlink_to(path)
    daq.save(link, NEW, overwrite=True)
    assert link.is_symlink()
    assert value(path) == 1.0


def test_one_process_at_a_time_replaces(path):
    with (
        one_writer(lock_of(path), path, (1, 1), take_over=False),
        pytest.raises(ValueError, match="another process is at work"),
    ):
        daq.save(path, NEW, overwrite=True)
    assert value(path) == 0.0
