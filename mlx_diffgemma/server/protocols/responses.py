"""OpenAI's Responses: the same conversation in items, told as numbered events. A request is read in the words of chat
completions; what was answered is kept within the process, so that `previous_response_id` can go on from it."""

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...generation.settings import MOST_LOGPROBS
from ...values import Field, Table, anything, either, flag, integer, many, mapping, number, one_of, text
from ..exchange import Accepted, Ended, Failed, News, Refused, Said, Served
from . import openai
from .openai import Json

KEPT = 256  # answers that can be gone on from, the latest
_object = mapping(anything)
_FORMAT = Table(
    Field("type", one_of("text", "json_object", "json_schema")), Field("schema", either(_object, flag), None), open=True
)
RESPONSES = Table(
    Field("model", text(), None),
    Field("input", either(text(empty=False), many(_object, least=1))),
    Field("instructions", text(), None),
    Field("previous_response_id", text(empty=False), None),
    Field("conversation", openai.instead("previous_response_id"), None),
    Field("prompt", openai.instead("input"), None),
    Field("background", one_of(False), False),
    Field("store", flag, True),
    Field("stream", flag, False),
    Field("max_output_tokens", integer(least=1, most=1 << 40), None),
    Field("temperature", number(least=0, most=1000), None),
    Field("tools", many(_object), ()),
    Field("tool_choice", either(one_of("auto", "none", "required"), _object), "auto"),
    Field("reasoning", Table(Field("effort", text(), None), open=True).kind, {}),
    Field("text", Table(Field("format", _FORMAT.kind, {"type": "text"}), open=True).kind, {}),
    Field("top_logprobs", integer(least=0, most=MOST_LOGPROBS), 0),
    Field("diffusion", openai.DIFFUSION.kind, {}),
    open=True,
)
_FUNCTION = Table(Field("name", text(empty=False)), Field("parameters", _object, None), open=True)
_NAMESPACE = Table(Field("name", text(empty=False)), Field("tools", many(_object)), open=True)


class Turns:
    """Conversations by their last answer's id, the latest of them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, list[Json]] = OrderedDict()

    def keep(self, name: str, messages: list[Json]) -> None:
        self._kept[name] = messages
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def read(self, body: Any, served: Served) -> "Responses":
        """A response. Errors: Refused."""
        asked = openai.read(RESPONSES, body)
        if asked["diffusion"].get("drafts"):
            raise Refused("drafts are shown by /v1/chat/completions alone.", param="diffusion.drafts")
        tools = _Tools(asked["tools"])
        messages = [*self._before(asked["previous_response_id"]), *_messages(asked["input"], tools)]
        if not messages:
            raise Refused("input has no message.", param="input")
        chat = openai.read_chat(_told(asked, body, messages, tools), served)
        return Responses(chat, asked, messages, tools, self if asked["store"] else None, served)

    def _before(self, name: str | None) -> list[Json]:
        if name is None:
            return []
        if name not in self._kept:
            message = f"There is no answer {name[:100]!r} here: the last {KEPT} of this server's are kept."
            raise Refused(message, param="previous_response_id", status=404, code="previous_response_not_found")
        return self._kept[name]


# ------------------------------------------------------------------------------------------------ reading requests


class _Tools:
    """Functions, those of namespaces under joined names; what runs on OpenAI's servers is left out."""

    def __init__(self, given: Sequence[Json]):
        self.functions: list[Json] = []
        self.names: dict[str, tuple[str | None, str]] = {}  # what the model calls → namespace and name
        self.others: list[str] = []
        for at, tool in enumerate(given):
            where, kind = f"tools[{at}]", tool.get("type")
            if kind == "function":
                self._add(tool, None, where)
            elif kind == "namespace":
                space = openai.read_as(_NAMESPACE.kind, tool, where)
                for inner, function in enumerate(space["tools"]):
                    self._add(function, space["name"], f"{where}.tools[{inner}]")
            else:
                self.others.append(f"tools.{kind}")

    def _add(self, given: Json, space: str | None, where: str) -> None:
        tool = openai.read_as(_FUNCTION.kind, given, where)
        name = self.joined(space, tool["name"])
        if name in self.names:
            raise Refused(f"{where}.name is {name!r} again.", param="tools")
        self.names[name] = space, tool["name"]
        function = {"name": name, "description": given.get("description") or "", "parameters": tool["parameters"]}
        function |= {"strict": True} if given.get("strict") is True else {}
        self.functions.append({"type": "function", "function": function})

    @staticmethod
    def joined(space: Any, name: Any) -> str:
        return f"{name}" if not space else f"{space}{name}" if str(space).endswith("__") else f"{space}__{name}"

    def item(self, call: Json) -> Json:
        """A call as an item."""
        function = call["function"]
        space, name = self.names.get(function["name"], (None, function["name"]))
        made = {"type": "function_call", "id": _id("fc"), "call_id": call["id"], "name": name}
        return made | {"arguments": function["arguments"]} | ({"namespace": space} if space else {})


def _told(asked: Json, body: Json, messages: list[Json], tools: _Tools) -> Json:
    """What is asked, as a chat completion."""
    first = [{"role": "system", "content": asked["instructions"]}] if asked["instructions"] else []
    told: Json = {
        "messages": first + messages,
        "tools": tools.functions,
        "tool_choice": _choice(asked["tool_choice"], tools),
        "max_tokens": asked["max_output_tokens"],
        "reasoning_effort": asked["reasoning"].get("effort"),
        "diffusion": body.get("diffusion"),
    }
    told |= {name: asked[name] for name in ("temperature", "stream")}
    told |= {name: body[name] for name in ("top_p", "parallel_tool_calls") if body.get(name) is not None}
    if asked["top_logprobs"]:
        told |= {"logprobs": True, "top_logprobs": asked["top_logprobs"]}
    form = asked["text"].get("format") or {"type": "text"}
    if form["type"] == "json_schema" and form.get("schema") is None:
        raise Refused("text.format has no schema.", param="text.format.schema")
    schema = {"json_schema": {"schema": form["schema"]}} if form["type"] == "json_schema" else {}
    return told | {"response_format": {"type": form["type"]} | schema}


def _choice(choice: Any, tools: _Tools) -> Any:
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": tools.joined(choice.get("namespace"), choice.get("name"))}}
    if choice.get("type") == "allowed_tools" and choice.get("mode") in ("auto", "required"):
        return choice["mode"]
    raise Refused(f"tool_choice is {choice!r:.60}, expected auto, none, required or a function.", param="tool_choice")


def _messages(given: str | Sequence[Json], tools: _Tools) -> list[Json]:
    """Items as chat messages: calls that follow each other are one message of the assistant."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    found: list[Json] = []
    for at, item in enumerate(given):
        where, kind = f"input[{at}]", item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            found.append({"role": role, "content": _content(item.get("content"), where)})
        elif kind == "function_call":
            function = {
                "name": tools.joined(item.get("namespace"), item.get("name")),
                "arguments": item.get("arguments"),
            }
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            found[-1] = found[-1] | {"tool_calls": [*found[-1].get("tool_calls", ()), call]}
        elif kind == "function_call_output":
            content = _content(item.get("output"), where)
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind not in ("reasoning", "item_reference"):
            raise Refused(f"{where} is a {kind!r:.40}, which is not read here.", param="input")
    return found


_PARTS = {"input_text": "text", "output_text": "text", "text": "text"}


def _content(content: Any, where: str) -> Any:
    """Text, or parts in the words of chat completions."""
    if not isinstance(content, list):
        return content
    parts: list[Json] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _PARTS and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            url = {"url": part["image_url"], **({"detail": part["detail"]} if part.get("detail") else {})}
            parts.append({"type": "image_url", "image_url": url})
        else:
            raise Refused(f"{where} has a {kind!r:.40} part, which is not read here.", param="input")
    return parts


# ------------------------------------------------------------------------------------------------ writing answers


class Responses:
    """One request and its answer."""

    media_type = "text/event-stream"

    def __init__(
        self, chat: openai.Chat, asked: Json, messages: list[Json], tools: _Tools, turns: Turns | None, served: Served
    ):
        self.chat, self.order, self.streams = chat, chat.order, chat.streams
        chat.ignored += tools.others
        self.messages, self.tools, self.turns = messages, tools, turns
        self.head: Json = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
            "parallel_tool_calls": True,
            "tool_choice": asked["tool_choice"],
            "tools": list(asked["tools"]),
            "temperature": asked["temperature"],
            "top_p": None,
            "metadata": {},
        }
        self.head |= {
            name: asked[name] for name in ("instructions", "previous_response_id", "store", "max_output_tokens")
        }
        self.count = 0  # events told
        self.items: list[Json] = []  # finished
        self.open: Json | None = None  # the item that is being written
        self.said = ""  # of it

    def accept(self, accepted: Accepted) -> None:
        self.chat.accept(accepted)

    def alive(self) -> str:
        """A real event: Codex counts nothing else as a sign of life."""
        return self._event("response.in_progress", response=self._response("in_progress"))

    def frames(self, news: News) -> Iterator[str]:
        if isinstance(news, Accepted):
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._response("in_progress"))
        elif isinstance(news, Said):
            yield from self._grow("reasoning", news.thinking)
            yield from self._grow("message", news.text)
        elif isinstance(news, Ended):
            yield from self._close()
            for call in openai.calls(news.answers[0]):
                yield from self._call(self.tools.item(call))
            ended = self._ended(news, self.items)
            yield self._event(f"response.{ended['status']}", response=ended)
        elif isinstance(news, Failed):
            code = "context_length_exceeded" if news.too_long else "server_error"
            error = {"code": code, "message": news.message}
            yield self._event("response.failed", response=self._response("failed") | {"error": error})

    def whole(self, ended: Ended) -> Json:
        answer = ended.answers[0]
        told = (("reasoning", answer.thinking), ("message", answer.text))
        items = [_item(kind, _id(_PREFIX[kind]), said) for kind, said in told if said]
        items += [self.tools.item(call) | {"status": "completed"} for call in openai.calls(answer)]
        return self._ended(ended, items)

    def _ended(self, ended: Ended, items: list[Json]) -> Json:
        answer, told = ended.answers[0], openai.usage(ended)
        if self.turns is not None:
            self.turns.keep(self.head["id"], [*self.messages, *_messages(items, self.tools)])
        cut = answer.reason == "length"
        usage = {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": told["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": told["completion_tokens_details"],
            "total_tokens": told["total_tokens"],
        }
        return self._response("incomplete" if cut else "completed") | {
            "output": items,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": usage,
            "diffusion": self.chat.report(ended),
        }

    def _response(self, status: str) -> Json:
        empty = {"error": None, "incomplete_details": None, "output": self.items, "usage": None}
        return self.head | {"status": status} | empty

    def _event(self, kind: str, **data: Any) -> str:
        told = {"type": kind, "sequence_number": self.count} | data
        self.count += 1
        return f"event: {kind}\ndata: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def _grow(self, kind: str, more: str) -> Iterator[str]:
        """Text for the open item of this kind, or for a new one."""
        if not more:
            return
        if self.open is None or self.open["type"] != kind:
            yield from self._close()
            self.open, self.said = {"type": kind, "id": _id(_PREFIX[kind])}, ""
            begun = _item(kind, self.open["id"], None)
            yield self._event("response.output_item.added", output_index=len(self.items), item=begun)
            yield self._event("response.content_part.added", **self._place(), part=_part(kind, ""))
        self.said += more
        about = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{_TEXT[kind]}.delta", **self._place(), delta=more, **about)

    def _close(self) -> Iterator[str]:
        if self.open is None:
            return
        kind, place = self.open["type"], self._place()
        about = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{_TEXT[kind]}.done", **place, text=self.said, **about)
        yield self._event("response.content_part.done", **place, part=_part(kind, self.said))
        made = _item(kind, self.open["id"], self.said)
        yield self._event("response.output_item.done", output_index=len(self.items), item=made)
        self.items.append(made)
        self.open = None

    def _call(self, item: Json) -> Iterator[str]:
        index, arguments = len(self.items), item["arguments"]
        place = {"item_id": item["id"], "output_index": index}
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments)
        self.items.append(item | {"status": "completed"})
        yield self._event("response.output_item.done", output_index=index, item=self.items[-1])

    def _place(self) -> Json:
        return {"item_id": (self.open or {})["id"], "output_index": len(self.items), "content_index": 0}


_PREFIX = {"reasoning": "rs", "message": "msg"}
_TEXT = {"reasoning": "reasoning_text", "message": "output_text"}


def _part(kind: str, said: str) -> Json:
    return {"type": _TEXT[kind], "text": said} | ({"annotations": [], "logprobs": []} if kind == "message" else {})


def _item(kind: str, name: str, said: str | None) -> Json:
    """A message or a thought; None: it has just begun."""
    content = [] if said is None else [_part(kind, said)]
    status = "in_progress" if said is None else "completed"
    more = {"role": "assistant"} if kind == "message" else {"summary": []}
    return {"type": kind, "id": name, "status": status, "content": content} | more


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
