"""Fails on a TOML or YAML file that does not parse.

python .ci/parse.py FILE ...
"""

import sys
import tomllib
from pathlib import Path

import yaml


def problem(path: Path) -> str | None:
    """What is wrong with a file, or None."""
    try:
        tomllib.loads(path.read_text()) if path.suffix == ".toml" else yaml.safe_load(path.read_text())
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        return f"{path}: {error}"
    return None


def main(names: list[str]) -> int:
    """The exit status: 1 if a file does not parse."""
    found = [text for name in names if (text := problem(Path(name)))]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
