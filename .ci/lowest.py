"""Prints the lowest versions that pyproject.toml declares, as constraints for pip: `>=X` becomes `==X`.

python .ci/lowest.py [EXTRA ...] > constraints.txt
"""

import pathlib
import re
import sys
import tomllib


def lowest(requirement: str) -> str:
    """The constraint for a requirement: `name[extra]>=1.2` gives `name==1.2`.

    Raises:
        SystemExit: if the requirement declares no lower bound, or more than a bound.
    """
    found = re.fullmatch(r"([\w.-]+)(\[[\w,-]+\])?[=>]=([\w.]+)", requirement.replace(" ", ""))
    if found is None:
        sys.exit(f"{requirement}: expected `name>=version`, which this step can turn into `name==version`.")
    return f"{found[1]}=={found[3]}"


def main(extras: list[str]) -> None:
    """Prints one line for each dependency, and for each one of the named extras."""
    root = pathlib.Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    print("\n".join(sorted({lowest(requirement) for requirement in requirements})))


if __name__ == "__main__":
    main(sys.argv[1:])
