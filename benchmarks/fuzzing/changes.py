"""Random changes of a file: of its bytes, or of the JSON that it holds."""

import ast
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import daq_jax

NASTY = (-1, 0, 1, 2, 2**31, 2**63, 2**70, 10**400, 0.5, 1e999, float("nan"), None, True, False)
NASTY += ("", "\ud800", "é", "\n", "\0", "..", "../x.safetensors", "/etc/passwd", "re:(a+)+$", [], {}, [[]])
_DEEP = 3000  # levels
_MOST_BODY = 4096  # bytes put behind a header
Change = Callable[[bytes, int], bytes]  # of bytes, with the most that may come back


def words_of_readers() -> list[str]:
    """The short strings in the source of `daq_jax.io`: names of keys, of methods, and ends of names."""
    found = set[str]()
    for path in Path(daq_jax.__file__).parent.joinpath("io").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {node.value} if re.fullmatch(r"\S{1,40}", node.value) else set()
    return sorted(found)


def change(data: bytes, most: int, draw: random.Random, words: list[str], bytewise: Change) -> bytes:
    """A file with some of its bytes changed, or with some parts of its JSON.

    Args:
        data: the file: JSON, or a safetensors file.
        most: bytes of the result at most.
        draw: source of all choices.
        words: strings to put in.
        bytewise: changes any bytes.
    """
    how = draw.random()
    length = int.from_bytes(data[:8], "little")
    in_front = data[8:9] == b"{" and length <= len(data) - 8
    text = data[8 : 8 + length] if in_front else data
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return bytewise(data, most)
    if how < 0.3:
        return bytewise(data, most)
    if how < 0.4:
        text = bytewise(text, most - 8)
    elif how < 0.41:
        text = b'{"a":' + b"[" * _DEEP + b"]" * _DEEP + b"}"
    else:
        for _ in range(draw.choice((1, 1, 2, 5))):
            value = changed(draw, value, words)
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    found = _with_header(text, data[8 + length :], value) if in_front else text
    return found[:most]


def changed(draw: random.Random, value: Any, words: list[str]) -> Any:
    """A JSON value with one part of it replaced, removed, renamed or copied, at any depth."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                new = draw.choice((*value, draw.choice(words), key + draw.choice(words)))
                return {new if k == key else k: v for k, v in value.items()}
            case 2:
                return value | {draw.choice((draw.choice(words), key + draw.choice(words))): value[key]}
            case 3:
                return value | {draw.choice(words): leaf(draw, words)}
            case _:
                return value | {key: changed(draw, value[key], words)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        match draw.randrange(5):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case _:
                return [*value[:at], changed(draw, value[at], words), *value[at + 1 :]]
    if type(value) is int and draw.random() < 0.6:
        return draw.choice((value + 1, value - 1, 2 * value, value // 2, -value))
    return leaf(draw, words)


def leaf(draw: random.Random, words: list[str]) -> Any:
    """A value that is put in."""
    match draw.randrange(6):
        case 0:
            return [draw.choice(NASTY), draw.choice(words)]
        case 1:
            return {draw.choice(words): draw.choice(NASTY)}
        case 2 | 3:
            return draw.choice(words)
        case _:
            return draw.choice(NASTY)


def _with_header(text: bytes, body: bytes, header: Any) -> bytes:
    """A safetensors file whose length is right, and whose bytes go as far as the header says, if not far."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        ends += [n for n in offsets if type(n) is int] if isinstance(offsets, list) else []
    end = min(max(ends), _MOST_BODY)
    return len(text).to_bytes(8, "little") + text + body[:end].ljust(end, b"\1")
