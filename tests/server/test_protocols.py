"""One conversation in every protocol, by its own client: the same text, calls, thoughts and usage, streamed or not."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import httpx
import inceptionai
import ollama
import openai
import pytest

from tests.server.scripted import CALL, Scripted
from tests.server.serving import Running

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
FUNCTION = {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
SYSTEM, ASKED, THOUGHT, SAID, RESULT = "Be brief.", "The weather in Rome?", "hm", "I look.", "sun"
SCRIPT = f"<|channel>thought\n{THOUGHT}<channel|>{SAID}" + CALL + CALL.replace("Rome", "Oslo")
TOKENS = 300


class Clients:
    """Of one server; closed with it."""

    def __init__(self, server: Running, stack: ExitStack):
        opened = stack.enter_context
        self.openai = opened(openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0))
        self.anthropic = opened(anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0))
        self.ollama = opened(ollama.Client(host=server.url))
        self.inception = opened(inceptionai.Inception(base_url=server.url, api_key="any", max_retries=0))


@pytest.fixture(scope="module")
def clients(server: Running) -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(server, stack)


class Told(dict[str, Any]):
    """What a client understood: text, thinking, calls, reason, and tokens in and out."""


def told(text: str, thinking: str, calls: list[tuple[str, Any]], reason: str, tokens: tuple[int, int]) -> Told:
    return Told(text=text, thinking=thinking, calls=calls, reason=reason, tokens=tokens)


def first(prompt: str = ASKED) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


# Each asks with the client of its protocol: a system message, a question, a tool; or the same with a call answered.


def by_openai(clients: Clients, *, stream: bool, answered: bool, most: int) -> Told:
    messages: Any = [{"role": "system", "content": SYSTEM}, *first()]
    if answered:
        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Rome","days":3}'},
        }
        messages += [
            {"role": "assistant", "content": SAID, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": RESULT},
        ]
    asked: Any = {"model": "x", "messages": messages, "tools": [TOOL], "max_tokens": most, "seed": 1}
    if stream:
        with clients.openai.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
            try:
                found: Any = events.get_final_completion()
            except openai.LengthFinishReasonError as cut:  # it wants calls to be whole
                found = cut.completion
    else:
        found = clients.openai.chat.completions.create(**asked)
    [choice] = found.choices
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]
    thinking = getattr(choice.message, "reasoning_content", None) or ""
    reason = {"tool_calls": "call", "stop": "end", "length": "cut"}[choice.finish_reason]
    tokens = (found.usage.prompt_tokens, found.usage.completion_tokens)
    return told(choice.message.content or "", thinking, calls, reason, tokens)


def by_responses(clients: Clients, *, stream: bool, answered: bool, most: int) -> Told:
    tool: Any = {"type": "function", **FUNCTION}
    items: Any = first()
    if answered:
        items += [
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAID}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome","days":3}'},
            {"type": "function_call_output", "call_id": "c1", "output": RESULT},
        ]
    asked: Any = {"model": "x", "instructions": SYSTEM, "input": items, "tools": [tool], "max_output_tokens": most}
    asked["extra_body"] = {"seed": 1}
    if stream:
        with clients.openai.responses.stream(**asked) as events:
            seen: list[Any] = list(events)
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        found: Any = seen[-1].response
    else:
        found = clients.openai.responses.create(**asked)
    calls = [(item.name, json.loads(item.arguments)) for item in found.output if item.type == "function_call"]
    thoughts = [part.text for item in found.output if item.type == "reasoning" for part in item.content]
    reason = "cut" if found.status == "incomplete" else "call" if calls else "end"
    tokens = (found.usage.input_tokens, found.usage.output_tokens)
    return told(found.output_text, "".join(thoughts), calls, reason, tokens)


def by_anthropic(clients: Clients, *, stream: bool, answered: bool, most: int) -> Told:
    tool = {"name": "weather", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
    messages: Any = first()
    if answered:
        call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome", "days": 3}}
        answer = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": RESULT}]}
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": SAID}, call]},
            {"role": "user", "content": [answer]},
        ]
    asked: Any = {"model": "x", "system": SYSTEM, "messages": messages, "tools": [tool], "max_tokens": most}
    if stream:
        with clients.anthropic.messages.stream(**asked) as events:
            found: Any = events.get_final_message()
    else:
        found = clients.anthropic.messages.create(**asked)
    counted = clients.anthropic.messages.count_tokens(
        **{key: asked[key] for key in ("model", "system", "messages", "tools")}
    )
    text = "".join(block.text for block in found.content if block.type == "text")
    thinking = "".join(block.thinking for block in found.content if block.type == "thinking")
    calls = [(block.name, block.input) for block in found.content if block.type == "tool_use"]
    reason = {"tool_use": "call", "end_turn": "end", "max_tokens": "cut"}[found.stop_reason]
    tokens = found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == tokens
    return told(text, thinking, calls, reason, (tokens, found.usage.output_tokens))


def by_ollama(clients: Clients, *, stream: bool, answered: bool, most: int) -> Told:
    messages: Any = [{"role": "system", "content": SYSTEM}, *first()]
    if answered:
        call = {"function": {"name": "weather", "arguments": {"city": "Rome", "days": 3}}}
        messages += [
            {"role": "assistant", "content": SAID, "tool_calls": [call]},
            {"role": "tool", "tool_name": "weather", "content": RESULT},
        ]
    tools: Any = [TOOL]
    options = {"num_predict": most, "seed": 1, "num_ctx": 4096}
    found: Any = clients.ollama.chat(model="x", messages=messages, tools=tools, options=options, stream=stream)
    parts = list(found) if stream else [found]
    calls = [(c.function.name, dict(c.function.arguments)) for part in parts for c in part.message.tool_calls or ()]
    text, thinking = ("".join(getattr(part.message, name) or "" for part in parts) for name in ("content", "thinking"))
    reason = "cut" if parts[-1].done_reason == "length" else "call" if calls else "end"
    return told(text, thinking, calls, reason, (parts[-1].prompt_eval_count, parts[-1].eval_count))


EVERY = [by_openai, by_responses, by_anthropic, by_ollama]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("script", "answered", "most", "expected"),
    [
        ("Sunny.", False, TOKENS, ("Sunny.", "", [], "end")),
        (SCRIPT, False, TOKENS, (SAID, THOUGHT, ["Rome", "Oslo"], "call")),
        ('It is <|"|>sunny<|"|>.', True, TOKENS, ("It is sunny.", "", [], "end")),
        ("Now. " + CALL, False, 20, ("Now.", "", [], "cut")),
        (f"A<|channel>thought\n{THOUGHT}" + CALL + "<channel|>B", True, TOKENS, ("AB", THOUGHT, ["Rome"], "call")),
    ],
    ids=["text", "thought and two calls", "after a call", "a cut call", "a call inside a thought"],
)
def test_every_protocol_says_the_same(
    script: str, answered: bool, most: int, expected: Any, stream: bool, clients: Clients, model: Scripted
) -> None:
    model.script = script
    text, thinking, cities, reason = expected
    calls = [("weather", {"city": city, "days": 3}) for city in cities]
    every = [ask(clients, stream=stream, answered=answered, most=most) for ask in EVERY]
    for ask, found in zip(EVERY, every, strict=True):
        assert found["text"].strip() == text, ask.__name__
        assert (found["thinking"], found["calls"], found["reason"]) == (thinking, calls, reason), ask.__name__
    assert len({found["tokens"] for found in every}) == 1, [found["tokens"] for found in every]


# --------------------------------------------------------------------------------------------------------- responses


def test_a_response_is_gone_on_from(clients: Clients, model: Scripted) -> None:
    model.script = SCRIPT
    tool: Any = {"type": "function", **FUNCTION}
    one = clients.openai.responses.create(model="x", input=ASKED, tools=[tool])
    calls = [item for item in one.output if item.type == "function_call"]
    model.script = "Sunny."
    answers: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT} for call in calls]
    two = clients.openai.responses.create(model="x", previous_response_id=one.id, input=answers, tools=[tool])
    spelled: Any = [
        *first(),
        {"type": "message", "role": "assistant", "content": SAID},
        *({"type": "function_call", "call_id": c.call_id, "name": c.name, "arguments": c.arguments} for c in calls),
        *answers,
    ]
    whole = clients.openai.responses.create(model="x", input=spelled, tools=[tool])
    assert two.output_text == "Sunny." and two.usage and whole.usage
    assert two.usage.input_tokens == whole.usage.input_tokens
    unkept = clients.openai.responses.create(model="x", input="hi", store=False)
    for unknown in ("resp_0", unkept.id):
        with pytest.raises(openai.NotFoundError, match="There is no answer"):
            clients.openai.responses.create(model="x", previous_response_id=unknown, input="hi")


def test_tools_of_a_namespace_keep_their_names(server: Running, model: Scripted) -> None:
    """As Codex sends them, with tools that run elsewhere beside."""
    model.script = CALL.replace("weather", "mcp__sky__weather")
    space = {"type": "namespace", "name": "mcp__sky__", "description": "", "tools": [{"type": "function", **FUNCTION}]}
    body = {"model": "x", "input": ASKED, "tools": [space, {"type": "web_search"}], "store": False}
    body |= {"include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "parallel_tool_calls": False}
    made = server.post(body, "/v1/responses").json()
    [call] = made["output"]
    assert (call["namespace"], call["name"], json.loads(call["arguments"])["days"]) == ("mcp__sky__", "weather", 3)
    assert made["diffusion"]["ignored"] == ["parallel_tool_calls", "tools.web_search"]
    twice = server.post({"input": "hi", "tools": [space, space]}, "/v1/responses")
    assert twice.status_code == 400 and "again" in twice.json()["error"]["message"]


def test_a_response_obeys_a_schema(server: Running, model: Scripted) -> None:
    model.script = "whatever"
    form = {"type": "json_schema", "name": "n", "schema": {"enum": ["yes", "no"]}, "strict": True}
    made = server.post({"input": "hi", "text": {"format": form}}, "/v1/responses").json()
    assert json.loads(made["output"][0]["content"][0]["text"]) in ("yes", "no")
    config = {"format": {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}}
    body = {"messages": first(), "max_tokens": 50, "output_config": config}
    assert json.loads(server.post(body, "/v1/messages").json()["content"][0]["text"]) in ("yes", "no")
    body = {"messages": first(), "format": {"enum": ["yes", "no"]}, "stream": False}
    assert json.loads(server.post(body, "/api/chat").json()["message"]["content"]) in ("yes", "no")


# ------------------------------------------------------------------------------------------------ Anthropic and Ollama


def test_a_stop_sequence_is_named(clients: Clients, model: Scripted) -> None:
    model.script = "one two three"
    made = clients.anthropic.messages.create(
        model="x", max_tokens=50, messages=first(), stop_sequences=["four", " three"]
    )  # type: ignore[arg-type]
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", " three")
    assert made.content[0].type == "text" and made.content[0].text == "one two"


def test_anthropic_s_stream_is_told_in_order(server: Running, model: Scripted) -> None:
    model.script = SCRIPT
    body = {"messages": first(), "max_tokens": TOKENS, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/messages", json=body) as response:
        lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    begun = lines[0]["message"]
    assert (begun["type"], begun["content"], begun["stop_reason"]) == ("message", [], None)
    kinds = [line["type"].removeprefix("content_block_") for line in lines]
    inside = "".join({"start": "(", "delta": "-", "stop": ")"}.get(kind, "|") for kind in kinds)
    assert inside.strip("|").replace("-", "") == "()" * 4 and kinds[-2:] == ["message_delta", "message_stop"]
    assert [line["index"] for line in lines if line["type"] == "content_block_start"] == [0, 1, 2, 3]


@pytest.mark.parametrize("extra", [{"raw": True}, {"system": SYSTEM}, {"suffix": " three"}], ids=["raw", "chat", "gap"])
def test_ollama_s_generate(extra: dict[str, Any], clients: Clients, model: Scripted) -> None:
    model.script = "two"
    found = clients.ollama.generate(model="x", prompt="one ", options={"num_predict": 16}, **extra)
    assert found.done and found.done_reason in ("stop", "length") and isinstance(found.response, str)


def test_ollama_s_lists(server: Running, clients: Clients) -> None:
    assert [model.model for model in clients.ollama.list().models] == ["small"]
    shown = clients.ollama.show("small")
    assert shown.capabilities == ["completion", "insert", "tools", "thinking"]
    assert shown.modelinfo["diffusion_gemma.context_length"] == server.scheduler.served("small").context == 16_384  # type: ignore[index]
    assert httpx.get(f"{server.url}/api/version").json()["version"]


# ------------------------------------------------------------------------------------------------ gaps and decisions


def test_inception_s_clients(clients: Clients, model: Scripted) -> None:
    model.script = "two"
    whole = clients.inception.fim.completions.create(model="x", prompt="one ", suffix=" three", max_tokens=16)
    streamed = clients.inception.fim.completions.create(
        model="x", prompt="one ", suffix=" three", max_tokens=16, stream=True
    )
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.choices[0].text is not None
    assert "".join(choice.text or "" for chunk in streamed for choice in chunk.choices) is not None
    questions: Any = {
        "urgent": {"type": "noul", "instructions": "Is it urgent?", "criteria": {"true": "It burns.", "false": None}},
        "team": {"type": "choice", "criteria": {"red": "fires", "blue": {"for": "water"}}},
        "one": {"type": "choice", "criteria": {"only": None}},
        "how": {"type": "score", "instructions": "How bad?", "criteria": ["not", "somewhat", "very"]},
    }
    found = clients.inception.decisions.create(model="x", state={"said": "It burns."}, questions=questions)
    urgent, team, one, how = (found.answers[name] for name in questions)
    assert urgent.type == "noul" and 0 <= urgent.noul <= 1
    assert team.type == "choice" and sum(team.probabilities.values()) == pytest.approx(1)
    assert one.type == "choice" and one.confidence == 1
    assert how.type == "score" and 1 <= how.score <= 3 and how.legend["2"] == "somewhat"
    assert found.usage.input_tokens > 0


# ------------------------------------------------------------------------------------------------------------ errors

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {}, "input"),
    ("/v1/responses", {"input": [{"type": "computer_call"}]}, "computer_call"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
    ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, "schema"),
    ("/v1/responses", {"input": "a", "tool_choice": {"type": "function", "name": "none"}}, "tools"),
    ("/v1/responses", {"input": "a", "conversation": "conv_1"}, "previous_response_id in its place"),
    ("/v1/responses", {"input": "a", "prompt": {"id": "p"}}, "input in its place"),
    ("/v1/responses", {"input": "a", "background": True}, "background"),
    ("/v1/messages", {"messages": first()}, "max_tokens"),
    ("/v1/messages", {"messages": [], "max_tokens": 5}, "messages"),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "document"}]}], "max_tokens": 5}, "document"),
    ("/v1/messages", {"messages": [{"role": "tool", "content": "a"}], "max_tokens": 5}, "role"),
    ("/v1/messages/count_tokens", {"messages": "a"}, "messages"),
    ("/api/chat", {"messages": first(), "format": "yaml"}, "format"),
    ("/api/chat", {"messages": [{"role": "user", "tool_calls": 3}]}, "tool_calls"),
    ("/api/generate", {"prompt": "a", "raw": True, "system": "b"}, "system"),
    ("/v1/fim/completions", {"suffix": "a"}, "prompt"),
    ("/v1/decisions", {"state": "a", "questions": {}}, "question"),
    ("/v1/decisions", {"state": "a", "questions": {"q": {"type": "choice", "criteria": {}}}}, "criteria"),
    ("/v1/decisions", {"state": "a", "questions": {"q": {"type": "maybe"}}}, "type"),
]


@pytest.mark.parametrize(("path", "body", "word"), BAD)
def test_a_bad_request_is_refused_in_the_protocol_s_words(
    path: str, body: dict[str, Any], word: str, server: Running
) -> None:
    refused = server.post(body, path)
    told = refused.json()["error"]
    message = told if path.startswith("/api") else told["message"]
    assert refused.status_code == 400 and word in message and len(message.splitlines()) <= 3
    if path.startswith("/v1/messages"):
        assert refused.json()["type"] == "error" and told["type"] == "invalid_request_error"


def test_what_is_too_long_is_refused_everywhere(server: Running) -> None:
    text = "word " * 5000
    asked = [
        ("/v1/responses", {"input": text}),
        ("/v1/messages", {"messages": first(text), "max_tokens": 5}),
        ("/api/chat", {"messages": first(text)}),
        ("/v1/decisions", {"state": text, "questions": {"q": {"type": "noul", "instructions": "So?"}}}),
    ]
    for path, body in asked:
        refused = server.post(body, path)
        assert refused.status_code == 400 and "tokens" in refused.text, (path, refused.text)
