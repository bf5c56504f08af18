"""OpenAI's protocol: chat completions, completions, models. Pure translation, between JSON and Orders and News.

What is our own stands under `diffusion`, in requests and in answers. Drafts, when asked for, are chunks with an empty
delta and the draft beside `choices`: clients that do not know them pass them over, Unsloth Studio shows them. With
`"diffusing": true` they come as Inception's Mercury sends them: the whole answer so far is the content, to replace what
was there.
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...errors import ConfigError
from ...generation.settings import MOST_LOGPROBS, OF_AUTOREGRESSIVE, OPTIONS, Decoding, GenerationOptions
from ...text.language.texts import MARK, Hole
from ...values import Field, Kind, Table, Unfit, anything, either, flag, integer, many, mapping, number, one_of, text
from ..exchange import (
    Accepted,
    Answer,
    Continuations,
    Conversation,
    Drafted,
    Ended,
    Failed,
    Gap,
    Logprob,
    News,
    Order,
    Pins,
    Refused,
    Said,
    Served,
)

Json = dict[str, Any]

# What has no meaning when a canvas is denoised: left out at any value, and listed in the answer's `diffusion.ignored`.
MEANINGLESS = """
    frequency_penalty presence_penalty repetition_penalty repetition_context_size logit_bias top_p top_k min_p
    xtc_probability xtc_threshold typical_p mirostat parallel_tool_calls verbosity
""".split()
STATUS = {"refused": 400, "stopped": 503, "broken": 500}

_own = {option.name: option.kind for option in OPTIONS.fields}
_object = mapping(anything)
_HOLE = Table(
    Field("pattern", text(), None),
    Field("choices", many(text(), least=1), None),
    Field("least", integer(least=0), None),
    Field("most", integer(least=1), None),
)
_PINS = Table(
    Field("text", text(empty=False)), Field("mark", text(empty=False), MARK), Field("holes", many(_HOLE.kind), ())
)
DIFFUSION = Table(
    Field("steps", _own["max_denoising_steps"], None),
    Field("canvas", integer(least=1), None),
    Field("stable_answer", integer(least=1), None),
    Field("retries", _own["retries"], None),
    Field("decoding", _own["decoding"], None),
    Field("drafts", one_of("text", "tokens"), None),
    Field("pins", either(text(empty=False), _PINS.kind), None),
)


def instead(name: str) -> Kind:
    """What is read under another name, and would do nothing under this one."""

    def take(value: Any) -> None:
        if value:
            raise Unfit(f"{name} in its place", value)

    return Kind("nothing", take)


FIELDS = (
    Field("model", text(), None),
    Field("stream", flag, False),
    Field("stream_options", Table(Field("include_usage", flag, False), open=True).kind, {}),
    Field("n", integer(least=1, most=32), 1),
    Field("max_tokens", integer(least=1, most=1 << 40), None),
    Field("temperature", number(least=0, most=1000), None),
    Field("seed", integer(least=-(1 << 63), most=1 << 64), None),
    Field("stop", either(text(empty=False), many(text(empty=False), most=16)), ()),
    Field("diffusion", DIFFUSION.kind, {}),
    Field("diffusing", flag, False),
)
_SCHEMA = Table(Field("schema", either(_object, flag)), open=True)
_FORMAT = Table(
    Field("type", one_of("text", "json_object", "json_schema")), Field("json_schema", _SCHEMA.kind, None), open=True
)
_FUNCTION = Table(Field("name", text(empty=False)), Field("parameters", _object, None), open=True)
TOOL = Table(Field("type", one_of("function"), "function"), Field("function", _FUNCTION.kind), open=True)
_NAMED = Table(
    Field("type", one_of("function")), Field("function", Table(Field("name", text()), open=True).kind), open=True
)
CHAT = Table(
    *FIELDS,
    Field("messages", many(_object, least=1)),
    Field("max_completion_tokens", integer(least=1, most=1 << 40), None),
    Field("logprobs", flag, False),
    Field("top_logprobs", integer(least=0, most=MOST_LOGPROBS), 0),
    Field("response_format", _FORMAT.kind, {}),
    Field("tools", many(TOOL.kind), ()),
    Field("tool_choice", either(one_of("auto", "none", "required"), _NAMED.kind), "auto"),
    Field("functions", instead("tools"), None),
    Field("function_call", instead("tool_choice"), None),
    Field("modalities", many(one_of("text")), ()),
    Field("reasoning_effort", text(), None),
    Field("chat_template_kwargs", _object, {}),
    open=True,
)
_IDS = many(integer(least=0), least=1)


def _prompts(value: Any) -> tuple[Any, ...]:
    """Of a completion: one text, or its ids, or a list of either."""
    one = isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(i, int) for i in value))
    return many(either(text(empty=False), _IDS), least=1, most=64).take([value] if one else value)


COMPLETIONS = Table(
    *(field for field in FIELDS if field.name != "max_tokens"),
    Field("max_tokens", integer(least=0, most=1 << 40), None),  # 0: the prompt is echoed, and that is all
    Field("prompt", Kind("text, ids, or a list of either", _prompts)),
    Field("suffix", text(), None),
    Field("echo", flag, False),
    Field("best_of", integer(least=1, most=32), None),
    Field("logprobs", integer(least=0, most=MOST_LOGPROBS), None),
    open=True,
)


# ----------------------------------------------------------------------------------------------- reading requests


def read(table: Table, body: Any) -> Json:
    """A body by its table. Errors: Refused, which names the field."""
    return read_as(table.kind, body, "the request")


def read_as(kind: Kind, value: Any, where: str) -> Any:
    try:
        return kind.take(value)
    except Unfit as unfit:
        raise Refused(unfit.sentence(where), param=unfit.key or None) from None


def read_chat(body: Any, served: Served) -> "Chat":
    """A chat completion. Errors: Refused."""
    asked = read(CHAT, body)
    options = _options(asked, body)
    if asked["logprobs"]:
        options["logprobs"] = asked["top_logprobs"] or True
    elif body.get("top_logprobs"):
        raise Refused("top_logprobs would do nothing without logprobs: true.", param="top_logprobs")
    thinking, template = _template(asked)
    tools = None if asked["tool_choice"] == "none" else _tools(body)
    order = Order(
        of=Conversation(
            messages=_messages(asked["messages"]),
            tools=tools,
            tool_choice=_choice(asked["tool_choice"], tools),
            thinking=thinking,
            template_options=template,
        ),
        json_schema=_schema(asked["response_format"]),
        **_common(asked, options),
    )
    _check(asked, order)
    return Chat(asked, body, order, served)


def read_completion(body: Any, served: Served) -> "Completion":
    """A completion. Errors: Refused."""
    return Completion(*completion(body), served)


def completion(body: Any) -> tuple[Json, Json, Order]:
    """What is asked, the body it was read from, and the order. Errors: Refused."""
    asked = read(COMPLETIONS, body)
    options = _options(asked, body)
    if asked["logprobs"] is not None:
        options["logprobs"] = asked["logprobs"] or True
    if (best_of := asked["best_of"] or 1) > 1:
        if asked["n"] > 1:
            raise Refused("best_of chooses one answer: it goes with n 1.", param="best_of")
        options["best_of"] = best_of
    prompts, only_echo = asked["prompt"], asked["max_tokens"] == 0
    if only_echo and not asked["echo"]:
        raise Refused("max_tokens 0 would do nothing without echo: true.", param="max_tokens")
    of: Continuations | Gap
    if asked["suffix"]:
        if len(prompts) > 1 or not isinstance(prompts[0], str) or asked["n"] > 1 or asked["echo"]:
            raise Refused("suffix goes with one prompt of text, n 1 and no echo.", param="suffix")
        of = Gap(prefix=prompts[0], suffix=asked["suffix"])
    else:
        each = tuple(p if isinstance(p, str) else list(p) for p in prompts)
        of = Continuations(prompts=each, echo=asked["echo"], only_echo=only_echo)
    order = Order(of=of, **_common(asked, options))
    _check(asked, order)
    return asked, body, order


def _common(asked: Json, options: GenerationOptions) -> Json:
    own, stops = asked["diffusion"], asked["stop"]
    return {
        "options": options,
        "copies": asked["n"],
        "seed": asked["seed"],
        "stops": (stops,) if isinstance(stops, str) else tuple(stops),
        "pins": _pins(own.get("pins")),
        "drafts": "text" if asked["diffusing"] else own.get("drafts"),
    }


def _options(asked: Json, body: Json) -> GenerationOptions:
    own = asked["diffusion"]
    decoding: Decoding = own.get("decoding") or "diffusion"
    given = {
        "max_tokens": asked.get("max_completion_tokens") or asked["max_tokens"] or None,
        "temperature": asked["temperature"],
        "max_denoising_steps": own.get("steps"),
        "canvas_length": own.get("canvas"),
        "stable_answer": own.get("stable_answer"),
        "retries": own.get("retries"),
        "decoding": decoding,
    }
    if decoding == "autoregressive" and asked["temperature"] != 0:
        given |= {
            name: read_as(_own[name], body[name], f"{name}") for name in OF_AUTOREGRESSIVE if body.get(name) is not None
        }
    return GenerationOptions(**{name: value for name, value in given.items() if value is not None})


def _check(asked: Json, order: Order) -> None:
    """Errors: Refused for what would do nothing, or could not be kept."""
    tools = isinstance(order.of, Conversation) and order.of.tools
    autoregressive = order.options.get("decoding") == "autoregressive"
    own = "diffusing" if asked["diffusing"] else "diffusion.drafts"
    if asked["diffusing"] and tools:
        raise Refused("diffusing cannot show tool calls: leave it or the tools out.", param="diffusing")
    if order.drafts and (not asked["stream"] or autoregressive):
        lacking = "stream: true" if not asked["stream"] else "a canvas: decoding is autoregressive"
        raise Refused(f"{own} would do nothing without {lacking}.", param=own)
    for name, least, param in (("retries", 0, "diffusion.retries"), ("best_of", 1, "best_of")):
        if asked["stream"] and order.options.get(name, least) > least:
            message = f"{name} chooses among whole answers, which cannot be streamed: leave it or stream out."
            raise Refused(message, param=param)


def _messages(given: Sequence[Json]) -> list[Json]:
    """As chat templates know them: parts of text joined, arguments as objects, tools' answers by name."""
    names: dict[Any, Any] = {}
    return [_message(message, names) for message in given]


def _message(message: Json, names: dict[Any, Any]) -> Json:
    kept = {key: value for key, value in message.items() if value is not None}
    if kept.get("role") == "developer":
        kept["role"] = "system"
    if isinstance(content := kept.get("content"), list) and all(map(_is_text, content)):
        kept["content"] = "".join(part["text"] for part in content)
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call(call) for call in calls]
        kept.setdefault("content", "")
        for call in kept["tool_calls"]:
            if isinstance(call, dict) and isinstance(call.get("function"), dict) and isinstance(call.get("id"), str):
                names[call["id"]] = call["function"].get("name")
    if kept.get("role") == "tool" and isinstance(called := kept.get("tool_call_id"), str) and names.get(called):
        kept.setdefault("name", names[called])
    return kept


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any) -> Any:
    """Arguments travel as text; templates want the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _tools(body: Json) -> list[Json] | None:
    return list(body.get("tools") or ()) or None


def _choice(choice: Any, tools: list[Json] | None) -> str | None:
    if choice in ("auto", "none"):
        return None
    if tools is None:
        raise Refused("tool_choice asks for a call, but there are no tools.", param="tool_choice")
    if choice == "required":
        return choice
    name = choice["function"]["name"]
    if name not in [tool["function"]["name"] for tool in tools]:
        raise Refused(f"tool_choice names {name!r}, which is none of the tools.", param="tool_choice")
    return name


def _schema(form: Json) -> Any:
    kind = form.get("type", "text")
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        if not form.get("json_schema"):
            raise Refused("response_format has no json_schema.", param="response_format.json_schema")
        return form["json_schema"]["schema"]
    return None


def _template(asked: Json) -> tuple[bool | None, Json | None]:
    """Whether to think, and what else the chat template is told."""
    options = dict(asked["chat_template_kwargs"])
    thinking = options.pop("enable_thinking", None)
    if asked["reasoning_effort"] is not None:
        thinking = asked["reasoning_effort"] not in ("none", "minimal")
    return thinking, options or None


def _pins(given: Any) -> Pins | None:
    if given is None:
        return None
    if isinstance(given, str):
        return Pins(text=given)
    try:
        holes = tuple(Hole(**{k: v for k, v in hole.items() if v is not None}) for hole in given["holes"])
    except ConfigError as error:
        raise Refused(str(error), param="diffusion.pins.holes") from None
    return Pins(text=given["text"], mark=given["mark"], holes=holes)


# ------------------------------------------------------------------------------------------------ writing answers


class _Translation(ABC):
    """One request and its answer."""

    media_type = "text/event-stream"
    object = chunk = prefix = ""

    def __init__(self, asked: Json, body: Mapping[str, Any], order: Order, served: Served):
        self.order, self.streams = order, bool(asked["stream"])
        self.usage = bool(asked["stream_options"].get("include_usage"))
        self.diffusing = asked["diffusing"]
        used = order.options.keys()
        self.ignored = [name for name in MEANINGLESS if body.get(name) is not None and name not in used]
        self.accepted = Accepted(prompt_tokens=0, seeds=())
        self.head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": served.name}

    def accept(self, accepted: Accepted) -> None:
        """The order can be met."""
        self.accepted = accepted
        self.ignored += ["reasoning_effort" if name == "thinking" else name for name in accepted.left_out]

    def alive(self) -> str:
        """What is sent when there was nothing to say for a while."""
        return ": waiting\n\n"

    def frames(self, news: News) -> Iterator[str]:
        """News as a stream has them."""
        if isinstance(news, Failed):
            yield _sse(fault_of(news))
            return
        for made in self.chunks(news):
            yield _sse(self.head | {"object": self.chunk} | made | ({"usage": None} if self.usage else {}))
        if isinstance(news, Ended):
            if self.usage:
                yield _sse(self.head | {"object": self.chunk, "choices": [], "usage": usage(news)})
            yield "data: [DONE]\n\n"

    def whole(self, ended: Ended) -> Json:
        """The answer in one piece."""
        choices = [self.choice(index, answer) for index, answer in enumerate(ended.answers)]
        rest = {"choices": choices, "usage": usage(ended), "diffusion": self.report(ended)}
        return self.head | {"object": self.object} | rest

    @abstractmethod
    def chunks(self, news: News) -> Iterator[Json]:
        """News as chunks, without what every chunk has."""

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> Json:
        """One answer of several."""

    def report(self, ended: Ended) -> Json:
        """What is our own in an answer."""
        anew = sum(answer.written_anew for answer in ended.answers)
        unread = [call for answer in ended.answers for call in answer.unread_calls]
        seen = [asdict(picture) for picture in ended.pictures]
        return {
            "canvases": sum(answer.canvases for answer in ended.answers),
            "steps": sum(answer.steps for answer in ended.answers),
            "seed": self.accepted.seeds[0],
            "departures": ended.departures,
            "tuning": ended.tuning,
            "timings": {f"{name}_seconds": round(value, 4) for name, value in ended.seconds.items()},
            "ignored": self.ignored,
            **({"rewritten_tool_calls": anew} if anew else {}),
            **({"unread_tool_calls": unread} if unread else {}),
            **({"pictures": seen} if seen else {}),
        }


class Chat(_Translation):
    """A chat completion."""

    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.committed = [""] * self.order.copies  # contents, for Mercury's drafts

    def chunks(self, news: News) -> Iterator[Json]:
        if isinstance(news, Accepted):
            for row in range(len(news.seeds)):
                yield _delta(row, {"role": "assistant", "content": ""})
        elif isinstance(news, Drafted):
            yield from self._draft(news)
        elif isinstance(news, Said):
            yield from self._said(news)
        elif isinstance(news, Ended):
            for row, answer in enumerate(news.answers):
                if answer.tool_calls:
                    yield _delta(row, {"tool_calls": [c | {"index": i} for i, c in enumerate(calls(answer))]})
                yield _delta(row, {}, answer.reason) | {"diffusion": self.report(news)}

    def choice(self, index: int, answer: Answer) -> Json:
        message: Json = {"role": "assistant", "content": answer.text or (None if answer.tool_calls else "")}
        if answer.thinking:
            message["reasoning_content"] = answer.thinking
        if answer.tool_calls:
            message["tool_calls"] = calls(answer)
        scores = None if answer.logprobs is None else {"content": [_logprob(p) for p in answer.logprobs]}
        return {"index": index, "message": message, "finish_reason": answer.reason, "logprobs": scores}

    def _draft(self, news: Drafted) -> Iterator[Json]:
        if self.diffusing:
            if news.channel == "content":
                yield _delta(news.row, {"content": self.committed[news.row] + news.text})
            return
        told = {
            "temperature": news.temperature,
            "accepted": news.accepted,
            "mean_entropy": news.mean_entropy,
            "settled": news.settled,
            "channel": news.channel,
            "end": news.end,
        }
        if news.tokens is not None:
            told["tokens"] = news.tokens
        counted = {"block": news.block, "step": news.step, "total": news.steps, "text": news.text}
        yield _delta(news.row, {}) | {"type": "diffusion_frame", **counted, "diffusion": told}

    def _said(self, news: Said) -> Iterator[Json]:
        self.committed[news.row] += news.text
        if news.thinking:
            yield _delta(news.row, {"reasoning_content": news.thinking})
        scores = {"content": [_logprob(p) for p in news.logprobs]} if news.logprobs else None
        if news.text or scores:
            content = self.committed[news.row] if self.diffusing else news.text
            made = _delta(news.row, {"content": content})
            if scores:
                made["choices"][0]["logprobs"] = scores
            yield made


class Completion(_Translation):
    """A completion of bare text."""

    object = chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.offsets: dict[int, int] = {}  # characters told of each row

    def chunks(self, news: News) -> Iterator[Json]:
        if isinstance(news, Drafted):
            counted = {"block": news.block, "step": news.step, "total": news.steps, "text": news.text}
            told = {"accepted": news.accepted, "mean_entropy": news.mean_entropy, "settled": news.settled}
            yield {"choices": [self._text(news.row, "")], "type": "diffusion_frame", **counted, "diffusion": told}
        elif isinstance(news, Said):
            if news.text or news.logprobs:
                scores = self._scores(news.row, news.logprobs) if news.logprobs else None
                yield {"choices": [self._text(news.row, news.text, scores=scores)]}
        elif isinstance(news, Ended):
            for row, answer in enumerate(news.answers):
                reason = "length" if answer.reason == "length" else "stop"
                yield {"choices": [self._text(row, "", reason)], "diffusion": self.report(news)}

    def choice(self, index: int, answer: Answer) -> Json:
        reason = "length" if answer.reason == "length" else "stop"
        scores = None if answer.logprobs is None else self._scores(index, answer.logprobs)
        return self._text(index, answer.text, reason, scores)

    def _text(self, row: int, said: str, reason: str | None = None, scores: Json | None = None) -> Json:
        return {"index": row, "text": said, "finish_reason": reason, "logprobs": scores}

    def _scores(self, row: int, found: Sequence[Logprob]) -> Json:
        """Four lists side by side, as this endpoint has them."""
        offsets, at = [], self.offsets.get(row, 0)
        for score in found:
            offsets.append(at)
            at += len(score.token)
        self.offsets[row] = at
        return {
            "tokens": [score.token for score in found],
            "token_logprobs": [score.logprob for score in found],
            "top_logprobs": [_likeliest(score) for score in found],
            "text_offset": offsets,
        }


def _likeliest(score: Logprob) -> Json | None:
    """The likeliest tokens by name; with them the token itself, by the very number that it has beside them."""
    if not score.top or score.logprob is None:
        return None
    return {token: value for token, _, value in score.top} | {score.token: score.logprob}


def _sse(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _delta(row: int, delta: Json, reason: str | None = None) -> Json:
    return {"choices": [{"index": row, "delta": delta, "finish_reason": reason}]}


def calls(answer: Answer) -> list[Json]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for call in answer.tool_calls
    ]


def _logprob(score: Logprob) -> Json:
    top = [
        {"token": token, "logprob": value, "bytes": None if spelled is None else list(spelled)}
        for token, spelled, value in score.top
    ]
    own = {} if score.canvas_logprob is None else {"canvas_logprob": score.canvas_logprob}
    spelled = None if score.bytes is None else list(score.bytes)
    return {"token": score.token, "logprob": score.logprob, "bytes": spelled, "top_logprobs": top} | own


def usage(ended: Ended) -> Json:
    """Tokens, as OpenAI counts them."""
    told = sum(answer.tokens for answer in ended.answers)
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": told,
        "total_tokens": ended.prompt_tokens + told,
        "prompt_tokens_details": {"cached_tokens": ended.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.thinking_tokens for answer in ended.answers)},
    }


def models(served: Served) -> Json:
    """The list of what is served: one model."""
    return {"object": "list", "data": [model(served)]}


def model(served: Served) -> Json:
    """It, with what it takes in."""
    takes = ["text"] if served.pictures is None else ["text", "image"]
    about = {"id": served.name, "object": "model", "created": served.created, "owned_by": "mlx_diffgemma"}
    return about | {"input_modalities": takes}


def fault(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Json:
    """An error's body."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def fault_of(failed: Failed) -> Json:
    code = "context_length_exceeded" if failed.too_long else None
    param = "messages" if failed.too_long else None
    return fault(STATUS[failed.why], failed.message, param=param, code=code)
