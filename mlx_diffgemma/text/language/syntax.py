"""How values are written: as JSON text, or as the arguments of a call in the model's own syntax. Strings, keys, and the
room between; what holds for both (lists, objects, numbers) is in `values`.

Calls look as the Gemma 4 family's template writes them and mlx-lm's parser reads them:
`<|tool_call>call:name{city:<|"|>Paris<|"|>,days:[1,2]}<tool_call|>`: strings between quote tokens and without escapes,
names bare, arguments sorted, no room.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ...errors import ConfigError
from .automaton import BYTES
from .characters import ESCAPED, PLAIN, SHORT, USUAL, spell, write
from .graph import Graph, Table, intersect
from .regex import table
from .scalars import strings, without_text, without_words

QUOTE = '<|"|>'
TOOL_CALL, END_TOOL_CALL = "<|tool_call>", "<tool_call|>"
CONTROLS = (QUOTE, TOOL_CALL, END_TOOL_CALL)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The room that JSON text may leave.

    spaces    `": "` and `", "` besides `":"` and `","`
    indents   where an element begins or its container ends, a new line may begin, indented by one of these numbers
              of spaces a level; () keeps the text on one line. 0 is among them because models do write lists of
              records so, and a language without what a model writes costs right answers
    """

    spaces: bool = True
    indents: tuple[int, ...] = (0, 2, 4)

    def __post_init__(self) -> None:
        if any(not 0 <= indent <= 8 for indent in self.indents):
            raise ConfigError(f"layout: an indent is 0 to 8 spaces a level, got {self.indents}.")


class Syntax(Protocol):
    """What a way of writing values decides. Each method draws between two states; `level` counts open containers,
    `writing` is how JSON escapes."""

    def string(self, start: int, strings: Table, writing: str, end: int) -> None: ...
    def text(self, start: int, text: str, end: int) -> None: ...
    def name(self, start: int, name: str, end: int) -> None: ...
    def other_name(self, start: int, names: tuple[str, ...], end: int) -> None: ...
    def room(self, start: int, level: int, end: int) -> None: ...
    def comma(self, start: int, level: int, end: int) -> None: ...
    def colon(self, start: int, end: int) -> None: ...
    def order(self, names: list[str]) -> list[str]: ...


class Json:
    """JSON text, RFC 8259.

    Strings are escaped in any way, or not, as long as they have no maxLength, pattern or format. Those, names and
    literals are escaped only where they must be: for every position \\uXXXX takes more states than UTF-8 itself.
    """

    def __init__(self, graph: Graph, layout: Layout):
        self.graph, self.layout = graph, layout

    def string(self, start: int, strings: Table, writing: str, end: int) -> None:
        inside, behind = self.graph.state(), self.graph.state()
        self.graph.text(start, '"', inside)
        write(self.graph, inside, strings, writing, behind)
        self.graph.text(behind, '"', end)

    def text(self, start: int, text: str, end: int) -> None:
        inside, behind = self.graph.state(), self.graph.state()
        self.graph.text(start, '"', inside)
        spell(self.graph, inside, text, USUAL, behind)
        self.graph.text(behind, '"', end)

    def name(self, start: int, name: str, end: int) -> None:
        self.text(start, name, end)

    def other_name(self, start: int, names: tuple[str, ...], end: int) -> None:
        writing = SHORT if names else ESCAPED  # escaped letters of the names would take states of their own
        self.string(start, without_words(strings((), (), 0, None), names), writing, end)

    def room(self, start: int, level: int, end: int) -> None:
        self.graph.jump(start, end)
        self._line(start, level, end)

    def comma(self, start: int, level: int, end: int) -> None:
        behind = self.graph.state()
        self.graph.text(start, ",", behind)
        self.room(behind, level, end)
        if self.layout.spaces:
            self.graph.text(behind, " ", end)

    def colon(self, start: int, end: int) -> None:
        self.graph.text(start, ":", end)
        if self.layout.spaces:
            self.graph.text(start, ": ", end)

    def order(self, names: list[str]) -> list[str]:
        return names

    def _line(self, start: int, level: int, end: int) -> None:
        for indent in self.layout.indents:
            self.graph.text(start, "\n" + " " * indent * level, end)


class Call:
    """Arguments of a call."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def string(self, start: int, strings: Table, writing: str, end: int) -> None:
        inside, behind = self._quoted(start, end)
        write(self.graph, inside, intersect(strings, _sayable()), PLAIN, behind)

    def text(self, start: int, text: str, end: int) -> None:
        inside, behind = self._quoted(start, end)
        if _sayable().accepts(map(ord, text)):
            self.graph.text(inside, text, behind)

    def name(self, start: int, name: str, end: int) -> None:
        if not re.fullmatch(r"\w+", name):
            raise ConfigError(f"the parameter {name!r} cannot be written in a call: a name is letters, digits and _.")
        self.graph.text(start, name, end)

    def other_name(self, start: int, names: tuple[str, ...], end: int) -> None:
        write(self.graph, start, without_words(table(r"\w+"), names), PLAIN, end)

    def room(self, start: int, level: int, end: int) -> None:
        self.graph.jump(start, end)

    def comma(self, start: int, level: int, end: int) -> None:
        self.graph.text(start, ",", end)

    def colon(self, start: int, end: int) -> None:
        self.graph.text(start, ":", end)

    def order(self, names: list[str]) -> list[str]:
        return sorted(names, key=str.lower)  # as the template's dictsort has shown them to the model

    def _quoted(self, start: int, end: int) -> tuple[int, int]:
        """The states behind the opening quote and before the closing one."""
        quote = BYTES + CONTROLS.index(QUOTE)
        inside, behind = self.graph.state(), self.graph.state()
        self.graph.edge(start, quote, quote, inside)
        self.graph.edge(behind, quote, quote, end)
        return inside, behind


@lru_cache(maxsize=1)
def _sayable() -> Table:
    """Strings without what would read as their end, and without control characters: the parser's own use of them."""
    return without_text(table("[^\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f]*"), QUOTE)
