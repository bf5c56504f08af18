"""Python clients × what people do with them: chat, streams, tools, structured output, errors."""

import json
from collections.abc import Callable
from typing import Any

import anthropic
import inceptionai
import ollama
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
    model.script = "Sunny."
    answered = [*said("hi"), made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    again: Any = {"model": "x", "messages": answered, "tools": [WEATHER]}
    assert client.chat.completions.create(**again).choices[0].message.content == "Sunny."
    chunks = client.chat.completions.create(**again, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Sunny."


def test_structured_output(client: Any, model: Scripted) -> None:
    made = client.chat.completions.create(model="x", messages=said("hi"), response_format=FORM, max_tokens=40)
    assert json.loads(made.choices[0].message.content)["a"] in (1, 2)


def test_errors(client: Any) -> None:
    with pytest.raises((openai.BadRequestError, inceptionai.BadRequestError), match="temperature"):
        client.chat.completions.create(model="x", messages=said("hi"), temperature=-1)


def test_anthropic_and_ollama_get_structure_and_errors(server: Running) -> None:
    asked: Any = {"model": "x", "messages": said("hi")}
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
        made = client.messages.create(**asked, max_tokens=40, output_config=form)
        assert made.content[0].type == "text" and json.loads(made.content[0].text)["a"] in (1, 2)
        with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
            client.messages.create(**asked, max_tokens=40, stop_sequences=[""])
    with ollama.Client(host=server.url) as client:
        told = client.chat(**asked, format=SCHEMA, options={"num_predict": 40})
        assert json.loads(told.message.content or "")["a"] in (1, 2)
        with pytest.raises(ollama.ResponseError, match="temperature") as caught:
            client.chat(**asked, options={"temperature": -1})
        assert caught.value.status_code == 400


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
