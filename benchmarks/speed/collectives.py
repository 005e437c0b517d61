"""What a compiled program sends between devices, by its text."""

import collections
import math
import re

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(
    r"= (?P<type>\(?[^=]*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLER = re.compile(r" (call|conditional|fusion|fusion-start|async-start)\(")
_CALL = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


def bytes_of_type(text: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, from its type as XLA prints it.

    >>> bytes_of_type("(f32[2,3]{1,0}, f8e4m3fn[4])")
    28
    """
    shapes = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", text)
    return sum(_SIZES.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes)


def collectives(program: str) -> dict[str, int]:
    """Results of each kind of collective, in bytes a device, with loops counted as often as they turn.

    A loop whose number of turns XLA does not state counts once.

    Args:
        program: text of a compiled program.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)

    def walk(name: str, times: int, found: collections.Counter[str]) -> None:
        for line in bodies.get(name, []):
            if match := _COLLECTIVE.search(line):
                found[match[2]] += times * bytes_of_type(match["type"])
            if match := _WHILE.search(line):
                turns = _TURNS.search(line)
                walk(match[1], times * (int(turns[1]) if turns else 1), found)
            elif _CALLER.search(line):
                for callee in _CALL.findall(line):
                    walk(callee, times, found)

    found: collections.Counter[str] = collections.Counter()
    walk(entry, 1, found)
    return dict(found)
