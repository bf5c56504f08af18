"""Python clients × what people do with them: chat, streams, tools, structured output, errors."""

import json
from collections.abc import Callable
from typing import Any

import inceptionai
import openai
import pytest

from tests.server.scripted import CALL, WEATHER, Scripted
from tests.server.serving import Running, said

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
CLIENTS: dict[str, Callable[[str], Any]] = {
    "openai": lambda url: openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0),
    "inceptionai": lambda url: inceptionai.Inception(base_url=url, api_key="any", max_retries=0),
}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, server: Running) -> Any:
    return CLIENTS[request.param](server.url)


def test_chat_and_stream(client: Any, model: Scripted) -> None:
    model.script = "Hello there, dear reader."
    asked: Any = {"model": "x", "messages": said("hi"), "max_tokens": 100}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == model.script and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(model.script)
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body={"diffusion": {"drafts": "tokens"}}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == model.script
    assert sum(bool(chunk.choices[0].finish_reason) for chunk in chunks) == 1


def test_tools(client: Any, model: Scripted) -> None:
    model.script = CALL
    made = client.chat.completions.create(model="x", messages=said("hi"), tools=[WEATHER])
    [call] = made.choices[0].message.tool_calls
    assert made.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 3}


def test_structured_output(client: Any, model: Scripted) -> None:
    made = client.chat.completions.create(model="x", messages=said("hi"), response_format=FORM, max_tokens=40)
    assert json.loads(made.choices[0].message.content)["a"] in (1, 2)


def test_errors(client: Any) -> None:
    with pytest.raises((openai.BadRequestError, inceptionai.BadRequestError), match="temperature"):
        client.chat.completions.create(model="x", messages=said("hi"), temperature=-1)


def test_mercurys_effect(server: Running, model: Scripted) -> None:
    """As Inception's page shows it: every content replaces the one before."""
    model.script = "Twenty-five letters long."
    client = CLIENTS["inceptionai"](server.url)
    asked: Any = {"model": "x", "messages": said("hi"), "max_tokens": 100, "stream": True, "diffusing": True}
    contents = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked)]
    shown = [content for content in contents if content]
    assert shown[-1] == model.script and len(shown) > 4
    with pytest.raises(inceptionai.BadRequestError, match="diffusing cannot show tool calls"):
        client.chat.completions.create(**asked, tools=[WEATHER])
