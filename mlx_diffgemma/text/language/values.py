"""JSON and calls: a schema comes in, the language of the values that obey it goes out.

Objects are written with the properties that the schema names, in its order, optional ones or not; others only where
`additionalProperties` asks for them, or where the schema says nothing of properties at all. Lists end behind
`prefixItems` unless `items` is there or `minItems` asks for more. Of what a schema leaves open, containers nest `depth`
deep. So every text is a value that the schema allows; not every such value can be written.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from ...errors import ConfigError
from .automaton import BYTES, Language
from .characters import ESCAPED, SHORT, USUAL
from .graph import Graph, language
from .scalars import numbers
from .schema import FREE, Schema, read
from .shapes import Place, Shape, Wanted, kind_of
from .syntax import CONTROLS, END_TOOL_CALL, TOOL_CALL, Call, Json, Layout, Syntax

DEPTH = 4


def json_schema(schema: Any, *, layout: Layout | None = None, depth: int = DEPTH) -> Language:
    """JSON texts that obey `schema`: a dict, a bool, JSON text, or a pydantic model class.

    depth   how often a definition may stand inside itself; how deep containers nest where the schema leaves them open
    Errors: ConfigError for an invalid schema or what is not supported (with its path), for one that nothing satisfies,
    and for too many states.
    """
    reader, graph = Schema(read(schema), depth=depth), Graph()
    start, end = graph.state(), graph.state()
    _write(reader, Json(graph, layout or Layout()), graph, reader.top(), start, end)
    found = language(graph, start, end, empty=_nothing("the JSON schema", reader))
    return replace(found, notes=tuple(reader.notes))


def any_json(*, layout: Layout | None = None, depth: int = DEPTH) -> Language:
    """Any JSON text whose containers nest at most `depth` deep."""
    return json_schema({}, layout=layout, depth=depth)


def tool_call(functions: Sequence[Mapping[str, Any]], *, depth: int = DEPTH) -> Language:
    """A call of one of `functions`, in the model's own syntax, from `<|tool_call>` to `<tool_call|>`.

    functions   as in the `tools` of a chat: a name and the schema of its parameters, or these under the key `function`
    Errors: as of `json_schema`, and ConfigError for names that the syntax cannot write.
    """
    if not functions:
        raise ConfigError("a tool call needs a function to call: got none.")
    graph = Graph()
    start, end, opened, closing = (graph.state() for _ in range(4))
    opens, closes = (BYTES + CONTROLS.index(control) for control in (TOOL_CALL, END_TOOL_CALL))
    graph.edge(start, opens, opens, opened)
    graph.edge(closing, closes, closes, end)
    notes: dict[str, None] = {}
    for function in functions:
        inner = function.get("function", function) if isinstance(function, Mapping) else function
        if not isinstance(inner, Mapping):
            raise ConfigError(f"a function is an object with a name and parameters, got {function!r:.60}.")
        name, parameters = inner.get("name"), inner.get("parameters")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"the function {name!r} cannot be called: a name is letters, digits, _ and -.")
        reader, named = Schema(read(parameters or {"properties": {}}), depth=depth), graph.state()
        graph.text(opened, f"call:{name}", named)
        arguments = (*reader.top(), Place(schema={"type": "object"}, path="(arguments)"))
        _write(reader, Call(graph), graph, arguments, named, closing)
        if not reader.alternatives(arguments):
            raise ConfigError(_nothing(f"the parameters of {name}", reader))
        notes |= {f"{name}: {note}": None for note in reader.notes}
    found = language(graph, start, end, CONTROLS, empty="no arguments satisfy the parameters of any function.")
    return replace(found, notes=tuple(notes))


def _write(reader: Schema, syntax: Syntax, graph: Graph, wanted: Wanted, start: int, end: int) -> None:
    try:
        _Writer(reader, graph, syntax).value(wanted, start, end, 0)
    except RecursionError as error:
        raise ConfigError("the schema nests deeper than can be written.\nLess depth may help.") from error


def _nothing(what: str, reader: Schema) -> str:
    where = f": no value fits at {reader.unfit[0]}" if reader.unfit else ""
    return f"nothing satisfies {what}{where}.\nRecursion deeper than {reader.depth} is cut; perhaps it ends too late."


class _Writer:
    """Draws the values that a schema allows."""

    def __init__(self, schema: Schema, graph: Graph, syntax: Syntax):
        self.schema, self.graph, self.syntax = schema, graph, syntax

    def value(self, wanted: Wanted, start: int, end: int, level: int) -> None:
        """The values that obey all of `wanted`, inside of `level` containers."""
        for shape in self.schema.alternatives(wanted):
            if shape.literals is not None:
                for literal in shape.literals:
                    self.literal(literal, start, end, level)
                continue
            if "null" in shape.kinds:
                self.graph.text(start, "null", end)
            if "boolean" in shape.kinds:
                self.graph.text(start, "true", end)
                self.graph.text(start, "false", end)
            if "number" in shape.kinds:
                self.graph.insert(start, numbers(shape.whole, shape.low, shape.high), end)
            if "string" in shape.kinds:
                told = shape.patterns or shape.formats
                writing = USUAL if told else ESCAPED if shape.length[1] is None else SHORT
                self.syntax.string(start, shape.strings, writing, end)
            if "array" in shape.kinds:
                self.array(shape, start, end, level + 1)
            if "object" in shape.kinds:
                self.object(shape, start, end, level + 1)

    def literal(self, value: Any, start: int, end: int, level: int) -> None:
        """One value."""
        kind = kind_of(value)
        if kind == "string":
            self.syntax.text(start, value, end)
        elif kind == "array":
            self.members("[]", [(None, item) for item in value], start, end, level + 1)
        elif kind == "object":
            self.members("{}", [(n, value[n]) for n in self.syntax.order(list(value))], start, end, level + 1)
        else:
            self.graph.text(start, json.dumps(value), end)

    def members(self, brackets: str, members: list[tuple[str | None, Any]], start: int, end: int, level: int) -> None:
        """A container of exactly these literals."""
        at, bare = self.opened(brackets[0], start, level)
        for number, (name, value) in enumerate(members):
            before, behind = self.graph.state(), self.graph.state()
            self.syntax.comma(at, level, before) if number else self.graph.jump(at, before)
            self.literal(value, before if name is None else self.named(name, before), behind, level)
            at = behind
        self.graph.text(bare, brackets[1], end) if not members else self.closed(brackets[1], at, end, level)

    def array(self, shape: Shape, start: int, end: int, level: int) -> None:
        """Lists: as many items of their own as `prefix` and `least` ask for, then one that may come again."""
        least, most = shape.items
        if shape.prefix and shape.rest is None:
            longest = max(least, len(shape.prefix))
            most = longest if most is None else min(longest, most)
        at, bare = self.opened("[", start, level)
        if least == 0:
            self.graph.text(bare, "]", end)
        again = max(least - 1, len(shape.prefix))
        for index in count() if most is None else range(most):
            behind = self.graph.state()
            self.value(shape.item(index) or self.free(shape), at, behind, level)
            if index + 1 >= least:
                self.closed("]", behind, end, level)
            if most is None and index == again:
                self.syntax.comma(behind, level, at)
                return
            at = self.graph.state()
            self.syntax.comma(behind, level, at)

    def object(self, shape: Shape, start: int, end: int, level: int) -> None:
        """Objects: named properties in order, then others. Two states run beside each other, before the first property
        is written and behind one, for only then a comma is due."""
        properties = shape.properties or {}
        names = self.syntax.order(list(dict.fromkeys([*properties, *shape.required])))
        others = shape.others or (self.free(shape) if shape.properties is None else None)
        before, bare = self.opened("{", start, level)
        behind = self.graph.state()
        if not shape.required:
            self.graph.text(bare, "}", end)
        for name in names:
            entry, next_before, next_behind = (self.graph.state() for _ in range(3))
            self.graph.jump(before, entry)
            self.syntax.comma(behind, level, entry)
            self.value(shape.member(name) or self.free(shape), self.named(name, entry), next_behind, level)
            if name not in shape.required:
                self.graph.jump(before, next_before)
                self.graph.jump(behind, next_behind)
            before, behind = next_before, next_behind
        if others is not None:
            entry, named, valued = (self.graph.state() for _ in range(3))
            self.graph.jump(before, entry)
            self.syntax.comma(behind, level, entry)
            self.syntax.other_name(entry, tuple(names), named)
            self.syntax.colon(named, valued)
            self.value(others, valued, behind, level)
        self.closed("}", behind, end, level)

    def free(self, shape: Shape) -> Wanted:
        """What is asked of a value inside `shape` of which nothing is said."""
        return (Place(schema=True, path="", trail=(*shape.trail, FREE)),)

    def opened(self, bracket: str, start: int, level: int) -> tuple[int, int]:
        """The states before a container's first member, and right behind its bracket."""
        bare, roomy = self.graph.state(), self.graph.state()
        self.graph.text(start, bracket, bare)
        self.syntax.room(bare, level, roomy)
        return roomy, bare

    def closed(self, bracket: str, start: int, end: int, level: int) -> None:
        roomy = self.graph.state()
        self.syntax.room(start, level - 1, roomy)
        self.graph.text(roomy, bracket, end)

    def named(self, name: str, start: int) -> int:
        """The state behind a property's name and colon."""
        named, valued = self.graph.state(), self.graph.state()
        self.syntax.name(start, name, named)
        self.syntax.colon(named, valued)
        return valued
