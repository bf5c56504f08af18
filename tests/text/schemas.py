"""Schemas to hold the languages against: written by hand, with values that obey them and values that do not, and drawn
at random; and texts drawn from an automaton."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from mlx_diffgemma.text.language.automaton import Automaton

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
        }
    },
    "$ref": "#/$defs/node",
}
CHAIN = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["name", "next"],
}
PETS = {
    "oneOf": [
        {
            "type": "object",
            "properties": {
                "kind": {"const": kind},
                "name": {"type": "string", "maxLength": 12},
                unit: {"type": "integer"},
            },
            "required": ["kind", unit],
        }
        for kind, unit in (("cat", "lives"), ("dog", "walks"), ("bird", "eggs"))
    ]
}
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "email": {"type": "string", "format": "email"}},
            "required": ["name", "email"],
        },
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number", "minimum": 0},
                },
                "required": ["sku", "quantity", "price"],
            },
            "minItems": 1,
            "maxItems": 5,
        },
        "status": {"enum": ["open", "paid", "shipped"]},
        "note": {"type": ["string", "null"]},
    },
    "required": ["id", "customer", "items", "status"],
}
ROW = {"sku": "ABC-1234", "quantity": 3, "price": 1.5}

# schema, values that obey it and can be written, values that do not obey it
HAND: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [None, True, 1.5, "a", [1, [2]], {"a": {"b": []}}], []),
    ({}, [None, False, -3, 'é😀\n"\\/', [], {}, {"": [{}]}], []),
    ({"type": "null"}, [None], [0, "null", False]),
    ({"type": "boolean"}, [True, False], [None, 0, "true"]),
    ({"type": "integer"}, [0, -1, 12345678901234567890], [1.5, "1", None]),
    ({"type": "number"}, [0, -1, 1.5, 1e-7, -2.5e300], ["1", None, True]),
    ({"type": "string"}, ["", "a", "\u0000\u001f", "\u007f\u0080\uffff", "😀\U0010ffff", 'say "hi" \\ /'], [1, None]),
    ({"type": "array"}, [[], [1, "a", [None]], [{}]], [{}, "[]"]),
    ({"type": "object"}, [{}, {"a": 1}, {"a": {"b": {"c": []}}}], [[], "{}"]),
    ({"type": ["integer", "null"]}, [3, None], [3.5, "3"]),
    ({"type": ["string", "boolean", "array"]}, ["x", True, [1]], [1, None, {}]),
    ({"type": ["integer", "number"]}, [3, 3.5], ["3"]),
    ({"type": "string", "nullable": True}, ["x", None], [1]),
    ({"type": "integer", "nullable": False}, [1], [None]),
    ({"const": 'é"\n'}, ['é"\n'], ["e", None]),
    ({"const": None}, [None], [0, False]),
    ({"const": 1}, [1], [True, "1", 2]),
    ({"const": True}, [True], [1, "true"]),
    ({"const": [1, {"a": [], "b": {}}]}, [[1, {"a": [], "b": {}}]], [[1, {"a": []}], []]),
    ({"const": {}}, [{}], [{"a": 1}, []]),
    ({"enum": ["a", "ab", "abc", ""]}, ["a", "ab", "abc", ""], ["b", None]),
    ({"enum": [1, 1.5, None, False, "x", [], {"k": 2}]}, [1, 1.5, None, False, "x", [], {"k": 2}], [True, 0, "1", [1]]),
    ({"type": "string", "enum": ["a", 1, None]}, ["a"], [1, None]),
    ({"enum": [1, 5, 9, "x"], "minimum": 4}, [5, 9, "x"], [1]),
    ({"enum": ["a", "abcd"], "maxLength": 2, "const": "a"}, ["a"], ["abcd"]),
    ({"type": "integer", "minimum": 0}, [0, 7, 10**30], [-1, 0.5]),
    ({"type": "integer", "maximum": -5}, [-5, -123], [-4, 0, 5]),
    ({"type": "integer", "minimum": -12, "maximum": 103}, [-12, -1, 0, 9, 10, 99, 100, 103], [-13, 104, 999, -99]),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [1, 9], [0, 10, -1]),
    ({"type": "integer", "minimum": 1.5, "maximum": 3.5}, [2, 3], [1, 4]),
    ({"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1, 0.999], [-0.1, 1.01, 2, 10]),
    ({"type": "number", "exclusiveMinimum": -0.25, "maximum": 12.5}, [-0.24, 0, 12.5, 3], [-0.25, -1, 12.51, 100]),
    ({"type": "number", "minimum": 1e21}, [10**21], [1, 10**20]),
    ({"minimum": 10}, [10, 11.5, "a", None, []], [9, 9.99, -20]),
    ({"type": "string", "minLength": 2}, ["ab", "😀é", "abc"], ["", "a", "😀"]),
    ({"type": "string", "maxLength": 3}, ["", "abc", "😀😀😀"], ["abcd", "😀😀😀😀"]),
    ({"type": "string", "minLength": 2, "maxLength": 2}, ["ab", '"\\', "\n\t"], ["a", "abc"]),
    ({"type": "string", "maxLength": 0}, [""], ["a"]),
    ({"type": "string", "pattern": "^[a-z]+$"}, ["a", "abc"], ["", "A", "a1"]),
    ({"type": "string", "pattern": "foo"}, ["foo", "a foo b"], ["fo", ""]),
    ({"type": "string", "pattern": "^a|b$"}, ["a", "ax", "xb"], ["xa", "bx"]),
    ({"type": "string", "pattern": "^\\d{3}-\\w+$", "maxLength": 8}, ["123-a", "123-abcd"], ["123-abcde", "12-a"]),
    ({"type": "string", "pattern": '^["\\\\/\\n]+$'}, ['"', "\\", "/\n"], ["a"]),
    ({"type": "string", "pattern": "^[é-ü😀]+$", "minLength": 2}, ["éü", "😀😀"], ["é", "ab"]),
    ({"type": "string", "pattern": "^(?:ab|cd)*$", "minLength": 3, "maxLength": 6}, ["abcd", "cdabab"], ["ab", "abc"]),
    ({"type": "string", "pattern": "^.$"}, ["a", "é", "😀"], ["", "ab", "\n"]),
    ({"pattern": "^x"}, ["x", "xy", 1, None], ["y", ""]),
    (
        {"type": "string", "format": "date"},
        ["2024-02-29", "1999-12-31", "2000-02-29"],
        ["2023-02-29", "2024-13-01", "1900-02-29"],
    ),
    ({"type": "string", "format": "time"}, ["23:59:59Z", "00:00:00.123+05:30"], ["24:00:00Z", "1:00:00Z"]),
    (
        {"type": "string", "format": "date-time"},
        ["2024-02-29T12:00:00Z", "2021-01-01T00:00:00.5-08:00"],
        ["2024-02-30T12:00:00Z"],
    ),
    (
        {"type": "string", "format": "uuid"},
        ["123e4567-E89b-12d3-a456-426614174000"],
        ["123e4567e89b12d3a456426614174000"],
    ),
    ({"type": "string", "format": "email"}, ["a.b+c@example.co.uk"], ["a.example.com", ""]),
    ({"type": "string", "format": "ipv4"}, ["0.0.0.0", "255.10.1.99"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
    ({"type": "string", "format": "date", "pattern": "^20", "maxLength": 10}, ["2024-05-06"], ["1999-05-06"]),
    ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], [1.5], {}]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1}, [[True], [False] * 4], [[], [1]]),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 2}, [[], [None], [None, None]], [[None] * 3]),
    ({"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}, [[1, 2], [2, 2, 1]], [[1], [1] * 4]),
    ({"type": "array", "minItems": 3}, [[1, "a", None]], [[1, 2]]),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    ({"type": "array", "items": False}, [[]], [[1]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, [[], [1], [1, "a"]], [["a"], [1, 2]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [[], [1]], [[1, 2], ["a"]]),
    (
        {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 2},
        [[1, 2], [1, 2, 2]],
        [[1], [1, 1]],
    ),
    ({"type": "array", "prefixItems": [{"const": 1}], "minItems": 3}, [[1, None, "a"]], [[1, 2]]),
    (
        {"type": "array", "prefixItems": [True, {"type": "null"}], "minItems": 2, "maxItems": 2},
        [["x", None]],
        [[1], [1, 2]],
    ),
    ({"items": {"type": "integer"}}, [[1], "a", {"b": 1}], [["a"]]),
    (
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
        [[[1, 2], []]],
        [[[1, 2, 3]]],
    ),
    ({"type": "object", "properties": {}}, [{}], []),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, [{}, {"a": 1}], [{"a": "x"}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, [{"a": 1}], [{}, {"a": None}]),
    (
        {"type": "object", "properties": {k: {"type": "boolean"} for k in "abcd"}, "required": ["b"]},
        [{"b": True}, {"a": True, "b": False, "d": True}, dict.fromkeys("abcd", False)],
        [{}, {"a": True}, {"b": 1}],
    ),
    ({"type": "object", "required": ["x"]}, [{"x": None}, {"x": 1, "y": [2]}], [{}, {"y": 1}]),
    (
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["b", "a"]},
        [{"a": 1, "b": []}],
        [{"b": 2}, {"a": 1}],
    ),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, 'é"': 2}], [{"a": "x"}]),
    ({"type": "object", "additionalProperties": True}, [{}, {"k": [1]}], [[]]),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    (
        {"properties": {"a": {"const": 1}, "ab": {"const": 2}}, "additionalProperties": {"const": 3}, "type": "object"},
        [{"a": 1, "ab": 2, "abc": 3, "": 3, "b": 3}, {"\\": 3}],
        [{"a": 3}, {"ab": 3}, {"b": 1}],
    ),
    (
        {"type": "object", "properties": {'q"é\\': {"const": 0}}, "required": ['q"é\\']},
        [{'q"é\\': 0}],
        [{}, {'q"é\\': 1}],
    ),
    ({"type": "object", "properties": {"a": False, "b": {"const": 1}}}, [{"b": 1}, {}], [{"a": 1}]),
    ({"properties": {"a": {"type": "integer"}}}, [{"a": 1}, 1, "x", [2]], [{"a": "x"}]),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}, [1, "ab"], ["abc", 1.5, None]),
    ({"anyOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "minLength": 3}]}, ["a", "xyz"], ["b", "xy"]),
    ({"anyOf": [{"minimum": 5}, {"maximum": -5}], "type": "integer"}, [5, -5, 77], [0, 4, -4]),
    (
        {
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "properties": {"a": {"const": 1}, "b": {"const": 2}},
            "type": "object",
        },
        [{"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
        [{}, {"a": 2}],
    ),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None, 1.5]),
    (
        {"oneOf": [{"type": "number", "maximum": 0}, {"type": "number", "exclusiveMinimum": 0, "maximum": 5}]},
        [-1, 0, 0.5, 5],
        [6],
    ),
    ({"oneOf": [{"const": "a"}, {"const": "b"}, {"type": "null"}]}, ["a", "b", None], ["c"]),
    (
        {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 5}]},
        ["", "ab", "abcde"],
        ["abc", "abcd"],
    ),
    ({"oneOf": [{"type": "array", "maxItems": 1}, {"type": "array", "minItems": 3}]}, [[], [1], [1, 2, 3]], [[1, 2]]),
    (
        PETS,
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "name": "Rex", "walks": 2}],
        [{"kind": "cat", "walks": 9}, {"kind": "cow"}],
    ),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]}, [3, 4, 5], [2, 6, 4.5]),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string", "maxLength": 3}, ["ab", "bxa"], ["a", "axxb"]),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"type": "object", "properties": {"a": {"minimum": 3}, "b": {"type": "string"}}},
            ]
        },
        [{"a": 3}, {"a": 4, "b": "x"}],
        [{"a": 2}, {"b": "x"}, {"a": 3, "b": 1}],
    ),
    (
        {
            "allOf": [
                {"properties": {"a": {"const": 1}}, "additionalProperties": False, "type": "object"},
                {"properties": {"b": True}},
            ]
        },
        [{}, {"a": 1}],
        [{"b": 1}, {"a": 2}],
    ),
    (
        {"allOf": [{"prefixItems": [{"type": "integer"}]}, {"items": {"minimum": 2}}], "type": "array"},
        [[], [2], [3, 2.5]],
        [[1], [2.5, 3]],
    ),
    (
        {
            "allOf": [
                {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                {"anyOf": [{"minimum": 3}, {"maxLength": 1}]},
            ]
        },
        [3, "a"],
        [[], None],
    ),
    ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2.0, 3, 4]}]}, [2, 3], [1, 4]),
    ({"$defs": {"a/b~": {"type": "integer"}}, "$ref": "#/$defs/a~1b~0"}, [1], ["a"]),
    ({"definitions": {"p": {"minimum": 1}}, "$ref": "#/definitions/p", "type": "integer"}, [1], [0, "a"]),
    (
        {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "null"}}, "type": "object"},
        [{"a": None, "b": None}],
        [{"a": 1}],
    ),
    ({"$ref": "#/prefixItems/0", "prefixItems": [{"type": "boolean"}]}, [True], [1, []]),
    (
        TREE,
        [{"value": 1, "children": []}, {"value": 1, "children": [{"value": 2, "children": []}] * 2}],
        [{"value": 1}, {}],
    ),
    (
        CHAIN,
        [{"name": "a", "next": None}, {"name": "a", "next": {"name": "b", "next": None}}],
        [{"name": "a"}, {"name": 1, "next": None}],
    ),
    (
        ORDER,
        [{"id": 1, "customer": {"name": "é", "email": "a@b.cc"}, "items": [ROW], "status": "open", "note": None}],
        [{"id": 1, "customer": {"name": "é", "email": "a@b.cc"}, "items": [], "status": "open"}, {}],
    ),
    (
        {
            "title": "T",
            "description": "d",
            "default": 1,
            "examples": [2],
            "$comment": "c",
            "readOnly": True,
            "x-order": 3,
            "const": 4,
        },
        [4],
        [1],
    ),
    ({"type": "integer", "deprecated": True}, [1], ["a"]),
]


def columns(automaton: Automaton) -> np.ndarray:
    """The different columns of an automaton's table, int32 [S, K]."""
    return np.stack(
        [np.frombuffer(c, np.int32) for c in {column.tobytes() for column in automaton.transitions.T}], axis=1
    )


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Texts of an automaton, drawn at random: one of the next states, then a symbol that leads there; after `steps`
    symbols the nearest way to an end."""

    automaton: Automaton
    ways: list[list[int]]  # the next states of each state
    distance: list[int]  # symbols to the nearest end

    @classmethod
    def of(cls, automaton: Automaton) -> "Sampler":
        ways = [sorted(set(row.tolist()) - {-1}) for row in columns(automaton)]
        sources: list[list[int]] = [[] for _ in ways]
        for state, targets in enumerate(ways):
            for target in targets:
                sources[target].append(state)
        distance = [0 if accepting else -1 for accepting in automaton.accepting]
        reached = [state for state, far in enumerate(distance) if far == 0]
        for state in reached:  # grows while it is walked
            new = [source for source in sources[state] if distance[source] < 0]
            for source in new:
                distance[source] = distance[state] + 1
            reached += new
        return cls(automaton=automaton, ways=ways, distance=distance)

    def draw(self, random: Random, steps: int = 60) -> bytes:
        """One text. Control symbols are written by name."""
        state, written, text = 0, 0, b""
        while True:
            ways = self.ways[state]
            if self.automaton.accepting[state] and (not ways or written > steps or random.random() < 0.3):
                return text
            if written > steps:
                ways = [way for way in ways if self.distance[way] < self.distance[state]]
            target = random.choice(ways)
            symbol = random.choice(np.flatnonzero(self.automaton.transitions[state] == target).tolist())
            text += bytes([symbol]) if symbol < 256 else self.automaton.controls[symbol - 256].encode()
            state, written = target, written + 1


def random_schema(random: Random, depth: int = 3) -> Any:
    """A schema of the supported keywords. It may be unsatisfiable."""
    kinds = [_integer, _number, _string, _literal, _plain, _typed]
    if depth:
        kinds += [_array, _object, _object, _any_of, _all_of, _one_of]
    return random.choice(kinds)(random, depth - 1)


def _typed(random: Random, depth: int) -> Any:
    return {"type": random.sample(["null", "boolean", "integer", "string"], random.randint(1, 3))}


def _plain(random: Random, depth: int) -> Any:
    return random.choice([{"type": "boolean"}, {"type": "null"}, {"type": "string"}, {"type": "integer"}])


def _integer(random: Random, depth: int) -> Any:
    low = random.randint(-200, 200)
    schema: dict[str, Any] = {"type": "integer"}
    if random.random() < 0.7:
        schema[random.choice(["minimum", "exclusiveMinimum"])] = low
    if random.random() < 0.7:
        schema[random.choice(["maximum", "exclusiveMaximum"])] = low + random.randint(2, 2000)
    return schema


def _number(random: Random, depth: int) -> Any:
    low = random.randint(-3000, 3000) / 100
    schema: dict[str, Any] = {"type": "number"}
    if random.random() < 0.5:
        schema[random.choice(["minimum", "exclusiveMinimum"])] = low
    if random.random() < 0.5:
        schema[random.choice(["maximum", "exclusiveMaximum"])] = low + random.randint(1, 999) / 8
    return schema


def _string(random: Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    if random.random() < 0.4:
        schema["pattern"] = random.choice(
            ["^[a-c]+$", "é", "^x?[0-9]{2,4}", "[😀-😃]$", "^(?:ab|c)*$", "\\n", "^[^a]*$"]
        )
    elif random.random() < 0.3:
        schema["format"] = random.choice(["date", "time", "date-time", "uuid", "email", "ipv4"])
        return schema
    least = random.randint(0, 4)
    if random.random() < 0.4:
        schema["minLength"] = least
    if random.random() < 0.4:
        schema["maxLength"] = least + random.randint(0, 8)
    return schema


def _literal(random: Random, depth: int) -> Any:
    values = ["a", 'b"', "é\n", "", 1, -2.5, 1e20, None, True, False, [], [1, "x"], {}, {"k": [{}], "l": None}]
    if random.random() < 0.4:
        return {"const": random.choice(values)}
    return {"enum": random.sample(values, random.randint(1, 5))}


def _array(random: Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array"}
    if random.random() < 0.8:
        schema["items"] = random_schema(random, depth)
    if random.random() < 0.3:
        schema["prefixItems"] = [random_schema(random, depth) for _ in range(random.randint(1, 2))]
    least = random.randint(0, 2)
    if random.random() < 0.5:
        schema["minItems"] = least
    if random.random() < 0.5:
        schema["maxItems"] = least + random.randint(0, 2)
    return schema


def _object(random: Random, depth: int) -> Any:
    names = random.sample(["a", "b", "ab", "é", 'q"', "long name", "", "\\n"], random.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(random, depth) for name in names}}
    schema["required"] = [name for name in names if random.random() < 0.5]
    if random.random() < 0.3:
        schema["additionalProperties"] = random.choice([False, random_schema(random, 0)])
    return schema


def _any_of(random: Random, depth: int) -> Any:
    return {"anyOf": [random_schema(random, depth) for _ in range(random.randint(1, 3))]}


def _all_of(random: Random, depth: int) -> Any:
    make = random.choice([_integer, _number, _string, _object, _array])
    return {"allOf": [make(random, depth) for _ in range(2)]}


def _one_of(random: Random, depth: int) -> Any:
    tagged = []
    for tag in ["x", "y", "z"][: random.randint(1, 3)]:
        tagged.append(_object(random, depth))
        tagged[-1]["properties"]["kind"] = {"const": tag}
        tagged[-1]["required"].append("kind")
    return {"oneOf": tagged}


def texts(value: Any) -> Iterator[str]:
    """A value as JSON text, in the layouts that are always allowed."""
    for indent, separators in ((None, None), (None, (",", ":")), (2, None), (4, None)):
        yield json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
