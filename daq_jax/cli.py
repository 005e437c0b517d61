"""The command `daq-jax`: words to values, values to calls."""

import sys

import tyro

from daq_jax import __version__


def main() -> None:
    """Entry point of the command."""
    if "--version" in sys.argv[1:]:
        print(f"daq-jax {__version__}")
        return
    tyro.extras.SubcommandApp().cli(prog="daq-jax")
