"""Choices, texts with holes, and calls in the model's own syntax."""

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from mlx_lm.tool_parsers import gemma4

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.text.language.automaton import Automaton, Language, Spelled
from mlx_diffgemma.text.language.regex import regex
from mlx_diffgemma.text.language.syntax import CONTROLS, END_TOOL_CALL, QUOTE, TOOL_CALL
from mlx_diffgemma.text.language.texts import Hole, choices, fill, free_text, literal
from mlx_diffgemma.text.language.values import json_schema, tool_call
from tests.text.schemas import Sampler, random_schema

WEATHER = {
    "type": "function",
    "function": {
        "name": "get-weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["°C", "°F"]},
                "Location": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 14}},
                "place": {
                    "type": "object",
                    "properties": {"lat": {"type": "number"}, "name": {"type": "string", "maxLength": 9}},
                },
            },
            "required": ["Location"],
        },
    },
}


def only(language: Language) -> Automaton:
    [part] = language.parts
    assert isinstance(part, Automaton)
    return part


def parsed(text: str) -> Any:
    """A call as mlx-lm reads it."""
    assert text.startswith(TOOL_CALL) and text.endswith(END_TOOL_CALL)
    return gemma4.parse_tool_call(text.removeprefix(TOOL_CALL).removesuffix(END_TOOL_CALL))


def test_choices_and_literals_keep_the_tokenizers_own_spelling() -> None:
    assert choices(["yes", "no", "né 😀"]).parts == (Spelled(texts=("yes", "no", "né 😀")),)
    assert literal("a\n").parts == (Spelled(texts=("a\n",)),)
    joined = literal("Answer: ") + choices(["a", "b"]) + regex("x+") + json_schema({"const": 1})
    assert [type(part) for part in joined.parts] == [Spelled, Spelled, Automaton, Automaton]
    assert (
        joined.digest == (literal("Answer: ") + choices(["a", "b"]) + regex("xx*") + json_schema({"enum": [1]})).digest
    )
    assert joined.digest != (literal("Answer: ") + choices(["b", "a"]) + regex("x+") + json_schema({"const": 1})).digest


def test_a_text_with_holes_is_pins_and_holes_in_order() -> None:
    holes = [Hole(), Hole(least=1, most=3), Hole(pattern=r"\d+"), Hole(choices=("a", "b"))]
    parts = fill("<fill>one<fill> two <fill><fill>", holes=holes).parts
    free, pin, bounded, second, digits, last = parts
    assert (pin, second, last) == (Spelled(texts=("one",)), Spelled(texts=(" two ",)), Spelled(texts=("a", "b")))
    assert isinstance(free, Automaton) and isinstance(bounded, Automaton) and isinstance(digits, Automaton)
    assert free.accepts("") and free.accepts("any\n\x00 text 😀") and free.states == 8
    assert [bounded.accepts(text) for text in ("", "é", "😀😀😀", "abcd")] == [False, True, True, False]
    assert digits.accepts("12") and not digits.accepts("a")
    assert fill("a [..] b", mark="[..]").parts[::2] == (Spelled(texts=("a ",)), Spelled(texts=(" b",)))
    assert len(fill("<fill>").parts) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choices([]), "choices need a list of one text or more, got []."),
        (lambda: choices("yes"), "choices need a list"),
        (lambda: choices(["a", ""]), "a choice is empty."),
        (lambda: choices(["a", "b", "a"]), "choices 1 and 3 are equal: 'a'."),
        (lambda: choices(["a", "\ud800b"]), "a choice holds half a surrogate pair at character 0"),
        (lambda: literal(""), "the literal text is empty."),
        (lambda: fill("no hole"), "the text has no hole: '<fill>' is not in it.\nWrite it where"),
        (lambda: fill("a<fill>b", mark=""), "the mark of a hole may not be empty."),
        (lambda: fill("<fill>a<fill>", holes=[Hole()]), "the text has 2 marks '<fill>', but 1 holes are described."),
        (lambda: Hole(most=3, pattern="a"), "only one of these"),
        (lambda: Hole(least=3, most=2), "a hole of 3 to 2 characters holds nothing."),
        (lambda: Hole(most=0), "holds nothing"),
        (lambda: fill("<fill>", holes=[Hole(pattern="(")]), "is no regular expression"),
        (lambda: fill("<fill>", holes=[Hole(choices=())]), "choices need a list"),
        (lambda: free_text(least=3, most=2), "no text has 3 characters or more and at most 2."),
        (lambda: tool_call([]), "a tool call needs a function to call: got none."),
        (
            lambda: tool_call([{"name": "a.b"}]),
            "the function 'a.b' cannot be called: a name is letters, digits, _ and -.",
        ),
        (lambda: tool_call(["f"]), "a function is an object with a name and parameters, got 'f'."),
        (lambda: tool_call([{"function": 3}]), "a function is an object"),
        (lambda: tool_call([{"parameters": {}}]), "the function None cannot be called"),
        (
            lambda: tool_call([{"name": "f", "parameters": {"properties": {"a-b": {}}}}]),
            "the parameter 'a-b' cannot be written in a call",
        ),
        (
            lambda: tool_call([{"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}]),
            "schema at #/properties/a: the keyword 'not' is not supported",
        ),
        (lambda: tool_call([{"name": "f", "parameters": {"type": "string"}}]), "nothing satisfies the parameters of f"),
    ],
)
def test_bad_input_is_explained(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make()
    assert message in str(raised.value) and len(str(raised.value).split("\n")) <= 3


def test_calls_are_written_as_the_template_writes_them() -> None:
    language = only(tool_call([WEATHER]))
    assert language.controls == CONTROLS and language.transitions.shape[1] == 256 + len(CONTROLS)
    text = (
        f"{TOOL_CALL}call:get-weather{{days:[1,14],Location:{QUOTE}Köln, \"am\" {{Rhein}}\n{QUOTE},"
        f"place:{{lat:-1.5e3,name:{QUOTE}{QUOTE}}},unit:{QUOTE}°C{QUOTE}}}{END_TOOL_CALL}"
    )  # fmt: skip
    assert language.accepts(text)
    arguments = {
        "Location": 'Köln, "am" {Rhein}\n',
        "days": [1, 14],
        "place": {"lat": -1500.0, "name": ""},
        "unit": "°C",
    }
    assert parsed(text) == {"name": "get-weather", "arguments": arguments}
    for wrong in (
        text.replace("14", "15"),
        text.replace("°C", "°K"),
        text.replace("get-weather", "get"),
        text.replace("days:[1,14],", "") + " ",
        text.replace(":[1", ": [1"),
        text.replace("Location", "location"),
        text.replace("Rhein", "\x00"),
    ):
        assert not language.accepts(wrong)


def test_the_quote_spelled_in_bytes_does_not_end_a_string() -> None:
    language = only(
        tool_call([{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}, "type": "object"}}])
    )
    quote = 256 + CONTROLS.index(QUOTE)
    state = language.walk(f"{TOOL_CALL}call:f{{a:")
    inside = int(language.transitions[state, quote])
    for text in ('<|"|', '<|"', '<|"<|"|x', "<<||>"):
        assert language.walk(text.encode(), inside) >= 0
    assert language.walk(QUOTE.encode(), inside) < 0 and language.walk(b'<|<|"|>', inside) < 0
    assert language.transitions[state, ord("<")] < 0


def test_one_of_several_functions_is_called() -> None:
    functions = [
        {"name": "now"},
        {"name": "now_in", "parameters": {"properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"]}},
    ]
    language = only(tool_call(functions))
    assert language.accepts(f"{TOOL_CALL}call:now{{}}{END_TOOL_CALL}")
    assert language.accepts(f"{TOOL_CALL}call:now_in{{zone:{QUOTE}CET{QUOTE}}}{END_TOOL_CALL}")
    assert not language.accepts(f"{TOOL_CALL}call:now_in{{}}{END_TOOL_CALL}")
    assert not language.accepts(f"{TOOL_CALL}call:now{{zone:{QUOTE}CET{QUOTE}}}{END_TOOL_CALL}")


def test_whatever_is_called_can_be_parsed_and_obeys_the_parameters() -> None:
    random, calls = Random(16), 0
    functions = [WEATHER["function"], {"name": "anything", "parameters": {"type": "object"}}]
    while len(functions) < 60:
        properties = {name: random_schema(random, 2) for name in random.sample(["a", "Bc", "d_1", "é", "z"], 3)}
        required = random.sample(sorted(properties), random.randint(0, 2))
        functions.append(
            {
                "name": f"f{len(functions)}",
                "parameters": {"type": "object", "properties": properties, "required": required},
            }
        )
    for function in functions:
        try:
            sampler = Sampler.of(only(tool_call([function])))
        except ConfigError as error:
            assert "nothing satisfies" in str(error) or "cannot be written" in str(error)
            continue
        schema = function["parameters"]
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for _ in range(12):
            call = parsed(sampler.draw(random).decode())
            assert call["name"] == function["name"] and json.dumps(call["arguments"])
            check.validate(call["arguments"])
            calls += 1
    assert calls > 300
