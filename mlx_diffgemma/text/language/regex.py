"""Python's regular expressions, the regular part: a pattern comes in, the automaton of what it matches goes out.

The pattern is parsed by `re` itself, and means what `re.fullmatch(pattern, text, re.ASCII)` says: \\d, \\w and \\s are
ASCII's (as in ECMA-262, and since Unicode's would take thousands of states); all else knows every character. What no
automaton reads, or only with many states, is refused by name: look-around, back references, conditionals, atomic
groups, possessive quantifiers, word boundaries, anchors inside, and the flags i, m, L and u.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from ...errors import ConfigError
from .automaton import Language
from .characters import ANY, CODE_POINTS, PLAIN, Characters, Range, union, without, write
from .graph import Graph, Table, language, smallest

_BEGIN = (op.AT_BEGINNING, op.AT_BEGINNING_STRING)
_END = (op.AT_END, op.AT_END_STRING)
_SETS: dict[Any, Characters] = {
    op.CATEGORY_DIGIT: union([(0x30, 0x39)]),
    op.CATEGORY_SPACE: union([(0x09, 0x0D), (0x20, 0x20)]),
    op.CATEGORY_WORD: union([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]),
}
_SETS |= {
    op.CATEGORY_NOT_DIGIT: without(ANY, _SETS[op.CATEGORY_DIGIT]),
    op.CATEGORY_NOT_SPACE: without(ANY, _SETS[op.CATEGORY_SPACE]),
    op.CATEGORY_NOT_WORD: without(ANY, _SETS[op.CATEGORY_WORD]),
}
_REFUSED = {
    op.ASSERT: "look-around",
    op.ASSERT_NOT: "look-around",
    op.GROUPREF: "a back reference",
    op.GROUPREF_EXISTS: "a conditional",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive quantifier",
}
_FLAGS = ((re.IGNORECASE, "the flag i"), (re.MULTILINE, "the flag m"), (re.LOCALE, "the flag L"))
_LOOKS = {  # how each of these begins in a pattern
    "look-around": r"\(\?<?[=!]",
    "a back reference": r"\(\?P=|\\[1-9]",
    "a conditional": r"\(\?\(",
    "an atomic group": r"\(\?>",
    "a possessive quantifier": r"(?:[*+?]|\{[0-9,]+\})\+",
    "a word boundary": r"\\[bB]",
    "the flag i": r"\(\?[a-zA-Z]*i",
    "the flag m": r"\(\?[a-zA-Z]*m",
    "the flag L": r"\(\?[a-zA-Z]*L",
    "the flag u": r"\(\?[a-zA-Z]*u",
    "an anchor inside": r"\^|\$|\\[AZ]",
}
_TOKEN = re.compile(
    r"\\[1-9][0-9]?|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?P?[a-zA-Z]*(?:<?[=!]|[>(:])?|(?:[*+?]|\{[0-9,]+\})\+?|.",
    re.DOTALL,
)


class _Unsupported(Exception):
    """What was found, by name."""


def regex(pattern: str) -> Language:
    """The texts that `pattern` matches from end to end. Errors: ConfigError for one that is no regular expression, uses
    what is refused (by name and position), matches no text, or takes too many states."""
    graph = Graph()
    start, end = graph.state(), graph.state()
    write(graph, start, table(pattern), PLAIN, end)
    return language(graph, start, end, empty=f"regex {pattern!r} matches no text at all.")


@lru_cache(maxsize=256)
def table(pattern: str, *, search: bool = False, where: str = "regex") -> Table:
    """The automaton of a pattern over code points. `search`: of the texts that hold a match anywhere, as JSON Schema
    means it, unless `^` and `$` tie it to the ends. `where` begins an error's message."""
    try:
        return _table(parser.parse(pattern), search)
    except re.error as error:
        at = "" if error.pos is None else f" at position {error.pos}"
        raise ConfigError(f"{where} {pattern!r} is no regular expression{at}: {error.msg}.") from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} of {len(pattern)} characters nests or repeats more than can be read.") from error
    except _Unsupported as found:
        name = str(found)
        raise ConfigError(
            f"{where} {pattern!r}: {name} (position {_position(pattern, name, search)}) is not supported.\n"
            "There are literals, classes, groups, |, * + ? {m,n}, flags a s x, and ^ and $ at the ends."
        ) from found


def _table(parsed: Any, search: bool) -> Table:
    for flag, name in _FLAGS:
        if parsed.state.flags & flag:
            raise _Unsupported(name)
    graph = Graph()
    start, end = graph.state(), graph.state()
    draw = _Drawing(graph)
    for items, tied_left, tied_right in _alternatives(list(parsed)):
        first, last = start, end
        if search and not tied_left:
            first = draw.anything(start)
        if search and not tied_right:
            last = graph.state()
            graph.jump(draw.anything(last), end)
        draw.sequence(items, first, last, bool(parsed.state.flags & re.DOTALL))
    return smallest(graph, start, end, CODE_POINTS)


class _Drawing:
    """Draws parsed items between two states."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def anything(self, start: int) -> int:
        """A state behind `start` that reads any characters and stays."""
        state = self.graph.state()
        self.graph.jump(start, state)
        self.characters(ANY, state, state)
        return state

    def characters(self, characters: Characters, start: int, end: int) -> None:
        for low, high in characters:
            self.graph.edge(start, low, high, end)

    def sequence(self, items: list[Any], start: int, end: int, dotall: bool) -> None:
        for number, item in enumerate(items, 1):
            following = end if number == len(items) else self.graph.state()
            self.item(item, start, following, dotall)
            start = following
        if not items:
            self.graph.jump(start, end)

    def item(self, item: Any, start: int, end: int, dotall: bool) -> None:
        kind, value = item
        if kind in _REFUSED:
            raise _Unsupported(_REFUSED[kind])
        if kind is op.AT:
            raise _Unsupported("an anchor inside" if value in _BEGIN + _END else "a word boundary")
        if kind is op.BRANCH:
            for branch in value[1]:
                self.sequence(list(branch), start, end, dotall)
        elif kind is op.SUBPATTERN:
            _, added, removed, body = value
            for flag, name in (*_FLAGS, (re.UNICODE, "the flag u")):
                if added & flag:
                    raise _Unsupported(name)
            self.sequence(list(body), start, end, bool((dotall or added & re.DOTALL) and not removed & re.DOTALL))
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, body = value
            self.repeat(least, most, list(body), start, end, dotall)
        else:
            self.characters(_characters(kind, value, dotall), start, end)

    def repeat(self, least: int, most: int, items: list[Any], start: int, end: int, dotall: bool) -> None:
        for _ in range(least):
            following = self.graph.state()
            self.sequence(items, start, following, dotall)
            start = following
        if most is op.MAXREPEAT:
            loop = self.graph.state()
            self.graph.jump(start, loop)
            self.sequence(items, loop, loop, dotall)
            start = loop
        else:
            for _ in range(most - least):
                following = self.graph.state()
                self.sequence(items, start, following, dotall)
                self.graph.jump(start, end)
                start = following
        self.graph.jump(start, end)


def _characters(kind: Any, value: Any, dotall: bool) -> Characters:
    """The set of characters that an item of one character matches."""
    if kind is op.LITERAL:
        return union([(value, value)])
    if kind is op.NOT_LITERAL:
        return without(ANY, ((value, value),))
    if kind is op.ANY:
        return ANY if dotall else without(ANY, ((10, 10),))
    if kind is not op.IN:
        raise _Unsupported(str(kind).lower())
    ranges: list[Range] = []
    for what, member in value:
        if what is op.LITERAL:
            ranges.append((member, member))
        elif what is op.RANGE:
            ranges.append(member)
        elif what is op.CATEGORY:
            ranges.extend(_SETS[member])
    return without(ANY, union(ranges)) if value[0][0] is op.NEGATE else union(ranges)


def _alternatives(items: list[Any]) -> Iterator[tuple[list[Any], bool, bool]]:
    """A sequence as alternatives without the anchors at their ends, and whether each is tied to the left and the
    right end; groups at an end that hold such an anchor are opened."""
    for loose, left in _untied(items, 0):
        for rest, right in _untied(loose, -1):
            yield rest, left, right


def _untied(items: list[Any], end: int) -> Iterator[tuple[list[Any], bool]]:
    """Alternatives without the anchors at one end (0 or −1), and whether each had one."""
    anchors, tied = (_END if end else _BEGIN), False
    while items and items[end][0] is op.AT and items[end][1] in anchors:
        items, tied = (items[:-1] if end else items[1:]), True
    if tied or not items or not _ends_with(items[end], end, anchors):
        yield items, tied
        return
    kind, value = items[end]
    for body in [list(b) for b in value[1]] if kind is op.BRANCH else [list(value[3])]:
        for inner, tied in _untied(body, end):
            group = inner if kind is op.BRANCH else [(kind, (*value[:3], inner))]
            yield (items[:-1] + group if end else group + items[1:]), tied


def _ends_with(item: Any, end: int, anchors: tuple[Any, ...]) -> bool:
    """Whether an item is a group or branch with an anchor at that end of one of its alternatives."""
    kind, value = item
    if kind is op.AT:
        return value in anchors
    bodies = value[1] if kind is op.BRANCH else [value[3]] if kind is op.SUBPATTERN else []
    return any(len(body) and _ends_with(body[end], end, anchors) for body in bodies)


def _position(pattern: str, name: str, search: bool) -> int:
    """Where in the pattern what is called `name` stands: of anchors, the first that is refused when it is alone."""
    found = [m for m in _TOKEN.finditer(pattern) if re.match(_LOOKS[name], m[0])]
    if name == "an anchor inside":
        for match in found:
            others = [m for m in found if m is not match]
            alone = pattern
            for other in reversed(others):
                alone = alone[: other.start()] + "(?:)" + alone[other.end() :]
            try:
                _table(parser.parse(alone), search)
            except _Unsupported:
                return match.start()
    return found[0].start() if found else 0
