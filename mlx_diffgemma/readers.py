"""JSON, TOML and JSON lines from files: bounded in size and depth, and every error names its file.

JSON that readers understand differently (a key twice, NaN, infinity, half a character) is refused.
"""

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .disk import reason
from .errors import CheckpointError, ConfigError
from .values import Fault, dotted, half_character, shown

MAX_BYTES = 64_000_000  # of a file; the released tokenizer.json has 32 million
MAX_DEPTH = 64  # of lists and objects in one another; the released config has 4


def read_bytes(file: Path, *, fault: Fault = CheckpointError, limit: int = MAX_BYTES) -> bytes:
    """A whole file. Errors: `fault` when it is absent, not a file, larger than `limit`, or cannot be read."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(limit + 1)
    except FileNotFoundError:
        raise fault(f"{file.name} is missing in {file.parent}.") from None
    except OSError as error:
        raise fault(f"{file} cannot be read: {reason(error)}.") from None
    if len(raw) > limit:
        raise fault(f"{file} is larger than {limit / 1e6:.0f} MB, expected a text file.")
    return raw


def decoded(raw: bytes, where: str, *, fault: Fault = CheckpointError) -> str:
    """UTF-8 text; a byte-order mark is left out. Errors: `fault` with the place of the first bad byte."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise fault(f"{where} is not UTF-8 text: byte {raw[error.start]:#04x} in line {line}.") from None


def read_json(file: Path, *, fault: Fault = CheckpointError) -> dict[str, Any]:
    """A file with one JSON object. Errors: `fault`."""
    values = parse_json(read_bytes(file, fault=fault), str(file), fault=fault)
    if not isinstance(values, dict):
        raise fault(f"{file} holds {shown(values)}, expected an object {{…}}.")
    return values


def parse_json(raw: bytes | str, where: str, *, fault: Fault = CheckpointError) -> Any:
    """One JSON value. Errors: `fault` for bad syntax, a key twice, NaN, infinity, half characters, too much depth."""

    def refuse(what: str) -> NoReturn:
        raise fault(f"{where} {what}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            refuse(f"has the key {shown(twice)} twice in one object; which of the two is meant?")
        return values

    source = decoded(raw, where, fault=fault) if isinstance(raw, bytes) else raw
    try:
        value = json.loads(source, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        refuse(f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}")
    except RecursionError:
        refuse(f"is nested more than {MAX_DEPTH} levels deep")
    except ValueError:  # Python reads no integer of more than 4,300 digits
        refuse("holds a number of thousands of digits")
    check_tree(value, where, fault=fault)
    return value


def check_tree(value: Any, where: str, *, fault: Fault = ConfigError, finite: bool = True) -> None:
    """Errors: `fault` for a tree that is too deep or holds half a character, or a number that is none."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise fault(f"{where} is nested more than {MAX_DEPTH} levels deep.")
        below: list[Any] = []
        for node in level:
            if isinstance(node, str):
                _check_text(node, where, value, fault)
            elif isinstance(node, dict):
                for key in node:
                    if isinstance(key, str):
                        _check_text(key, where, value, fault)
                below += node.values()
            elif isinstance(node, list | tuple):
                below += node
            elif finite and isinstance(node, float) and not math.isfinite(node):
                raise fault(f"{_placed(where, value, node)} is {node}, expected a finite number.")
        level, depth = below, depth + 1


def _check_text(text: str, where: str, tree: Any, fault: Fault) -> None:
    if (place := half_character(text)) is not None:
        raise fault(
            f"{_placed(where, tree, text)} holds half a character (U+{ord(text[place]):04X}) in"
            f" {shown(text[max(place - 20, 0) :])}."
        )


def _placed(where: str, tree: Any, node: Any) -> str:
    """`where`, with the keys that lead to a node of the tree: looked for only when there is something to say of it."""

    def keys(tree: Any) -> str | None:
        if tree is node:
            return ""
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
        for key, entry in entries:
            if (below := keys(entry)) is not None:
                own = f"[{key}]" if isinstance(key, int) else dotted(key)
                return own + (f".{below}" if below[:1] not in ("", "[") else below)
        return None

    found = keys(tree)
    return f"{where}{': ' if found and found[0] != '[' else ''}{found or ''}"


def read_toml(file: Path, *, fault: Fault = ConfigError) -> dict[str, Any]:
    """A TOML file. Errors: `fault`."""
    try:
        values = tomllib.loads(decoded(read_bytes(file, fault=fault), str(file), fault=fault).replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        raise fault(f"{file} is not TOML: {str(error)[:120]}.") from None
    except RecursionError:
        raise fault(f"{file} is nested more than {MAX_DEPTH} levels deep.") from None
    check_tree(values, str(file), fault=fault)
    return values


def json_lines(file: Path, *, fault: Fault = ConfigError) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, each with its place, `FILE:LINE`. Blank lines are passed over.

    A line ends at \\n alone: U+2028, U+2029 and U+0085 inside a string are text. Errors: `fault` with file and line.
    """
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(MAX_BYTES), b""), 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    where = f"{file}:{number}"
                    yield where, parse_json(line, where, fault=fault)
    except OSError as error:
        raise fault(f"{file} cannot be read: {reason(error)}.") from None
