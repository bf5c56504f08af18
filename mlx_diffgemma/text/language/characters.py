"""Sets of characters, and how a character is written in bytes: as UTF-8, or inside a JSON string.

A set of characters is a tuple of ranges of code points, ascending and apart. A way of writing is a sequence of
elements, each a few ranges of bytes.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

from .graph import Graph, Table, smallest

Range = tuple[int, int]
Characters = tuple[Range, ...]
Way = tuple[tuple[Range, ...], ...]

CODE_POINTS = 0x110000
ANY: Characters = ((0, 0xD7FF), (0xE000, 0x10FFFF))  # surrogates are no characters: UTF-8 cannot write them

# How strings are written.
PLAIN = "plain"  # UTF-8
ESCAPED = "escaped"  # in a JSON string: as it is, or with any of JSON's escapes
USUAL = "usual"  # in a JSON string: escaped only where it must be
SHORT = "short"  # the same, without the control characters that have no short escape

_SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_MUST: Characters = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))  # what JSON strings do not hold as it is
_BITS = ((0x00, 0x7F, 0, 7), (0xC0, 0x7FF, 1, 5), (0xE0, 0xFFFF, 2, 4), (0xF0, 0x10FFFF, 3, 3))  # lead, last, more


def union(ranges: Iterable[Range]) -> Characters:
    """Ranges in any order, as a set of characters; surrogates are left out."""
    joined: list[Range] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return intersection(tuple(joined), ANY)


def intersection(first: Characters, second: Characters) -> Characters:
    return tuple(
        (max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) <= min(b, d)
    )  # both ascend, so the pieces do


def without(first: Characters, second: Characters) -> Characters:
    """The characters of the first set that are not in the second."""
    bounds = [-1, *(p for low, high in second for p in (low, high)), CODE_POINTS]
    gaps = [(a + 1, b - 1) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    return intersection(first, tuple((a, b) for a, b in gaps if a <= b))


def _split(low: int, high: int, digits: int, base: int) -> Iterator[tuple[Range, ...]]:
    """Numbers from low to high as runs of ranges of digits: 7 … 23 in base 10 is [0][7–9], [1][0–9], [2][0–3]."""
    if digits == 0:
        yield ()
        return
    unit = base ** (digits - 1)
    first, last = low // unit, high // unit
    if first == last:
        rest = _split(low - first * unit, high - first * unit, digits - 1, base)
        yield from (((first, first), *tail) for tail in rest)
    elif low % unit:
        yield from _split(low, first * unit + unit - 1, digits, base)
        yield from _split((first + 1) * unit, high, digits, base)
    elif high % unit != unit - 1:
        yield from _split(low, last * unit - 1, digits, base)
        yield from _split(last * unit, high, digits, base)
    else:
        yield ((first, last), *(((0, base - 1),) * (digits - 1)))


def _utf8(characters: Characters) -> Iterator[Way]:
    first = 0
    for lead, last, more, _ in _BITS:
        for low, high in intersection(characters, ((first, last),)):
            for (a, b), *tail in _split(low, high, more + 1, 64) if more else [((low, high),)]:
                yield (((lead + a, lead + b),), *(((0x80 + c, 0x80 + d),) for c, d in tail))
        first = last + 1


def _digits(low: int, high: int) -> tuple[Range, ...]:
    """The bytes of the hexadecimal digits from low to high, capital and small."""
    found = [(48 + low, 48 + min(high, 9))] if low <= 9 else []
    if high >= 10:
        found += [(letter + max(low, 10) - 10, letter + high - 10) for letter in (65, 97)]
    return tuple(found)


def _unicode_escapes(characters: Characters) -> Iterator[Way]:
    """\\uXXXX, and pairs of surrogates beyond U+FFFF."""
    begin: Way = (((0x5C, 0x5C),), ((0x75, 0x75),))
    for low, high in intersection(characters, ((0, 0xFFFF),)):
        for ranges in _split(low, high, 4, 16):
            yield begin + tuple(_digits(a, b) for a, b in ranges)
    for low, high in intersection(characters, ((0x10000, 0x10FFFF),)):
        for (a, b), (c, d) in _split(low - 0x10000, high - 0x10000, 2, 1024):
            for first in _split(0xD800 + a, 0xD800 + b, 4, 16):
                for second in _split(0xDC00 + c, 0xDC00 + d, 4, 16):
                    yield (
                        *begin, *(_digits(e, f) for e, f in first),
                        *begin, *(_digits(e, f) for e, f in second),
                    )  # fmt: skip


def _ways(characters: Characters, writing: str) -> Iterator[Way]:
    """All ways to write one of `characters`."""
    if writing == PLAIN:
        yield from _utf8(characters)
        return
    needy = intersection(characters, _MUST)
    yield from _utf8(without(characters, _MUST))
    for character, letter in _SHORT.items():
        code = ord(character)
        if intersection(characters if writing == ESCAPED else needy, ((code, code),)):
            yield (((0x5C, 0x5C),), ((ord(letter), ord(letter)),))
    if writing != SHORT:
        shortened = union((ord(character), ord(character)) for character in _SHORT)
        yield from _unicode_escapes(characters if writing == ESCAPED else without(needy, shortened))


@lru_cache(maxsize=4096)
def written(characters: Characters, writing: str) -> Table:
    """The bytes of one of `characters`, as a table with one accepting state and no way out of it."""
    graph = Graph()
    start, end = graph.state(), graph.state()
    for way in _ways(characters, writing):
        at = start
        for number, element in enumerate(way, 1):
            following = end if number == len(way) else graph.state()
            for low, high in element:
                graph.edge(at, low, high, following)
            at = following
    return smallest(graph, start, end, 256)


def write(graph: Graph, start: int, table: Table, writing: str, end: int) -> None:
    """Draw a table of characters (symbols are code points) as bytes."""
    base = [graph.state() for _ in range(table.states)]
    graph.jump(start, base[0])
    for state, edges in enumerate(table.edges):
        targets: dict[int, list[Range]] = {}
        for low, high, target in edges:
            targets.setdefault(target, []).append((low, high))
        for target, ranges in targets.items():
            _insert(graph, base[state], written(tuple(ranges), writing), base[target])
        if table.accepting[state]:
            graph.jump(base[state], end)


def spell(graph: Graph, start: int, text: str, writing: str, end: int) -> None:
    """Draw one text."""
    for character in text:
        following = graph.state()
        _insert(graph, start, written(((ord(character), ord(character)),), writing), following)
        start = following
    graph.jump(start, end)


def _insert(graph: Graph, start: int, table: Table, end: int) -> None:
    """Like `Graph.insert`, for a table whose one accepting state leads nowhere: its ends are merged, not joined."""
    last = int(table.accepting.argmax())
    base = [graph.state() if s not in (0, last) else (start if s == 0 else end) for s in range(table.states)]
    for state, edges in enumerate(table.edges):
        for low, high, following in edges:
            graph.edge(base[state], low, high, base[following])
