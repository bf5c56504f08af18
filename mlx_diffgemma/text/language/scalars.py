"""The strings and numbers of a schema, as tables: patterns, formats, lengths; the JSON grammar, integers, bounds.

Strings are tables over code points, before they are escaped; numbers are tables over bytes.
"""

from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import numpy as np

from .characters import ANY, CODE_POINTS
from .graph import STATES, Graph, Table, complement, intersect, smallest, too_large
from .regex import table

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAYS = r"(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = rf"(?:{_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
FORMATS = {
    "date": _DATE,  # RFC 3339, of the years 1 to 9999, leap years known
    "time": _TIME,  # with the offset that RFC 3339 asks for; no leap seconds
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})*",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
}

_NUMBER = r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?"  # RFC 8259
_DECIMAL = r"(?:0|-?[1-9]\d*)(?:\.\d+)?|-0\.\d*[1-9]\d*"  # a bounded number has no exponent, and is not −0
_INTEGER = r"0|-?[1-9]\d*"


@lru_cache(maxsize=256)
def strings(patterns: tuple[tuple[str, str], ...], formats: tuple[str, ...], least: int, most: int | None) -> Table:
    """The strings that hold a match of each pattern, have each format, and `least` to `most` characters. `patterns`
    are pairs of a pattern and where it stands."""
    found = _counted(least, most)
    for name in formats:
        found = intersect(table(FORMATS[name]), found)
    for pattern, where in patterns:
        found = intersect(table(pattern, search=True, where=where), found)
    return found


def without_text(strings: Table, text: str) -> Table:
    """The strings that do not hold `text`."""
    graph = Graph()
    start, end = graph.state(), graph.state()
    loops = graph.state(), graph.state()
    graph.jump(start, loops[0])
    graph.word(loops[0], map(ord, text), loops[1])
    graph.jump(loops[1], end)
    for loop in loops:
        for low, high in ANY:
            graph.edge(loop, low, high, loop)
    return intersect(strings, complement(smallest(graph, start, end, CODE_POINTS)))


def without_words(strings: Table, words: tuple[str, ...]) -> Table:
    """The strings that are none of `words`."""
    graph = Graph()
    start, end = graph.state(), graph.state()
    for word in words:
        graph.word(start, map(ord, word), end)
    return intersect(strings, complement(smallest(graph, start, end, CODE_POINTS)))


def _counted(least: int, most: int | None) -> Table:
    """Strings of `least` to `most` characters: a state for each number of them."""
    longest = least if most is None else most
    if longest > STATES:
        raise too_large("a string of this length")
    following = np.append(np.arange(1, longest + 1), longest if most is None else -1)
    surrogates = np.full(longest + 1, -1)
    return Table(
        starts=np.array([0, 0xD800, 0xE000], np.int64),
        next=np.stack([following, surrogates, following], axis=1).astype(np.int32),
        accepting=np.arange(longest + 1) >= least,
        size=CODE_POINTS,
    )


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One end of a range of numbers."""

    value: Decimal
    inclusive: bool = True


@lru_cache(maxsize=256)
def numbers(whole: bool, low: Bound | None, high: Bound | None) -> Table:
    """Numbers as JSON writes them: integers, or any, between two bounds."""
    bounded = low is not None or high is not None
    found = table(_INTEGER if whole else _DECIMAL if bounded else _NUMBER)
    if low is not None:
        found = intersect(found, _compared(low, ">"))
    if high is not None:
        found = intersect(found, _compared(high, "<"))
    return found


def _compared(bound: Bound, wanted: str) -> Table:
    """The decimals that are `wanted` ("<" or ">") than a bound, or equal to it when it is inclusive."""
    graph = Graph()
    start, end, minus = graph.state(), graph.state(), graph.state()
    graph.edge(start, ord("-"), ord("-"), minus)
    equal = "=" if bound.inclusive else ""
    size, sign = abs(bound.value), (bound.value > 0) - (bound.value < 0)
    above, below = ("<=>", "") if wanted == ">" else ("", "<=>")  # on the other side of zero digits do not matter
    _magnitude(graph, start, end, size, wanted + equal if sign >= 0 else above)
    _magnitude(graph, minus, end, size, ("<" if wanted == ">" else ">") + equal if sign <= 0 else below)
    return smallest(graph, start, end, 256)


def _magnitude(graph: Graph, start: int, end: int, value: Decimal, relations: str) -> None:
    """Decimals without a sign whose relation (<, = or >) to `value` is among `relations`."""
    digits, _, fraction = format(value, "f").partition(".")
    fraction = fraction.rstrip("0")
    decided = {relation: graph.state() for relation in "<=>"}  # in the fraction; more digits change nothing
    undecided = [graph.state() for _ in range(len(fraction) + 1)]  # equal in as many digits of the fraction
    for relation, state in decided.items():
        _digits(graph, state, "0", "9", state)
        if relation in relations:
            graph.jump(state, end)
    for state, digit, equal in zip(undecided, fraction + "0", [*undecided[1:], undecided[-1]], strict=True):
        _fork(graph, state, digit, decided["<"], equal, decided[">"])
        if ("=" if state == undecided[-1] else "<") in relations:
            graph.jump(state, end)
    before = dict.fromkeys("<=>", start)
    for count, digit in enumerate(digits, 1):
        after = {relation: graph.state() for relation in "<=>"}
        _fork(graph, before["="], digit, after["<"], after["="], after[">"])
        for relation in "<>" if count > 1 else "":
            _digits(graph, before[relation], "0", "9", after[relation])
        for relation, state in after.items():
            outcome = relation if count == len(digits) else "<"
            graph.edge(state, ord("."), ord("."), undecided[0] if outcome == "=" else decided[outcome])
            if ("<" if outcome == "=" and fraction else outcome) in relations:
                graph.jump(state, end)
        before = after
    longer = graph.state()
    for state in (*before.values(), longer):
        _digits(graph, state, "0", "9", longer)
    graph.edge(longer, ord("."), ord("."), decided[">"])
    if ">" in relations:
        graph.jump(longer, end)


def _fork(graph: Graph, state: int, digit: str, less: int, equal: int, greater: int) -> None:
    """Where a digit leads that is less than, equal to, or greater than `digit`."""
    _digits(graph, state, "0", chr(ord(digit) - 1), less)
    _digits(graph, state, digit, digit, equal)
    _digits(graph, state, chr(ord(digit) + 1), "9", greater)


def _digits(graph: Graph, source: int, low: str, high: str, target: int) -> None:
    if low <= high:
        graph.edge(source, ord(low), ord(high), target)
