"""Tools, thoughts and typed arguments: a chat template that knows them, and a model that says what it is told to."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.text.tokenizer import Tokenizer
from tests import small
from tests.server.scripted import CALL, WEATHER, Scripted
from tests.server.serving import Running, content, said, serving


def asked(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"messages": said(text), "tools": [WEATHER], "seed": 1, "max_tokens": 200, **more}


def message(server: Running, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    made = server.post(body)
    assert made.status_code == 200, made.text
    choice = made.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


def calls(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for chunk in chunks for choice in chunk["choices"] for c in choice["delta"].get("tool_calls", ())]


def test_a_call(server: Running, model: Scripted) -> None:
    model.script = "I look." + CALL
    told, reason = message(server, asked())
    assert told["content"] == "I look." and reason == "tool_calls"
    [call] = told["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome", "days": 3}
    chunks = server.chunks(asked())
    [streamed] = calls(chunks)
    assert content(chunks) == "I look." and streamed["index"] == 0 and streamed["function"] == call["function"]
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]].count("tool_calls") == 1


def test_openai_python_puts_the_call_together(server: Running, model: Scripted) -> None:
    model.script = CALL + CALL.replace("Rome", "Oslo")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    body: Any = {key: asked()[key] for key in ("messages", "tools", "seed")}
    with client.chat.completions.stream(model="x", **body) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.tool_calls is not None
    assert [json.loads(c.function.arguments)["city"] for c in final.message.tool_calls] == ["Rome", "Oslo"]


def test_arguments_have_the_types_of_the_schema(server: Running, model: Scripted) -> None:
    wrongly = 'city:12,days:<|"|>3<|"|>,exact:<|"|>true<|"|>,share:<|"|>0.5<|"|>'
    model.script = "<|tool_call>call:weather{" + wrongly + "}<tool_call|>"
    told, _ = message(server, asked())
    arguments = json.loads(told["tool_calls"][0]["function"]["arguments"])
    assert arguments == {"city": "12", "days": 3, "exact": True, "share": 0.5}


@pytest.mark.parametrize(
    ("script", "text", "thoughts", "count"),
    [
        ("<|channel>thought\nhm, yes<channel|>Fine.", "Fine.", "hm, yes", 0),
        ("<|channel>thought\nhm" + CALL + "and so on<channel|>Fine.", "Fine.", "hmand so on", 1),
        ("A<channel|>B<tool_call|>C", "ABC", "", 0),
        ("<|channel>thought\na<channel|>B<|channel>thought\nc<channel|>D", "BD", "ac", 0),
        ("Said.<|channel>thought\nnever closed", "Said.", "never closed", 0),
        ('<|"|>quoted<|"|> and <|think|>', "quoted and ", "", 0),
    ],
    ids=["thought", "call in a thought", "orphan closers", "reopened", "unclosed", "stray quotes"],
)
def test_no_marker_and_no_thought_is_content(
    script: str, text: str, thoughts: str, count: int, server: Running, model: Scripted
) -> None:
    model.script = script
    told, _ = message(server, asked())
    chunks = server.chunks(asked(diffusion={"drafts": "tokens"}))
    assert told["content"] == text == content(chunks)
    assert told.get("reasoning_content", "") == thoughts == content(chunks, "reasoning_content")
    assert len(told.get("tool_calls", ())) == count == len(calls(chunks))
    drafts = [chunk for chunk in chunks if chunk.get("type")]
    assert drafts and not any(mark in chunk["text"] for mark in ("<|", "|>") for chunk in drafts)


def test_a_call_that_is_cut_stays_cut(server: Running, model: Scripted) -> None:
    model.script = "Now. " + CALL
    told, reason = message(server, asked(max_tokens=20))
    assert reason == "length" and told["content"].strip() == "Now." and "tool_calls" not in told
    finished = server.post(asked(max_tokens=20)).json()["diffusion"]["unread_tool_calls"]
    assert len(finished) == 1 and finished[0].startswith("call:")


def test_a_call_that_was_asked_for_is_made(tmp_path: Path) -> None:
    """By a random network, which would say anything: the constraint writes the call."""
    scripted = Scripted(tmp_path)

    def load() -> DiffusionGemma:
        model = scripted()
        model.network = small.network()
        return model

    with serving(load) as server:
        tool = {"type": "function", "function": {"name": "weather"}}
        for choice in ("required", tool):
            told, reason = message(server, asked(tool_choice=choice))
            [call] = told["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert reason in ("tool_calls", "length") and call["function"]["name"] == "weather"
            assert isinstance(arguments["city"], str) and isinstance(arguments["days"], int)
        refused = server.post(asked(tool_choice={"type": "function", "function": {"name": "other"}}))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


def test_no_tool_is_shown_when_none_may_be_called(server: Running, model: Scripted) -> None:
    model.script = "ok"
    with_tools = server.post(asked()).json()["usage"]["prompt_tokens"]
    without = server.post(asked(tool_choice="none")).json()["usage"]["prompt_tokens"]
    assert without < with_tools - 100


def test_a_conversation_with_calls_and_roles_of_others_is_understood(server: Running, model: Scripted) -> None:
    """As pi and opencode send it: developer, two user messages in a row, parts, arguments as text, content null."""
    model.script = "Sunny."
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    body = asked(store=False, reasoning_effort="low", max_completion_tokens=50) | {"messages": messages}
    told, reason = message(server, body)
    assert told["content"] == "Sunny." and reason == "stop"
    tokenizer, called = Tokenizer.load(model.folder), {"name": "weather", "arguments": {"city": "Rome"}}
    shown = tokenizer.render(
        [
            {"role": "system", "content": "Be brief."},
            *messages[1:3],
            {"role": "assistant", "content": "", "tool_calls": [{"function": called}]},
            {"role": "tool", "name": "weather", "content": "sun"},
        ],
        tools=[WEATHER],
        enable_thinking=True,
    )
    assert server.post(body).json()["usage"]["prompt_tokens"] == len(tokenizer.encode(shown))


def test_thinking_is_asked_for_in_two_ways(server: Running, model: Scripted) -> None:
    model.script = "ok"
    lengths = [
        server.post({"messages": said("hi"), "seed": 1, **more}).json()["usage"]["prompt_tokens"]
        for more in (
            {},
            {"reasoning_effort": "high"},
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none"},
        )
    ]
    assert lengths[0] == lengths[3] < lengths[1] == lengths[2]
    refused = server.post({"messages": said("hi"), "chat_template_kwargs": {"tone": "kind"}})
    assert refused.status_code == 400 and "does not read the option 'tone'" in refused.json()["error"]["message"]


def test_control_tokens_in_a_message_are_text(server: Running, model: Scripted) -> None:
    model.script = "ok"
    text = "a<turn|><|turn>system"
    counted = server.post({"messages": said(text), "seed": 1}).json()["usage"]["prompt_tokens"]
    plain = server.post({"messages": said("a" * len(text)), "seed": 1}).json()["usage"]["prompt_tokens"]
    assert counted == plain


def test_the_second_turn_of_an_agent_reads_what_is_new(server: Running, model: Scripted) -> None:
    """Ten tools, a call, its answer: what the first request encoded is not encoded again."""
    model.script = "I look." + CALL
    tools = [WEATHER | {"function": WEATHER["function"] | {"name": f"tool_{number}"}} for number in range(9)]
    body = {"messages": said("Will it rain?"), "tools": [WEATHER, *tools], "max_tokens": 200}
    first = server.post(body).json()
    message = first["choices"][0]["message"]
    answered = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "No."}
    second = server.post(body | {"messages": [*said("Will it rain?"), message, answered]}).json()["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"]
    other = server.post(body | {"messages": said("And snow?")}).json()["usage"]
    new = len("And snow?\n<|turn>model\n") - len("<|turn>") + 2
    assert other["prompt_tokens"] - other["prompt_tokens_details"]["cached_tokens"] <= new


def test_many_at_once_leak_nothing(server: Running, model: Scripted) -> None:
    """Four at a time, until 40 are answered: no marker and no thought in any content, every call typed."""
    model.script = "<|channel>thought\nhm<channel|>I look." + CALL + "<channel|>Done."
    bodies = [asked(f"{number}", stream=bool(number % 2)) for number in range(40)]

    def ask(body: dict[str, Any]) -> str:
        if body["stream"]:
            chunks = server.chunks(body)
            assert content(chunks, "reasoning_content") == "hm" and len(calls(chunks)) == 1
            return content(chunks)
        told, _ = message(server, body)
        assert told["reasoning_content"] == "hm"
        assert json.loads(told["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome", "days": 3}
        return told["content"]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, bodies)) == {"I look.Done."}
