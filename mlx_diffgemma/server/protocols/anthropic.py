"""Anthropic's Messages: the same conversation in blocks. A request is read in OpenAI's words and answered in these."""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...values import Field, Table, anything, either, flag, integer, many, mapping, number, one_of, text
from ..exchange import Accepted, Answer, Ended, Failed, News, Refused, Said, Served
from . import openai
from .openai import Json

_object = mapping(anything)
_CHOICE = Table(Field("type", one_of("auto", "any", "tool", "none")), Field("name", text(empty=False), None), open=True)
_FORMAT = Table(Field("type", one_of("json_schema")), Field("schema", _object), open=True)
_TOOL = Table(
    Field("name", text(empty=False)),
    Field("description", text(), None),
    Field("input_schema", _object, None),  # none: a tool of Anthropic's own servers
    Field("strict", flag, False),
    open=True,
)
_MESSAGE = Table(
    Field("role", one_of("user", "assistant", "system")), Field("content", either(text(), many(_object))), open=True
)
_COUNTED = (
    Field("model", text(), None),
    Field("messages", many(_MESSAGE.kind, least=1)),
    Field("system", either(text(), many(_object)), ()),
    Field("tools", many(_TOOL.kind), ()),
    Field("tool_choice", _CHOICE.kind, {"type": "auto"}),
    Field("thinking", Table(Field("type", one_of("enabled", "adaptive", "disabled")), open=True).kind, None),
    Field("output_config", Table(Field("format", _FORMAT.kind, None), open=True).kind, {}),
)
COUNT = Table(*_COUNTED, open=True)
MESSAGES = Table(
    *_COUNTED,
    Field("max_tokens", integer(least=1, most=1 << 40)),
    Field("stream", flag, False),
    Field("stop_sequences", many(text(empty=False), most=16), ()),
    Field("temperature", number(least=0, most=1000), None),
    Field("diffusion", openai.DIFFUSION.kind, {}),
    open=True,
)
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def read_messages(body: Any, served: Served) -> "Messages":
    """A message. Errors: Refused."""
    asked = openai.read(MESSAGES, body)
    if asked["diffusion"].get("drafts"):
        raise Refused("drafts are shown by /v1/chat/completions alone.", param="diffusion.drafts")
    told = {
        "max_tokens": asked["max_tokens"],
        "stream": asked["stream"],
        "stop": list(asked["stop_sequences"]),
        "temperature": asked["temperature"],
        "diffusion": body.get("diffusion"),
    }
    told |= {name: body[name] for name in ("top_p", "top_k") if name in body}
    return Messages(openai.read_chat(_conversation(asked) | told, served), _others(asked), served)


def read_count(body: Any, served: Served) -> "Count":
    """How long a message is. Errors: Refused."""
    return Count(openai.read_chat(_conversation(openai.read(COUNT, body)), served), [], served)


def fault(status: int, message: str, **about: Any) -> Json:
    """An error's body."""
    own = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
    kind = own.get(status) or openai.fault(status, message)["error"]["type"]
    return {"type": "error", "error": {"type": kind, "message": message}}


# ------------------------------------------------------------------------------------------------ reading requests


def _conversation(asked: Json) -> Json:
    """What is asked, as a chat completion."""
    tools = [
        {"name": tool["name"], "description": tool["description"] or "", "parameters": tool["input_schema"]}
        | ({"strict": True} if tool["strict"] else {})
        for tool in asked["tools"]
        if tool["input_schema"] is not None
    ]
    system, form, thinking = asked["system"], asked["output_config"].get("format"), asked["thinking"]
    told: Json = {
        "messages": [
            *([{"role": "system", "content": _texts(system, "system")}] if system else []),
            *(made for n, one in enumerate(asked["messages"]) for made in _said(one, f"messages[{n}]")),
        ],
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "tool_choice": _choice(asked["tool_choice"]),
    }
    if form:
        told["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    if thinking:
        told["chat_template_kwargs"] = {"enable_thinking": thinking["type"] != "disabled"}
    return told


def _others(asked: Json) -> list[str]:
    """Tools that run on Anthropic's servers: nobody here can call them."""
    return [f"tools.{tool['name']}" for tool in asked["tools"] if tool["input_schema"] is None]


def _choice(choice: Json) -> Any:
    if choice["type"] == "tool":
        return {"type": "function", "function": {"name": choice["name"] or ""}}
    return {"any": "required"}.get(choice["type"], choice["type"])


def _said(message: Json, where: str) -> Iterator[Json]:
    """One message as those of a chat: what tools answered stands by itself, before what is said beside it."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    parts: list[Json] = []
    calls: list[Json] = []
    thoughts: list[str] = []
    for at, block in enumerate(content):
        place = f"{where}.content[{at}]"
        kind = block.get("type")
        if kind == "text":
            parts.append({"type": "text", "text": _text(block, place)})
        elif kind == "image":
            parts.append(_picture(block.get("source"), place))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            told = block.get("content") or ""
            told = told if isinstance(told, str) else _shown(told, f"{place}.content")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": told}
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            raise Refused(f"{place} is a {kind!r:.40} block, which is not read here.", param="messages")
    if parts or calls:
        made: Json = {"role": role, "content": parts}
        made |= {"tool_calls": calls} if calls else {}
        yield made | ({"reasoning_content": "".join(thoughts)} if thoughts else {})


def _text(block: Mapping[str, Any], place: str) -> str:
    if not isinstance(block.get("text"), str):
        raise Refused(f"{place} has no text.", param=place.partition("[")[0])
    return block["text"]


def _texts(content: str | Sequence[Json], place: str) -> str:
    """The text of blocks, joined."""
    if isinstance(content, str):
        return content
    if other := next((b for b in content if not isinstance(b, Mapping) or b.get("type") != "text"), None):
        kind = other.get("type") if isinstance(other, Mapping) else other
        raise Refused(f"{place} has a {kind!r:.40} block; only text is read there.", param=place.partition("[")[0])
    return "".join(_text(block, place) for block in content)


def _shown(content: Sequence[Json], place: str) -> str | list[Json]:
    """What a tool answered: its text, or, with pictures among it, parts."""
    pictures = [isinstance(block, Mapping) and block.get("type") == "image" for block in content]
    if not any(pictures):
        return _texts(content, place)
    return [
        _picture(block.get("source"), f"{place}[{n}]") if seen else {"type": "text", "text": _texts([block], place)}
        for n, (block, seen) in enumerate(zip(content, pictures, strict=True))
    ]


def _picture(source: Any, place: str) -> Json:
    source = source if isinstance(source, Mapping) else {}
    if source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    elif source.get("type") == "url":
        url = str(source.get("url"))
    else:
        raise Refused(f"{place}.source is neither base64 nor url.", param="messages")
    return {"type": "image_url", "image_url": {"url": url}}


# ------------------------------------------------------------------------------------------------ writing answers


class Messages:
    """One request and its answer."""

    media_type = "text/event-stream"

    def __init__(self, chat: openai.Chat, others: list[str], served: Served):
        self.chat, self.order, self.streams = chat, chat.order, chat.streams
        chat.ignored += others
        self.head = {"id": "msg_" + uuid.uuid4().hex[:24], "type": "message", "role": "assistant", "model": served.name}
        self.open = ""  # the kind of the block that is being written
        self.blocks = 0

    def accept(self, accepted: Accepted) -> Json | None:
        self.chat.accept(accepted)

    def alive(self) -> str:
        return _event("ping")

    def frames(self, news: News) -> Iterator[str]:
        if isinstance(news, Accepted):
            usage = {"input_tokens": news.prompt_tokens, "output_tokens": 0}
            begun = self.head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            yield _event("message_start", message=begun)
        elif isinstance(news, Said):
            yield from self._grow("thinking", news.thinking)
            yield from self._grow("text", news.text)
        elif isinstance(news, Ended):
            yield from self._close()
            answer = news.answers[0]
            for call in openai.calls(answer):
                block = _called(call)
                yield _event("content_block_start", index=self.blocks, content_block=block | {"input": {}})
                piece = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
                yield _event("content_block_delta", index=self.blocks, delta=piece)
                yield _event("content_block_stop", index=self.blocks)
                self.blocks += 1
            yield _event("message_delta", delta=_ending(answer), usage=_usage(news), diffusion=self.chat.report(news))
            yield _event("message_stop")
        elif isinstance(news, Failed):
            yield _event("error", error=fault(openai.STATUS[news.why], news.message)["error"])

    def whole(self, ended: Ended) -> Json:
        answer = ended.answers[0]
        content: list[Json] = []
        if answer.thinking:
            content.append({"type": "thinking", "thinking": answer.thinking, "signature": self.head["id"]})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        content += map(_called, openai.calls(answer))
        rest = {"content": content, "usage": _usage(ended), "diffusion": self.chat.report(ended)}
        return self.head | _ending(answer) | rest

    def _grow(self, kind: str, more: str) -> Iterator[str]:
        """Text for the open block of this kind, or for a new one."""
        if not more:
            return
        if self.open != kind:
            yield from self._close()
            self.open = kind
            begun = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            yield _event("content_block_start", index=self.blocks, content_block=begun)
        yield _event("content_block_delta", index=self.blocks, delta={"type": f"{kind}_delta", kind: more})

    def _close(self) -> Iterator[str]:
        if self.open == "thinking":  # clients send a thought back with its signature; nothing here depends on it
            signed = {"type": "signature_delta", "signature": self.head["id"]}
            yield _event("content_block_delta", index=self.blocks, delta=signed)
        if self.open:
            yield _event("content_block_stop", index=self.blocks)
            self.open, self.blocks = "", self.blocks + 1


class Count(Messages):
    """How many tokens a request has; nothing is answered."""

    def accept(self, accepted: Accepted) -> Json:
        return {"input_tokens": accepted.prompt_tokens}


def _event(kind: str, **data: Any) -> str:
    said = json.dumps({"type": kind} | data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {said}\n\n"


def _called(call: Json) -> Json:
    function = call["function"]
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": json.loads(function["arguments"])}


def _ending(answer: Answer) -> Json:
    reason = "stop_sequence" if answer.stop is not None else REASONS[answer.reason]
    return {"stop_reason": reason, "stop_sequence": answer.stop}


def _usage(ended: Ended) -> Json:
    told = openai.usage(ended)
    return {
        "input_tokens": told["prompt_tokens"] - ended.reused_tokens,
        "cache_read_input_tokens": ended.reused_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": told["completion_tokens"],
    }
