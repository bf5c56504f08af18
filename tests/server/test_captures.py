"""What clients that are no Python packages sent, sent again: `python -m tests.clients.capture` writes these files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.serving import Running
from tests.server.stage import Stage, staged

CAPTURES = sorted((Path(__file__).parent / "captures").glob("*.json"))
MARKED = re.compile(r"<\|channel>.*?<channel\|>|<\|tool_call>.*?<tool_call\|>", re.DOTALL)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
AGENTS = {"codex", "opencode", "pi", "pi-anthropic", "pi-responses"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Stage]]:
    with staged(tmp_path_factory.mktemp("staged")) as pair:
        yield pair


def test_there_is_one_of_each_client() -> None:
    assert {path.stem for path in CAPTURES} == {"openai-node", "ai-sdk", "ai-sdk-responses"} | AGENTS


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_captured_requests_are_answered(path: Path, stage: tuple[Running, Stage]) -> None:
    server, script = stage
    last = ""  # the answer that the next request may go on from
    for heard in json.loads(path.read_text()):
        body = heard.get("body")
        if body and "previous_response_id" in body:
            body["previous_response_id"] = last
        with server.client() as client, script.calling(called(body)):
            answer = client.request(heard["method"], heard["path"], json=body, headers=heard["headers"])
            assert answer.status_code == heard["status"], answer.text
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            elif body is not None:
                text, calls, last = READ[heard["path"]](answer, streams=bool(body.get("stream")))
                line = script.line(body)
                assert calls == line.count("<|tool_call>")
                form = body.get("response_format") or body.get("text", {}).get("format")
                assert text == MARKED.sub("", line) or (form and json.loads(text)["a"] in ("one", "two"))


def called(body: Any) -> dict[str, dict[str, Any]]:
    """Which tools the stage calls: the first that is offered, without arguments."""
    tools = [tool for tool in (body or {}).get("tools") or () if tool.get("type", "function") == "function"]
    return {tool.get("function", tool)["name"]: {} for tool in tools[:1]}


def read_chat(answer: httpx.Response, *, streams: bool) -> tuple[str, int, str]:
    """→ the text, how many calls, and the answer's id. Chunks come in order: role, text, calls, why it ended, usage."""
    if not streams:
        whole = ChatCompletion.model_validate(answer.json())
        message = whole.choices[0].message
        assert whole.usage and (whole.choices[0].finish_reason == "tool_calls") == bool(message.tool_calls)
        return message.content or "", len(message.tool_calls or ()), whole.id
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line) for line in lines[:-1]]
    told, text, calls = "", "", 0
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            told += "r" * bool(delta.role) + "t" * bool(delta.content) + "c" * bool(delta.tool_calls)
            told += "." * bool(choice.finish_reason)
            text, calls = text + (delta.content or ""), calls + len(delta.tool_calls or ())
        told += "u" * bool(chunk.usage)
    assert re.fullmatch(r"rt*c?\.u?", told), told
    return text, calls, chunks[0].id


def read_response(answer: httpx.Response, *, streams: bool) -> tuple[str, int, str]:
    """→ the text, how many calls, and the answer's id. Events are numbered, and items are opened and closed."""
    if not streams:
        whole = Response.model_validate(answer.json())
    else:
        events = [EVENT.validate_json(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
        shape = " ".join(kind for kind in kinds[2:-1] if not kind.endswith("delta"))
        part = r"content_part\.added \w+\.done content_part\.done"
        call = r"function_call_arguments\.done"
        assert re.fullmatch(rf"(output_item\.added ({part}|{call}) output_item\.done ?)+", shape), shape
        whole = events[-1].response
    return whole.output_text, sum(item.type == "function_call" for item in whole.output), whole.id


def read_message(answer: httpx.Response, *, streams: bool) -> tuple[str, int, str]:
    """→ the text, how many calls, and the answer's id. Blocks are opened and closed one after the other."""
    assert streams
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [MESSAGE_EVENT.validate_json(line) for line in lines]
    marks = {"content_block_start": "(", "content_block_delta": "-", "content_block_stop": ")"}
    told = "".join(marks.get(event.type) or event.type.removeprefix("message_")[0] for event in events)
    assert re.fullmatch(r"s(\(-+\))+ds", told), told  # start, delta and stop of the message around
    text = "".join(event.delta.text for event in events if getattr(event, "delta", None) and is_text(event.delta))
    blocks = [event.content_block.type for event in events if event.type == "content_block_start"]
    return text, blocks.count("tool_use"), events[0].message.id


def is_text(delta: Any) -> bool:
    return getattr(delta, "type", "") == "text_delta"


READ: dict[str, Any] = {
    "/v1/chat/completions": read_chat,
    "/v1/responses": read_response,
    "/v1/messages": read_message,
}
