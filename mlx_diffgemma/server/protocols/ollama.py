"""Ollama's protocol: lines of JSON. A request is read in OpenAI's words and answered in these."""

import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from ...values import Field, Table, anything, either, flag, integer, many, mapping, number, one_of, text
from ..exchange import Accepted, Ended, Failed, News, Refused, Said, Served
from . import openai
from .openai import Json

_object = mapping(anything)
OPTIONS = Table(  # what else stands there has no meaning here, and is listed
    Field("temperature", number(least=0, most=1000), None),
    Field("seed", integer(least=-(1 << 63), most=1 << 64), None),
    Field("num_predict", integer(least=-2, most=1 << 40), None),  # -1, -2: so many as there is room
    Field("stop", either(text(empty=False), many(text(empty=False), most=16)), None),
    open=True,
)
_FIELDS = (
    Field("model", text(), None),
    Field("stream", flag, True),
    Field("format", either(one_of("", "json"), _object), ""),
    Field("options", OPTIONS.kind, {}),
    Field("think", either(flag, one_of("low", "medium", "high")), None),
)
CHAT = Table(*_FIELDS, Field("messages", many(_object, least=1)), Field("tools", many(openai.TOOL.kind), ()), open=True)
GENERATE = Table(
    *_FIELDS,
    Field("prompt", text(empty=False)),
    Field("system", text(), None),
    Field("suffix", text(), None),
    Field("images", many(text(empty=False)), ()),
    Field("raw", flag, False),
    open=True,
)
SHOW = Table(Field("model", text(), None), open=True)
VERSION = "0.12.6"  # of the protocol: what clients ask before they use thoughts and schemas


def read_chat(body: Any, served: Served) -> "Chat":
    """A chat. Errors: Refused."""
    asked = openai.read(CHAT, body)
    messages = [_message(message, f"messages[{n}]") for n, message in enumerate(asked["messages"])]
    told = _told(asked) | {"messages": messages, "tools": list(body.get("tools") or ())}
    return Chat(openai.read_chat(told, served), _ignored(asked), served)


def read_generate(body: Any, served: Served) -> "Generate":
    """An answer to a prompt; raw, or with a suffix, its continuation. Errors: Refused."""
    asked = openai.read(GENERATE, body)
    if not asked["raw"] and not asked["suffix"]:
        user = {"role": "user", "content": asked["prompt"], "images": list(asked["images"])}
        system = [{"role": "system", "content": asked["system"]}] if asked["system"] else []
        told = _told(asked) | {"messages": [*system, _message(user, "prompt")]}
        return Generate(openai.read_chat(told, served), _ignored(asked), served)
    for name in ("system", "images", "format", "think"):
        if asked[name]:
            raise Refused(f"{name} would do nothing with raw or suffix.", param=name)
    told = _told(asked) | {"prompt": asked["prompt"], "suffix": asked["suffix"]}
    return Generate(openai.read_completion(told, served), _ignored(asked), served)


def fault(status: int, message: str, **about: Any) -> Json:
    """An error's body."""
    return {"error": message}


def tags(served: Served) -> Json:
    """The list of what is served: one model."""
    at = datetime.fromtimestamp(served.created, UTC).isoformat()
    return {"models": [{"name": served.name, "model": served.name, "modified_at": at, "details": _DETAILS}]}


def show(body: Any, served: Served) -> Json:
    """What is known of the model. Errors: Refused."""
    openai.read(SHOW, body)
    able = {"tools": served.tools, "thinking": served.thinking, "vision": served.pictures is not None}
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _DETAILS,
        "model_info": {"general.architecture": "diffusion_gemma", "diffusion_gemma.context_length": served.context},
        "capabilities": ["completion", "insert", *(name for name, it_can in able.items() if it_can)],
    }


_DETAILS = {
    "format": "safetensors",
    "family": "diffusion_gemma",
    "families": ["diffusion_gemma"],
    "parameter_size": "",
    "quantization_level": "",
    "parent_model": "",
}

# ------------------------------------------------------------------------------------------------ reading requests


def _told(asked: Json) -> Json:
    """What chat and completion have in common, in OpenAI's words."""
    options, form, think = asked["options"], asked["format"], asked["think"]
    told: Json = {"stream": asked["stream"]}
    told |= {name: options[name] for name in ("temperature", "seed", "stop") if options.get(name) is not None}
    if (options.get("num_predict") or -1) > 0:
        told["max_tokens"] = options["num_predict"]
    if form == "json":
        told["response_format"] = {"type": "json_object"}
    elif form:
        told["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
    if think is not None:
        told["chat_template_kwargs"] = {"enable_thinking": bool(think)}
    return told


def _ignored(asked: Json) -> list[str]:
    return [f"options.{name}" for name in asked["options"] if name not in OPTIONS.names]


def _message(message: Json, where: str) -> Json:
    """Pictures stand beside the text here, tools' names where others have ids."""
    made = {key: value for key, value in message.items() if key not in ("images", "tool_name", "thinking")}
    if name := message.get("tool_name"):
        made["name"] = name
    if thought := message.get("thinking"):
        made["reasoning_content"] = thought
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise Refused(f"{where}.tool_calls is {calls!r:.40}, expected a list of objects.", param="messages")
        made["tool_calls"] = [{"type": "function", **call} for call in calls]
    if pictures := message.get("images"):
        urls = [{"type": "image_url", "image_url": {"url": f"data:;base64,{picture}"}} for picture in pictures]
        made["content"] = [*urls, {"type": "text", "text": str(message.get("content") or "")}]
    return made


# ------------------------------------------------------------------------------------------------ writing answers


class Chat:
    """One request and its answer."""

    media_type = "application/x-ndjson"

    def __init__(self, asked: openai.Chat | openai.Completion, ignored: list[str], served: Served):
        self.asked, self.order, self.streams, self.name = asked, asked.order, asked.streams, served.name
        asked.ignored += ignored
        self.since = time.perf_counter()

    def accept(self, accepted: Accepted) -> None:
        self.asked.accept(accepted)

    def alive(self) -> str:
        return ""  # the protocol has no word for it

    def frames(self, news: News) -> Iterator[str]:
        if isinstance(news, Said):
            yield self._line(self.saying(news.text, news.thinking))
        elif isinstance(news, Ended):
            answer = news.answers[0]
            if answer.tool_calls:
                yield self._line(self.saying("", "", answer.tool_calls))
            yield self._line(self.saying("", ""), **self._end(news))
        elif isinstance(news, Failed):
            yield json.dumps(fault(openai.STATUS[news.why], news.message), ensure_ascii=False) + "\n"

    def whole(self, ended: Ended) -> Json:
        answer = ended.answers[0]
        return self._head() | self.saying(answer.text, answer.thinking, answer.tool_calls) | self._end(ended)

    def saying(self, said: str, thinking: str, calls: tuple[Json, ...] = ()) -> Json:
        message: Json = {"role": "assistant", "content": said}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [{"function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
        return {"message": message}

    def _head(self) -> Json:
        return {"model": self.name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}

    def _line(self, said: Json, **end: Any) -> str:
        return json.dumps(self._head() | said | ({"done": False} | end), ensure_ascii=False) + "\n"

    def _end(self, ended: Ended) -> Json:
        """Durations are nanoseconds."""
        seconds, told = ended.seconds, openai.usage(ended)
        return {
            "done": True,
            "done_reason": "length" if ended.answers[0].reason == "length" else "stop",
            "total_duration": int(1e9 * (time.perf_counter() - self.since)),
            "load_duration": 0,
            "prompt_eval_count": told["prompt_tokens"],
            "prompt_eval_duration": int(1e9 * seconds["prefill"]),
            "eval_count": told["completion_tokens"],
            "eval_duration": int(1e9 * seconds["denoise"]),
            "diffusion": self.asked.report(ended),
        }


class Generate(Chat):
    """The answer to a prompt."""

    def saying(self, said: str, thinking: str, calls: tuple[Json, ...] = ()) -> Json:
        return {"response": said} | ({"thinking": thinking} if thinking else {})
