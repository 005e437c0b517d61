"""`python -m benchmarks NAME [options]` runs a benchmark; without a name, lists them. Run it at the root."""

import ast
import importlib
import sys
from pathlib import Path

MODULES = {
    "speed": "benchmarks.speed.study",
    "native_speed": "benchmarks.speed.native",
    "scaling": "benchmarks.speed.scaling",
    "paper": "benchmarks.paper",
    "behaviour": "benchmarks.behaviour.study",
    "native_bases": "benchmarks.behaviour.native.study",
    "real_pair": "benchmarks.behaviour.real_pair",
    "unlearning": "benchmarks.behaviour.unlearning",
    "density": "benchmarks.density.study",
    "density_layer": "benchmarks.density.layer",
    "folders": "benchmarks.folders.study",
    "native_peers": "benchmarks.native_peers.study",
    "tpu": "benchmarks.tpu",
    "tpu_kernel": "benchmarks.tpu_kernel",
    "flax_models": "benchmarks.flax_models",
    "jax_libraries": "benchmarks.jax_libraries.study",
    "inspection": "benchmarks.inspection",
    "comparison_sums": "benchmarks.comparison_sums",
    "exactness": "benchmarks.exactness",
    "codes": "benchmarks.codes",
    "architectures": "benchmarks.architectures.study",
    "layers": "benchmarks.architectures.layers",
    "servers": "benchmarks.servers.study",
    "stops": "benchmarks.stops",
    "fuzz": "benchmarks.fuzzing.study",
}


def opening(module: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    path = Path(__file__).parent.parent.joinpath(*module.split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def listing() -> str:
    """Every name with one line."""
    width = max(map(len, MODULES))
    lines = [f"  {name:<{width}}  {opening(module)}" for name, module in MODULES.items()]
    return "\n".join(["usage: python -m benchmarks NAME [options]", "", *lines, ""])


def main() -> int:
    """Runs the benchmark that the command line names. Returns the exit status: 2 for an unknown name."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *options = words
    if name not in MODULES:
        print(f"no benchmark is called {name!r}\n\n{listing()}", file=sys.stderr)
        return 2
    import tyro

    module = importlib.import_module(MODULES[name])
    how = {"prog": f"python -m benchmarks {name}", "description": module.__doc__, "args": options}
    how["config"] = (tyro.conf.FlagCreatePairsOff,)  # no `--no-quick` beside `--quick`
    if len(module.COMMANDS) == 1:
        return tyro.cli(module.COMMANDS[name], **how) or 0
    return tyro.extras.subcommand_cli_from_dict(module.COMMANDS, **how) or 0


if __name__ == "__main__":
    sys.exit(main())
