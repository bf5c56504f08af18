"""Functions that are `strict`: a call whose arguments the schema does not take is written anew."""

import json
from typing import Any

import pytest

from mlx_diffgemma.server.strictly import Strict
from tests.server.scripted import CALL, WEATHER, Scripted, call
from tests.server.serving import Running, content, said

LOOSE: Any = WEATHER | {"function": WEATHER["function"] | {"strict": False}}
NESTED = {
    "type": "object",
    "properties": {
        "zone": {
            "type": "object",
            "properties": {"b": {"type": "boolean"}, "a": {"type": "string"}},
            "required": ["b"],
        },
        "Share": {"type": "number"},
        "list": {"type": "array", "items": {"type": ["string", "null"]}},
        "kind": {"enum": ["one", "two", 3]},
    },
    "required": ["zone", "list"],
    "additionalProperties": False,
}


def asked(**more: Any) -> dict[str, Any]:
    return {"messages": said("hi"), "tools": [WEATHER], "max_tokens": 200, **more}


def arguments(message: dict[str, Any]) -> list[Any]:
    return [json.loads(one["function"]["arguments"]) for one in message["tool_calls"]]


BROKEN = ("I look." + call("weather", city="Rome", days="many"), "I look." + CALL.replace(",days:3}", ""))


@pytest.mark.parametrize("script", BROKEN, ids=["the wrong type", "no end"])
@pytest.mark.parametrize("seed", [None, 4])
def test_a_call_that_does_not_obey_is_written_anew(
    script: str, seed: int | None, server: Running, model: Scripted
) -> None:
    model.script = script
    body = asked(seed=seed)
    whole = server.post(body).json()
    told = whole["choices"][0]
    [found] = arguments(told["message"])
    assert isinstance(found["city"], str) and type(found["days"]) is int
    assert told["message"]["content"] == "I look." and told["finish_reason"] == "tool_calls"
    assert whole["diffusion"]["rewritten_tool_calls"] == 1
    chunks = server.chunks(body)
    calls = [c for chunk in chunks for choice in chunk["choices"] for c in choice["delta"].get("tool_calls", ())]
    assert content(chunks) == "I look." and len(calls) == 1
    assert seed is None or json.loads(calls[0]["function"]["arguments"]) == found


def test_others_are_left_as_they_are(server: Running, model: Scripted) -> None:
    model.script = BROKEN[0]
    whole = server.post(asked(tools=[LOOSE])).json()
    assert arguments(whole["choices"][0]["message"]) == [{"city": "Rome", "days": "many"}]
    assert "rewritten_tool_calls" not in whole["diffusion"]
    model.script = call("weather", city="Rome", days="3")  # its type is mended, as ever
    whole = server.post(asked()).json()
    assert arguments(whole["choices"][0]["message"]) == [{"city": "Rome", "days": 3}]
    assert "rewritten_tool_calls" not in whole["diffusion"]


def test_calls_beside_it_stay(server: Running, model: Scripted) -> None:
    model.script = CALL + call("weather", city="Oslo", days="many") + CALL.replace("Rome", "Bern")
    whole = server.post(asked(max_tokens=400)).json()
    one, two, three = arguments(whole["choices"][0]["message"])
    assert (one["city"], three["city"]) == ("Rome", "Bern") and type(two["days"]) is int
    assert whole["diffusion"]["rewritten_tool_calls"] == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi", "tools": [{"type": "function", **WEATHER["function"]}]}),
        (
            "/v1/messages",
            {
                "messages": said("hi"),
                "max_tokens": 200,
                "tools": [{"name": "weather", "strict": True, "input_schema": WEATHER["function"]["parameters"]}],
            },
        ),
    ],
)
def test_in_other_protocols_too(path: str, body: dict[str, Any], server: Running, model: Scripted) -> None:
    model.script = BROKEN[0]
    assert server.post(body, path).json()["diffusion"]["rewritten_tool_calls"] == 1


def test_where_none_that_obeys_has_room_it_stays(server: Running, model: Scripted) -> None:
    model.script = call("weather")
    length = 1 + len("call:weather{}") + 1
    for most, count in ((length, 0), (200, 1)):
        whole = server.post(asked(max_tokens=most)).json()
        [found] = arguments(whole["choices"][0]["message"])
        assert bool(found) is bool(count) and whole["diffusion"].get("rewritten_tool_calls", 0) == count
        assert whole["usage"]["completion_tokens"] <= most


def test_a_schema_that_no_language_is_made_of_is_told(server: Running, model: Scripted) -> None:
    model.script = "Fine."
    odd = {"type": "object", "properties": {"a b": {"type": "string"}}, "required": ["a b"]}
    tool = {"type": "function", "function": {"name": "odd", "strict": True, "parameters": odd}}
    assert server.post(asked(tools=[tool])).json()["diffusion"]["ignored"] == ["tools.odd.strict"]


@pytest.mark.parametrize(
    ("inside", "obeys"),
    [
        ("{Share:0.5,list:[],zone:{b:true}}", True),
        ('{zone:{a:<|"|>x, y:{}<|"|>,b:false},list:[<|"|>ü<|"|>,null],kind:<|"|>two<|"|>}', True),
        ('{list:[],zone:{b:<|"|>true<|"|>},Share:<|"|>-3<|"|>}', True),
        ("{kind:3,list:[],zone:{b:true}}", True),
        ("{kind:4,list:[],zone:{b:true}}", False),
        ("{list:[3],zone:{b:true}}", False),
        ('{list:[],zone:{a:<|"|>x<|"|>}}', False),
        ("{list:[],zone:{b:true},more:1}", False),
        ("{list:[],zone:{b:true}", False),
    ],
)
def test_what_obeys(inside: str, obeys: bool) -> None:
    tool = {"function": {"name": "f", "strict": True, "parameters": NESTED}}
    assert Strict([tool]).obeys("f", "call:f" + inside) is obeys
