"""From an Order to News: what the thread that holds the model does for one order."""

import bisect
import codecs
import json
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np

from ..errors import DiffGemmaError, PromptError, TokenizerError
from ..generation.events import CanvasRow, Committed, Denoised, Prefilled
from ..generation.run import told_of_pictures
from ..generation.settings import GenerationOptions
from ..generation.vocabulary import Scores
from ..model.cache import PrefixCache
from ..model.memory import STEP, memory_needed, weight_bytes
from ..pipeline.model import DiffusionGemma
from ..pipeline.obeying.constraints import Asked
from ..pipeline.obeying.drafts import Draft
from ..pipeline.prompts import PromptIds
from ..pipeline.requests import Request
from ..pipeline.results import Result
from ..pipeline.scores import score_parts
from ..text.channels import QUOTE
from ..text.language.automaton import Language
from ..text.tokenizer import Tokenizer
from .exchange import (
    Accepted,
    Answer,
    Continuations,
    Conversation,
    Drafted,
    Ended,
    Gap,
    Logprob,
    News,
    Order,
    Pins,
    Reading,
    Said,
)
from .prefixes import Key, Prefixes
from .protocols.typed import typed_call
from .strictly import Strict

T = TypeVar("T")
TURN = 32  # tokens of autoregressive decoding that count as one canvas: nobody waits longer for them


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One step of an order: what there is to tell, and whether the others' turn has come."""

    news: tuple[News, ...] = ()
    turn_is_over: bool = False


class TooLong(PromptError):
    """A prompt that does not fit the context."""


class Answering:
    """One order, checked. Errors: DiffGemmaError."""

    def __init__(self, model: DiffusionGemma, order: Order, *, most_tokens: int | None, most_bytes: int):
        self.model, self.order = model, order
        self.left_out: tuple[str, ...] = ()
        self.template: dict[str, Any] = {}
        self.strict = Strict(order.of.tools or ()) if isinstance(order.of, Conversation) else Strict(())
        self.left_out += tuple(self.strict.left_out)
        self.request = self._prepared(most_tokens, most_bytes)
        rows = len(self.request.prompts)
        stop_ids = frozenset(self.request.settings.stop_ids)
        self.rows = [_Row(model.tokenizer, prompt, order, stop_ids) for prompt in self.request.prompts]
        self.needed = rows * held(model, max(map(len, self.request.prompts)) + self.request.settings.max_tokens)
        if any(self.request.pictures):
            self.needed += model.seeing.memory(self.request.pictures[0]).added
        self.seconds = {"queue": 0.0, "prefill": 0.0, "denoise": 0.0}
        self.reused = 0

    @property
    def accepted(self) -> Accepted:
        return Accepted(
            prompt_tokens=self._prompt_tokens,
            seeds=tuple(cast(Sequence[int], self.request.seeds)),
            left_out=self.left_out,
        )

    def run(self, prefixes: Prefixes) -> Iterator[Beat]:
        """Closing it stops within a step. Errors: whatever a generation may raise."""
        yield from self._echo()
        if self.request.settings.chooses:
            yield from self._choose()
            return
        if isinstance(self.order.of, Continuations) and self.order.of.only_echo:
            for row in self.rows:
                row.reason = "length"
            yield Beat(news=(self._ended(),), turn_is_over=True)
            return
        cache, pauses = self._start(prefixes)
        events = self._clocked(self.request.events_among_others(cache, pauses))
        for event in events:
            if isinstance(event, Prefilled):
                if event.tokens in pauses and cache is not None:
                    prefixes.keep(self.request.keys[0][: event.tokens], self.request.network, cache)
                yield Beat(news=(Reading(tokens=event.tokens, total=event.total),), turn_is_over=True)
            elif isinstance(event, Denoised):
                yield Beat(news=self._drafts(event))
            elif isinstance(event, Committed):
                news = tuple(said for row, made in enumerate(event.rows) if (said := self._said(row, event, made)))
                yield Beat(news=news, turn_is_over=self._ends_turn(event))
                if self.order.stops and all(row.over for row in self.rows):
                    break
            else:
                yield Beat(news=tuple(self._rest(event.results)))
        events.close()
        yield from self._obey(prefixes)
        yield Beat(news=(self._ended(),), turn_is_over=True)

    # ---------------------------------------------------------------------------------------------------- the prompt

    def _prepared(self, most_tokens: int | None, most_bytes: int) -> Request:
        order, of = self.order, self.order.of
        options = GenerationOptions(**order.options)
        if isinstance(of, Gap):
            return self.model.prepare_fill(prefix=of.prefix, suffix=of.suffix, seed=order.seed, **options)
        prompts = [self._read(of)] if isinstance(of, Conversation) else [self._text_ids(p) for p in of.prompts]
        self.prompt = prompts[0]
        longest = max((prompt for prompt in prompts), key=lambda prompt: len(prompt.ids))
        self._check_length(longest)
        if "max_tokens" not in options:
            options["max_tokens"] = self._room(len(longest.ids), most_bytes // (order.copies * len(prompts)))
        if most_tokens is not None:
            options["max_tokens"] = min(options["max_tokens"], most_tokens)
        rows = [prompt for prompt in prompts for _ in range(order.copies)]
        language = self._asked().languages(1)[0]
        prompt: Any = rows if len(rows) > 1 else rows[0]
        return self.model.prepare(prompt, seed=order.seed, constraint=language, **options)

    def _read(self, of: Conversation) -> PromptIds:
        reads = self.model.tokenizer.reads
        thinking = of.thinking
        if thinking is not None and not reads("enable_thinking"):
            thinking, self.left_out = None, (*self.left_out, "thinking")
        self.template = {
            "enable_thinking": thinking,
            "tools": of.tools,
            "template_options": of.template_options,
            "sanitize_control_tokens": True,
        }
        return self.model.read(of.messages, **self.template)

    def _text_ids(self, prompt: str | list[int]) -> PromptIds:
        return self.model.read(self.model.text_ids(prompt) if isinstance(prompt, str) else prompt)

    def _check_length(self, prompt: PromptIds) -> None:
        limit, options = self.model.config.max_position_embeddings, self.order.options
        canvas = options.get("canvas_length") or self.model.config.canvas_length
        least = 1 if options.get("decoding") == "autoregressive" else canvas
        if (longest := len(prompt.ids)) + least > limit:
            seen = self.model.seeing.blocks(prompt.pictures) if prompt.pictures else []
            raise TooLong(
                f"This model's context is {limit} tokens. The prompt has {longest}, and {least} more are needed for an"
                f" answer. {told_of_pictures(seen, limit - least - longest)}Shorten the prompt."
            )

    def _room(self, longest: int, most_bytes: int) -> int:
        """Tokens of an answer of which nobody said how long it may be: what context and memory hold."""
        context = self.model.config.max_position_embeddings - longest
        fits = bisect.bisect_right(range(context), most_bytes, key=lambda more: held(self.model, longest + more))
        return max(fits, min(context, self.model.config.canvas_length))

    def _asked(self) -> Asked:
        pins, of = self.order.pins, self.order.of
        asked = {"tools": of.tools, "tool_choice": of.tool_choice} if isinstance(of, Conversation) else {}
        return Asked(constraint=_language(pins) if pins else None, json_schema=self.order.json_schema, **asked)

    def _start(self, prefixes: Prefixes) -> tuple[Any, list[int]]:
        """A prefix to go on from, and where to fork it for those who come later. Nothing of both for a batch; nor with
        a seed: a prompt in pieces is the same but for rounding, and a seed promises the same."""
        if not self._may_reuse or not isinstance(self.order.of, Conversation):
            return None, []
        cache, key = self._reused(prefixes) or self.request.network.make_cache(), self.request.keys[0]
        self.reused = cache.length
        return cache, [end for end in self._lasting_ends(key, self.order.of) if cache.length < end]

    @property
    def _may_reuse(self) -> bool:
        return len(self.rows) == 1 and isinstance(self.order.of, Conversation) and self.order.seed is None

    def _reused(self, prefixes: Prefixes) -> PrefixCache | None:
        """The longest prefix that was kept of this prompt."""
        return prefixes.longest(self.request.keys[0], self.request.network) if self._may_reuse else None

    def _lasting_ends(self, key: Key, of: Conversation) -> list[int]:
        """How many ids other conversations with this system prompt and these tools share, and how many this
        conversation's next turn."""
        system = [message for message in of.messages[:1] if message.get("role") in ("system", "developer")]
        others = [[*of.messages, {"role": "assistant", "content": "."}]]
        if system or of.tools:
            others.append([*system, {"role": "user", "content": "."}])
        found = []
        for messages in others:
            try:
                other = self.model.read(messages, **self.template)
                found.append(_common(key, other.key(self.request.settings.picture_mask)))
            except TokenizerError:  # a template that wants its turns in another order: nothing is kept there
                continue
        return found

    @property
    def _prompt_tokens(self) -> int:
        """Each prompt counts once, however many answers it gets."""
        return sum(map(len, self.request.prompts[:: self.order.copies]))

    def _echo(self) -> Iterator[Beat]:
        """The prompts, in front of their answers: with log-probabilities by the causal pass, where those are wanted."""
        of, copies = self.order.of, self.order.copies
        if not isinstance(of, Continuations) or not of.echo:
            return
        for index, prompt in enumerate(of.prompts):
            ids, rows = self.request.prompts[index * copies], range(index * copies, (index + 1) * copies)
            scores: list[tuple[int, float | None, Sequence[Any]]] = [(ids[0], None, ())]
            for part in self._scored(ids):
                tops = part.top or [()] * len(part.logprobs)
                scores += zip(ids[len(scores) :], part.logprobs, tops, strict=False)
                yield Beat(turn_is_over=True)
            text = prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)
            told = scores[1:] if isinstance(prompt, str) and self._begins(ids) else scores
            for row in rows:
                logprobs = self.rows[row].echo(text, told)
                yield Beat(news=(Said(row=row, block=0, text=text, thinking="", logprobs=logprobs),))

    def _begins(self, ids: list[int]) -> bool:
        """Whether the ids of a text begin with <bos>, which no text has."""
        return ids[0] == self.model.tokenizer.bos_id

    def _scored(self, ids: list[int]) -> Iterator[Scores]:
        """All ids but the first, chunk by chunk; none where no log-probabilities are wanted."""
        settings = self.request.settings
        if self.rows[0].scored and len(ids) > 1:
            chunk, top = settings.prefill_step_size, settings.top_logprobs
            yield from self._clocked(score_parts(self.model.network, ids, chunk=chunk, top=top))

    # ---------------------------------------------------------------------------------------------------- the events

    def _clocked(self, events: Iterator[T]) -> Generator[T, None, None]:
        began = time.perf_counter()
        for event in events:
            kind = "prefill" if isinstance(event, Prefilled | Scores) else "denoise"
            self.seconds[kind] += time.perf_counter() - began
            yield event
            began = time.perf_counter()

    def _ends_turn(self, event: Committed) -> bool:
        return self.request.settings.decoding == "diffusion" or event.index % TURN == TURN - 1

    def _drafts(self, event: Denoised) -> tuple[News, ...]:
        if self.order.drafts is None or isinstance(self.order.of, Gap):
            return ()
        closely = self.order.drafts == "tokens"
        best, accepted, entropy = map(np.array, (event.best, event.accepted, event.entropy))
        running = [row for row in range(len(self.rows)) if not self.rows[row].over]
        return tuple(
            self.rows[row].draft(row, event, best[row].tolist(), accepted[row].tolist(), entropy[row].tolist(), closely)
            for row in running
        )

    def _said(self, row: int, event: Committed, made: CanvasRow) -> Said | None:
        told = self.rows[row].commit(made, hidden=isinstance(self.order.of, Gap))
        if not made.steps or not any(told):
            return None
        text, thinking, logprobs = told
        return Said(row=row, block=event.index, text=text, thinking=thinking, logprobs=logprobs)

    def _rest(self, results: Sequence[Result]) -> Iterator[News]:
        """What waited until the end: what a gap was filled with."""
        for row, result in enumerate(results):
            if result.holes:
                yield Said(row=row, block=0, text=self.rows[row].fill(result.holes[0]), thinking="")

    def _ended(self) -> Ended:
        settings, request, of = self.request.settings, self.request, self.order.of
        tools = (isinstance(of, Conversation) and of.tools) or ()
        return Ended(
            answers=tuple(row.answer(tools) for row in self.rows),
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self.reused,
            departures=settings.departures | request.departures,
            tuning=self.model.network.tuning.fingerprint,
            seconds=dict(self.seconds),
            pictures=tuple(placed.picture.seen for placed in request.pictures[0]),
        )

    def _choose(self) -> Iterator[Beat]:
        """Among whole answers: nothing can be told before the end, and nobody else has a turn."""
        results = self.request.run(lambda request: self._clocked(request.events_among_others()))
        for number, (row, result) in enumerate(zip(self.rows, results, strict=True)):
            for canvas in result.canvases:
                row.commit(canvas, hidden=False)
            yield Beat(news=(Said(row=number, block=0, text=row.text, thinking=row.thinking),))
        yield from self._obey(Prefixes(0))
        yield Beat(news=(self._ended(),), turn_is_over=True)

    def _obey(self, prefixes: Prefixes) -> Iterator[Beat]:
        """Calls of strict functions that their schemas do not take are written anew, each as one that was asked for:
        behind what the answer said before it."""
        for number, row in enumerate(self.rows):
            start = 0
            while found := self.strict.broken(self.model.tokenizer, row.ids, start):
                begin, end, language = found
                if row.reason == "length" and row.ids[end - 1] != row.tokenizer.markers.end_tool_call:
                    break  # it was cut off, and is no call
                room = self.request.settings.max_tokens - len(row.ids) + end - begin
                try:
                    request = self._anew(number, row.ids[:begin], language, room)
                except DiffGemmaError:  # no room for the shortest that obeys
                    break
                ids: list[int] = []
                for event in self._clocked(request.events_among_others(self._reused(prefixes))):
                    if isinstance(event, Committed):
                        row.canvases, row.steps = row.canvases + 1, row.steps + event.rows[0].steps
                        ids += event.rows[0].ids
                    yield Beat(turn_is_over=isinstance(event, Prefilled | Committed))
                ids = ids[ids.index(row.ids[begin]) :]  # without a thought before
                row.ids[begin:end], row.written_anew = ids, row.written_anew + 1
                start = begin + len(ids)

    def _anew(self, number: int, said: list[int], language: Language, room: int) -> Request:
        """A call of at most `room` tokens behind what a row has said. Errors: DiffGemmaError when it needs more."""
        options = GenerationOptions(**self.order.options)
        for name in ("best_of", "logprobs", "retries"):
            options.pop(name, None)
        options["max_tokens"] = max(room, 1)
        prompt = replace(self.prompt, ids=[*self.prompt.ids, *said])
        return self.model.prepare(prompt, seed=self.request.seeds[number], constraint=language, **options)


class _Row:
    """What one row has said."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], order: Order, stop_ids: frozenset[int]):
        self.tokenizer, self.cut, self.stop_ids = tokenizer, Cut(order.stops), stop_ids
        self.scored = bool(order.options.get("logprobs"))
        self.tells_stop = isinstance(order.of, Continuations)  # with its log-probability: a text's end is part of it
        self.open_channel = tokenizer.opens_channel(prompt)
        self.ids: list[int] = []
        self.text = self.thinking = self.reason = ""
        self.shown = ("", "")  # by the run's own reader, before any stop
        self.canvases = self.steps = self.written_anew = 0
        self.logprobs: list[Logprob] = []

    @property
    def over(self) -> bool:
        return self.cut.found or bool(self.reason)

    def commit(self, made: CanvasRow, *, hidden: bool) -> tuple[str, str, tuple[Logprob, ...]]:
        """→ what became visible: text, thoughts, log-probabilities."""
        if self.over or not made.steps:
            return "", "", ()
        self.ids += made.ids
        self.canvases, self.steps, self.reason = self.canvases + 1, self.steps + made.steps, made.reason
        self.shown = (self.shown[0] + made.text, self.shown[1] + made.thinking)
        text = "" if hidden else self.cut.add(made.text, last=bool(made.reason))
        self.text, self.thinking = self.text + text, self.thinking + made.thinking
        ids = made.ids if made.stop_id is None or not self.tells_stop else (*made.ids, made.stop_id)
        tops, own = made.top_logprobs or [()] * len(ids), made.canvas_logprobs or [None] * len(ids)
        told = tuple(map(self._logprob, ids, made.logprobs or (), tops, own))
        self.logprobs += told
        return text, made.thinking, told

    def echo(self, text: str, scores: Iterable[tuple[int, float | None, Sequence[Any]]]) -> tuple[Logprob, ...]:
        """The prompt stands in front: its text, and of its tokens id, log-probability and the likeliest."""
        told = tuple(self._logprob(*score) for score in scores) if self.scored else ()
        self.text, self.logprobs = text, list(told)
        return told

    def fill(self, text: str) -> str:
        self.text = self.cut.add(text, last=True)
        return self.text

    def draft(
        self,
        row: int,
        event: Denoised,
        best: list[int],
        accepted: list[bool],
        entropy: list[float],
        closely: bool,
    ) -> Drafted:
        """The canvas of this row, as it is."""
        end = next((i for i, token in enumerate(best) if token in self.stop_ids), len(best))
        text, channel = self._spoken(best[:end])
        tokens = closely and tuple(
            (token, piece, round(nats, 4), sure)
            for token, piece, nats, sure in zip(best, self._pieces(best), entropy, accepted, strict=True)
        )
        return Drafted(
            row=row,
            block=event.index,
            step=event.step,
            steps=event.steps,
            text=text,
            channel=channel,
            temperature=event.temperature,
            accepted=event.accepted_count[row],
            mean_entropy=event.mean_entropy[row],
            settled=event.settled[row],
            end=end,
            tokens=tokens or None,
        )

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """What each id adds to the text. A character of several stands at the last of them; special ids add nothing."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(self.tokenizer.token_bytes[token] or b"")

    def _spoken(self, best: list[int]) -> tuple[str, Any]:
        """What these ids add to what is shown, and of which channel it is."""
        parts = self.tokenizer.split([*self.ids, *best], open_channel=self.open_channel)
        text, thinking = parts.text[len(self.shown[0]) :], (parts.thinking or "")[len(self.shown[1]) :]
        if text.strip() or not (thinking or parts.tool_calls):
            return text, "content"
        return (thinking, "reasoning") if thinking else (_arguments(parts.tool_calls[-1]), "tool")

    def _logprob(self, token: int, nats: float | None, top: Sequence[Any] = (), canvas: float | None = None) -> Logprob:
        likeliest = tuple((*self._spelled(i), value) for i, value in top)
        name, spelled = self._spelled(token)
        return Logprob(token=name, bytes=spelled, logprob=nats, top=likeliest, canvas_logprob=canvas)

    def _spelled(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        """A token as text and in bytes; half a character is told by its bytes."""
        known = self.tokenizer.token_bytes
        spelled = known[token] if token < len(known) else None
        if spelled is None:
            return self.tokenizer.piece(token), None
        try:
            return spelled.decode(), tuple(spelled)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), tuple(spelled)

    def answer(self, tools: Sequence[Mapping[str, Any]]) -> Answer:
        parts = self.tokenizer.split(self.ids, open_channel=self.open_channel)
        calls = tuple(typed_call(call, tools) for call in parts.tool_calls if call.get("name") is not None)
        reason: Any = "stop" if self.cut.found else self.reason or "stop"
        return Answer(
            text=self.text,
            thinking=self.thinking,
            tool_calls=calls,
            unread_calls=tuple(str(call.get("text", "")) for call in parts.tool_calls if call.get("name") is None),
            reason="tool_calls" if calls and reason == "stop" else reason,
            tokens=len(self.ids),
            thinking_tokens=self._thinking_tokens(),
            canvases=self.canvases,
            steps=self.steps,
            written_anew=self.written_anew,
            logprobs=tuple(self.logprobs) if self.scored else None,
            stop=self.cut.stop,
        )

    def _thinking_tokens(self) -> int:
        spans = self.tokenizer.markers.spans(self.ids, open_channel=self.open_channel)
        return sum(len(ids) for kind, ids in spans if kind in ("open", "<|channel>"))


class Cut:
    """Text up to the first of some stops. What may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.waiting = stops, ""
        self.stop: str | None = None  # the one that was found

    @property
    def found(self) -> bool:
        return self.stop is not None

    def add(self, text: str, *, last: bool) -> str:
        """→ what can be said with this text added."""
        if self.found:
            return ""
        whole = self.waiting + text
        if ends := [(at, stop) for stop in self.stops if (at := whole.find(stop)) >= 0]:
            (at, self.stop), self.waiting = min(ends), ""
            return whole[:at]
        most = 0 if last else max((_begun(whole, stop) for stop in self.stops), default=0)
        self.waiting = whole[len(whole) - most :]
        return whole[: len(whole) - most]


def held(model: DiffusionGemma, prefix: int) -> int:
    """Bytes of keys and values for one row with a prefix of that many tokens, and for a fork that outlives it."""
    return memory_needed(model.network.own, 0, prefix, forks=1) - STEP


def free_bytes(model: DiffusionGemma) -> int:
    """What the model and one step leave of this process's memory."""
    return max(model.memory_limit - weight_bytes(model.network) - STEP, 0)


def _begun(text: str, stop: str) -> int:
    """How much of a stop the text ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _common(a: Key, b: Key) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _language(pins: Pins) -> Any:
    return Draft.marked(pins.text, pins.mark, pins.holes).language()


def _arguments(call: dict[str, Any]) -> str:
    """A call that may not be finished, for people."""
    if call.get("name") is None:
        return str(call.get("text", "")).replace(QUOTE, '"')
    return f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})"
