"""JSON schemas against jsonschema and llguidance: what is written is valid, what is valid can be written, and what
constrains is never ignored."""

import json
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import reduce
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.text.language.automaton import Automaton
from mlx_diffgemma.text.language.scalars import Bound, numbers
from mlx_diffgemma.text.language.syntax import Layout
from mlx_diffgemma.text.language.values import any_json, json_schema
from tests.text import oracle
from tests.text.schemas import CHAIN, HAND, ORDER, PETS, TREE, Sampler, columns, random_schema, texts

STRING = {"type": "string"}


def automaton(schema: Any, **options: Any) -> Automaton:
    [part] = json_schema(schema, **options).parts
    assert isinstance(part, Automaton)
    return part


def validator(schema: Any) -> jsonschema.Draft202012Validator:
    if isinstance(schema, dict) and schema.get("nullable"):  # OpenAPI's word for what JSON Schema writes as anyOf
        schema = {"anyOf": [{k: v for k, v in schema.items() if k != "nullable"}, {"type": "null"}]}
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


@pytest.mark.parametrize(("schema", "good", "bad"), HAND, ids=range(len(HAND)))
def test_values_are_accepted_in_every_layout_or_in_none(schema: Any, good: list[Any], bad: list[Any]) -> None:
    language, valid = automaton(schema), validator(schema).is_valid
    assert all(map(valid, good)) and not any(map(valid, bad))
    for value in good:
        assert all(map(language.accepts, texts(value))), value
    for value in bad:
        assert not any(map(language.accepts, texts(value))), value


def test_whatever_is_written_is_valid(record_summary: Callable[[str], None]) -> None:
    random, members, unsatisfiable = Random(16), 0, 0
    schemas = [schema for schema, _, _ in HAND] + [random_schema(random, 2) for _ in range(150)]
    for schema in schemas:
        try:
            sampler, check = Sampler.of(automaton(schema)), validator(schema)
        except ConfigError as error:
            assert "nothing satisfies" in str(error)
            unsatisfiable += 1
            continue
        for _ in range(12):
            text = sampler.draw(random, random.randint(0, 60)).decode()
            check.validate(json.loads(text))
            members += 1
            at = random.randrange(len(text) + 1)
            changed = text[:at] + random.choice('"\\u09-e.,:{}[] \n😀') + text[at + random.randint(0, 1) :]
            if sampler.automaton.accepts(changed):
                check.validate(json.loads(changed))
    record_summary(
        f"schemas: {len(schemas)}, {unsatisfiable} unsatisfiable; {members} texts drawn, all valid by jsonschema"
    )
    assert members > 2500


def test_every_prefix_goes_on_as_llguidance_says(record_summary: Callable[[str], None]) -> None:
    random, total, compared = Random(16), Counter[str](), 0
    schemas = [schema for schema, _, _ in HAND if oracle.comparable(schema)]
    while len(schemas) < 220:
        schemas += [s for s in [random_schema(random)] if oracle.comparable(s)]
    for schema in schemas:
        counts, wrong = oracle.compare(schema, random, 2) or (Counter(), [])
        assert not wrong, wrong[0]
        compared += bool(counts)
        total += counts
    prefixes = total.pop("prefixes")
    record_summary(
        f"llguidance: {compared} schemas, {prefixes} prefixes, expected differences {dict(total)}, no others"
    )
    assert compared > 200 and prefixes > 4000


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
def test_any_string_can_be_written_raw_or_escaped(text: str) -> None:
    for ascii_only in (False, True):
        written = json.dumps(text, ensure_ascii=ascii_only)
        assert FREE.accepts(written) and ANY.accepts(f"{{{written}: [{written}]}}")
    every = "".join(f"\\u{unit:04X}" for unit in np.frombuffer(text.encode("utf-16-le"), np.uint16).tolist())
    assert FREE.accepts(f'"{every}"')


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9))
def test_lengths_count_characters(text: str) -> None:
    written = json.dumps(text, ensure_ascii=False)
    assert SHORT.accepts(written) == (3 <= len(text) <= 6)
    assert LONG.accepts(json.dumps(text)) == (len(text) >= 2)


FREE, ANY = automaton(STRING), automaton({})
SHORT, LONG = automaton(STRING | {"minLength": 3, "maxLength": 6}), automaton(STRING | {"minLength": 2})


@pytest.mark.parametrize(
    "text",
    [
        '"\\ud83d"',
        '"\\ude00"',
        '"\\ude00\\ud83d"',
        '"\\ud83d\\u0041"',
        '"\n"',
        '"\\x41"',
        '"\\u12g4"',
        '"\\u123"',
        '"a',
        "'a'",
        '"\\a"',
        '"\x1f"',
    ],
)
def test_what_is_no_json_string_is_not_read(text: str) -> None:
    assert not FREE.accepts(text)
    assert not ANY.accepts(text)


def test_no_value_leads_to_bytes_that_are_no_utf8() -> None:
    for wrong in (b'"\x80"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xc3"'):
        assert FREE.walk(wrong[:-1]) < 0 or not FREE.accepts(wrong)


DECIMALS = st.decimals(-300, 300, places=2).map(lambda d: d.normalize()) | st.integers(-1000, 1000).map(Decimal)
BOUNDS = st.none() | st.builds(
    lambda value, inclusive: Bound(value=value, inclusive=inclusive), DECIMALS, st.booleans()
)


@given(low=BOUNDS, high=BOUNDS, whole=st.booleans(), values=st.lists(DECIMALS, min_size=8), zeros=st.integers(0, 2))
def test_bounds_of_numbers_are_exact(
    low: Bound | None, high: Bound | None, whole: bool, values: list[Decimal], zeros: int
) -> None:
    table = numbers(whole, low, high)
    for value in [*values, *(b.value for b in (low, high) if b is not None)]:
        inside = low is None or value > low.value or (low.inclusive and value == low.value)
        inside &= high is None or value < high.value or (high.inclusive and value == high.value)
        text = format(value or abs(value), "f")
        assert table.accepts(text.encode()) == (inside and (not whole or value == int(value)))
        if not whole:
            text += "0" * zeros if "." in text else "." + "0" * (zeros + 1)
            assert table.accepts(text.encode()) == inside


def test_numbers_are_those_of_json() -> None:
    number, integer = automaton({"type": "number"}), automaton({"type": "integer"})
    for text in ("0", "-0", "10", "-1.50", "1e5", "1E+05", "2.5e-300", "-0.0"):
        assert number.accepts(text)
    for text in ("01", "+1", ".5", "1.", "1e", "-", "0x1", "NaN", "Infinity", "1,0", " 1"):
        assert not number.accepts(text)
    assert integer.accepts("-12") and not any(map(integer.accepts, ("1.0", "1e2", "-0", "00")))


def test_objects_are_written_in_order_and_without_unnamed_properties() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "required": ["b"],
    }
    language = automaton(schema)
    assert language.accepts('{"a":1,"b":2,"c":3}') and language.accepts('{"b":2,"c":3}')
    for text in ('{"b":2,"a":1}', '{"b":2,"d":4}', '{"a":1,"a":1,"b":2}', '{,"b":2}', '{"b":2,}', '{"a":1 "b":2}'):
        assert not language.accepts(text)


def test_room_is_bounded() -> None:
    language = automaton({"type": "array", "items": {"type": "object", "additionalProperties": {"const": 1}}})
    for text in (
        '[{"a":1}, {}]',
        '[\n  {\n    "a": 1\n  }\n]',
        '[\n    {\n        "a": 1,\n        "b": 1\n    }\n]',
        '[{\n    "a":1}]',
    ):
        assert language.accepts(text), text
    for text in (
        '[ {"a":1}]',
        '[{"a":  1}]',
        '[{"a" :1}]',
        "[\n\n  {}]",
        "[\n   {}]",
        "[\t{}]",
        "[{}\n  ]",
        " []",
        "[] ",
        "[]\n",
        "[\n]",
    ):
        assert not language.accepts(text), text
    line = automaton({"type": "array"}, layout=Layout(indents=()))
    assert line.accepts("[1, [2,3]]") and not line.accepts("[\n  1]")
    assert not automaton({"type": "array"}, layout=Layout(spaces=False, indents=())).accepts("[1, 2]")
    assert automaton({"type": "array"}, layout=Layout(indents=(3,))).accepts("[\n   1\n]")
    assert automaton({"type": "array"}).accepts('[\n{"a": 1},\n{"a": 2}\n]')  # as the built-in model writes records


def test_recursion_ends_at_its_depth() -> None:
    def nested(levels: int) -> str:
        return json.dumps({"name": "x", "next": json.loads(nested(levels - 1)) if levels > 1 else None})

    for depth in (1, 2, 4):
        chain, free = automaton(CHAIN, depth=depth), any_json(depth=depth).parts[0]
        assert isinstance(free, Automaton)
        assert chain.accepts(nested(depth)) and not chain.accepts(nested(depth + 1))
        assert any_json(depth=depth).notes == (f"what the schema leaves open nests at most {depth} deep",)
        assert json_schema(CHAIN, depth=depth).notes == (f"# stands inside itself at most {depth} deep",)
        assert free.accepts("[" * depth + "]" * depth) and not free.accepts("[" * (depth + 1) + "]" * (depth + 1))
    endless = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    with pytest.raises(ConfigError, match=r"nothing satisfies.*\nRecursion deeper than 4 is cut"):
        json_schema(endless)
    with pytest.raises(ConfigError, match="nothing satisfies"):
        json_schema({"$ref": "#"})
    with pytest.raises(ConfigError, match="depth must be 1 or more"):
        json_schema({}, depth=0)


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(max_length=20)
    zip: str = pydantic.Field(pattern=r"^\d{5}$")


class Cat(pydantic.BaseModel):
    kind: str = pydantic.Field(json_schema_extra={"const": "cat"})
    lives: int = pydantic.Field(ge=1, le=9)


class Person(pydantic.BaseModel):
    name: str
    age: int | None = None
    scores: list[float] = []
    address: Address
    friends: list["Person"] = []
    pair: tuple[int, bool] = (0, True)
    extra: dict[str, int] = {}
    pet: Cat | None = None


def test_pydantic_models_are_schemas() -> None:
    language, random = automaton(Person, depth=2), Random(1)
    sampler = Sampler.of(language)
    for _ in range(200):
        Person.model_validate_json(sampler.draw(random))
    person = Person(
        name="é", address=Address(street="a", zip="12345"), friends=[], extra={"x": 1}, pet=Cat(kind="cat", lives=3)
    )
    assert language.accepts(person.model_dump_json()) and language.accepts(person.model_dump_json(indent=2))
    assert json_schema(Person).digest == json_schema(json.dumps(Person.model_json_schema())).digest


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "the JSON schema is not JSON: Expecting property name enclosed in double quotes in line 1, column 2."),
        (3, "schema at #: expected an object, true or false, got 3."),
        ({"not": {}}, "schema at #: the keyword 'not' is not supported, and not ignored either."),
        (
            {"properties": {"a": {"maxLenght": 3}}},
            "schema at #/properties/a: the keyword 'maxLenght' is not supported, and not ignored either.\nDid you",
        ),
        ({"items": {"multipleOf": 2}}, "schema at #/items: the keyword 'multipleOf' is not supported"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"patternProperties": {}}, "'patternProperties'"),
        ({"if": True, "then": False}, "'if'"),
        ({"anyOf": [{"a/b": 1}]}, "schema at #/anyOf/0: the keyword 'a/b'"),
        ({"type": "text"}, 'array, object, integer, or a list of them, got "text".'),
        ({"type": []}, "schema at #/type: expected"),
        ({"enum": []}, "schema at #/enum: expected a list of one JSON value or more"),
        ({"const": float("inf")}, "schema at #/const: expected a JSON value, got Infinity."),
        ({"enum": [[{1: 2}]]}, "schema at #/enum: expected a list of one JSON value or more"),
        ({"properties": {1: {}}}, "schema at #/properties: expected an object of schemas"),
        (
            reduce(lambda inner, _: {"anyOf": [inner]}, range(500), STRING),
            "the schema nests deeper than can be written.",
        ),
        ({"minLength": -1}, "schema at #/minLength: expected a whole number, 0 or more, got -1."),
        ({"maxItems": 1.5}, "schema at #/maxItems: expected a whole number"),
        ({"maximum": True}, "schema at #/maximum: expected a number"),
        ({"minimum": float("nan")}, "schema at #/minimum: expected a number"),
        ({"exclusiveMinimum": 10**400}, "schema at #/exclusiveMinimum: expected a number of at most 300 digits"),
        ({"format": "uri"}, 'schema at #/format: expected one of date, time, date-time, uuid, email, ipv4, got "uri".'),
        ({"required": "a"}, "schema at #/required: expected a list of names"),
        ({"properties": {"a~/b": {"items": []}}}, "schema at #/properties/a~0~1b/items: expected a schema"),
        ({"pattern": "a(?=b)"}, "schema at #: pattern 'a(?=b)': look-around (position 1) is not supported."),
        ({"properties": {"a": {"pattern": "("}}}, "#/properties/a: pattern '(' is no regular expression at position 0"),
        ({"minLength": 3, "maxLength": 2}, "schema at #: minLength is 3, more than maxLength, 2."),
        ({"minimum": 3, "maximum": 2}, "schema at #: minimum is 3, more than maximum, 2."),
        ({"$ref": "#/$defs/a"}, "schema at #: $ref '#/$defs/a' leads nowhere: there is no '$defs'."),
        ({"$ref": "https://example.com/a"}, "$ref 'https://example.com/a' cannot be followed"),
        ({"items": {"$id": "x"}}, "schema at #/items: $id inside a schema"),
        (
            {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
            "schema at #/oneOf: alternatives 0 and 1 may hold for one value, which",
        ),
        ({"oneOf": [STRING, {"const": 1}, {"pattern": "a", "type": "string"}]}, "alternatives 0 and 2 may hold"),
        (False, "nothing satisfies the JSON schema"),
        (
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
            "nothing satisfies the JSON schema: no value fits at #.",
        ),
        (
            {"type": "object", "properties": {"a": {"const": 1, "type": "string"}}, "required": ["a"]},
            "no value fits at #/properties/a.",
        ),
        ({"type": "string", "pattern": "^a+$", "maxLength": 0}, "nothing satisfies the JSON schema"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "nothing satisfies the JSON schema"),
        ({"type": "string", "maxLength": 5000}, "the language needs more than 25,000 states.\nBound it more tightly"),
        ({"type": "string", "minLength": 10**8}, "a string of this length needs more than 25,000 states"),
        ({"type": "array", "items": ORDER, "minItems": 300}, "more than 25,000 states"),
        ({"anyOf": [{"allOf": [{"anyOf": [{"minimum": i} for i in range(80)]}] * 3}]}, "more than 5,000 combinations"),
    ],
)
def test_bad_schemas_are_explained_with_their_path(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        json_schema(schema)
    assert message in str(raised.value) and len(str(raised.value).split("\n")) <= 3


def test_layouts_are_checked() -> None:
    with pytest.raises(ConfigError, match="an indent is 0 to 8 spaces"):
        Layout(indents=(2, 9))


@pytest.mark.parametrize("schema", [{}, ORDER, PETS, TREE, STRING | {"maxLength": 40}, {"enum": ["a", "b"]}])
def test_automata_are_plain_trimmed_and_small(schema: Any) -> None:
    language = automaton(schema, depth=2)
    following, count = language.transitions, language.states
    assert following.dtype == np.int32 and following.shape == (count, 256) and language.start == 0
    assert language.accepting.dtype == bool and following.min() == -1 and following.max() == count - 1
    edges = np.zeros((count, count), bool)
    state, symbol = np.nonzero(following >= 0)
    edges[state, following[state, symbol]] = True
    forward, backward = np.arange(count) == 0, language.accepting.copy()
    for _ in range(count):
        before = forward.sum() + backward.sum()
        forward |= edges[forward].any(axis=0)
        backward |= edges[:, backward].any(axis=1)
        if forward.sum() + backward.sum() == before:
            break
    assert forward.all() and backward.all()
    block = language.accepting.astype(np.int64)  # Moore: no two states are equal
    while True:
        finer = np.unique(np.c_[block, np.append(block, -1)[columns(language)]], axis=0, return_inverse=True)[
            1
        ].reshape(-1)
        if finer.max() == block.max():
            break
        block = finer
    assert block.max() + 1 == count


def test_equal_languages_are_equal_data() -> None:
    first = json_schema({"anyOf": [{"const": "ab"}, {"const": "ac"}]})
    second = json_schema({"type": "string", "enum": ["ac", "ab"], "title": "any"})
    assert first.digest == second.digest != json_schema({"enum": ["ab", "ad"]}).digest
    assert np.array_equal(first.parts[0].transitions, second.parts[0].transitions)


def test_sizes_are_what_they_were() -> None:
    """States, so that a language which grows is noticed."""
    five = {"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "mail": STRING,
            "state": {"enum": ["active", "inactive", "pending"]}, "date": STRING | {"format": "date"}}  # fmt: skip
    bounded = five | {"name": STRING | {"maxLength": 40}, "mail": STRING | {"maxLength": 40}}
    sizes = [
        automaton({"type": "object", "properties": properties, "required": list(properties)}).states
        for properties in (five, bounded)
    ]
    sizes += [automaton(schema).states for schema in (ORDER, {}, {"type": "string", "maxLength": 1000})]
    assert sizes == [168, 850, 723, 2308, 9003]


def test_a_pattern_is_searched_for_as_jsonschema_does() -> None:
    for pattern in ("^a", "a$", "b", "^a|b$", "^(?:a|b)*$", "(^|b)a"):
        language = automaton(STRING | {"pattern": pattern})
        for text in ("", "a", "b", "ab", "ba", "xax", "aab", "xba"):
            assert language.accepts(json.dumps(text)) == bool(re.search(pattern, text)), (pattern, text)
