"""What a run gives people: text, thoughts and calls of every row, and the same as plain data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import mlx.core as mx

from ..generation.drawing import Decode, text_html
from ..generation.events import CanvasRow, Committed, Denoised, Event, Finished, Statistics
from ..text.pictures.images import Seen
from ..text.tokenizer import Growing, Tokenizer
from .machine.pace import Pace
from .obeying.constraints import Compiled, Obeyed, obeyed
from .obeying.drafts import Draft
from .prompts import Placed


@dataclass(frozen=True, kw_only=True)
class Result:
    """One prompt's answer."""

    text: str  # without thinking and tool calls
    thinking: str | None
    tool_calls: list[dict[str, Any]]  # {"name": …, "arguments": {…}}
    tokens: tuple[int, ...]  # everything generated, without the stop id
    finish_reason: str  # "stop" or "length"
    canvases: tuple[CanvasRow, ...]
    statistics: Statistics  # of the whole run: in a batch, of all rows together
    seed: int | None  # None when the noise was recorded
    constraint: Obeyed | None = None  # how it was held to its constraint, if there was one
    holes: tuple[str, ...] | None = None  # what stands in the holes of a text that was filled in; `text` is all of it
    pictures: tuple[Seen, ...] = ()  # of the prompt: to what each was scaled, and how many tokens it took
    hint: str = ""  # whether the other decoding would have been faster, once this process has measured both

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        """Log-probability of every token given its left, a stop id included, nats; None without `logprobs`."""
        parts = [canvas.logprobs for canvas in self.canvases if canvas.logprobs is not None]
        return tuple(p for part in parts for p in part) if parts else None

    @property
    def avg_logprob(self) -> float | None:
        """Their mean, nats a token."""
        logprobs = self.logprobs
        return sum(logprobs) / len(logprobs) if logprobs else None

    def _repr_html_(self) -> str:
        """The reply, in a notebook."""
        steps = ", ".join(str(canvas.steps) for canvas in self.canvases)
        note = f"{len(self.tokens)} tokens · steps: {steps} · {self.finish_reason} · seed {self.seed}"
        return text_html(self.text, note)


class Answers:
    """A run's reader (see generation.events): ids → what every row has said so far."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompts: Sequence[list[int]],
        seeds: Sequence[int | None],
        *,
        constraints: Sequence[Compiled | None] | None = None,
        pictures: Sequence[Sequence[Placed]] = (),
        draft: Draft | None = None,
        departures: dict[str, Any] | None = None,
        pace: Pace | None = None,
    ):
        self.tokenizer, self.seeds, self.draft, self.departures = tokenizer, seeds, draft, departures or {}
        self.pace = pace
        self.constraints = constraints or [None] * len(prompts)
        self.pictures = pictures or [()] * len(prompts)
        self._answers = [_Answer(tokenizer, prompt) for prompt in prompts]

    def read(self, row: int, ids: tuple[int, ...], *, last: bool) -> tuple[str, str]:
        first = not self._answers[row].tokens
        text, thinking = self._answers[row].read(ids, last=last)
        if self.draft:
            text = self.draft.before * first + text + self.draft.after * last
        return text, thinking

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids) if self.tokenizer is None else self.tokenizer.decode(ids)

    def conclude(self, row: int, reason: str, canvases: tuple[CanvasRow, ...], statistics: Statistics) -> Result:
        answer = self._answers[row]
        text, thinking, calls = answer.parts()
        made, draft = self.constraints[row], self.draft
        return Result(
            text=draft.whole(text) if draft else text,
            thinking=thinking,
            tool_calls=calls,
            tokens=tuple(answer.tokens),
            finish_reason=reason,
            canvases=canvases,
            statistics=replace(statistics, departures=statistics.departures | self.departures),
            seed=self.seeds[row],
            pictures=tuple(placed.picture.seen for placed in self.pictures[row]),
            hint=self.pace.hint(canvases, statistics) if self.pace and len(self.seeds) == 1 else "",
            constraint=obeyed(made, canvases) if made else None,
            holes=draft.filled(text) if draft else None,
        )


class _Answer:
    """What one row has said so far."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int]):
        self.tokenizer = tokenizer
        self.open_channel = tokenizer is not None and tokenizer.opens_channel(prompt)
        self.tokens: list[int] = []
        self.shown = ("", "")
        self._growing = None if tokenizer is None else Growing(tokenizer.decode)

    def read(self, ids: tuple[int, ...], *, last: bool) -> tuple[str, str]:
        """The text and the thoughts that became visible. Half a UTF-8 character waits for its rest, and so does what
        it spoils: a run of bytes is one or none. What is shown is never taken back."""
        self.tokens += ids
        text, thinking, _ = self.parts(growing=None if last else self._growing)
        now = (text, thinking or "") if last else (text.rstrip("\ufffd"), (thinking or "").rstrip("\ufffd"))
        shown = self.shown
        self.shown = (_grown(shown[0], now[0], last=last), _grown(shown[1], now[1], last=last))
        return self.shown[0][len(shown[0]) :], self.shown[1][len(shown[1]) :]

    def parts(self, growing: Growing | None = None) -> tuple[str, str | None, list[dict[str, Any]]]:
        """Text, thinking, tool calls."""
        if self.tokenizer is None:
            return "", None, []
        parts = self.tokenizer.split(self.tokens, open_channel=self.open_channel, growing=growing)
        return parts.text, parts.thinking, parts.tool_calls


def _grown(shown: str, now: str, *, last: bool) -> str:
    """What is shown next: `now`, if it goes on from what is shown."""
    if now.startswith(shown):
        return now
    return shown + now[len(shown) :] if last else shown


# --------------------------------------------------------------------------------------------------- as plain data


def result_json(result: Result) -> dict[str, Any]:
    """Everything about a reply as plain data; seconds and bytes are in the names."""
    constrained = {"constraint": asdict(result.constraint)} if result.constraint else {}
    filled = {"holes": list(result.holes)} if result.holes is not None else {}
    return (
        constrained
        | filled
        | _pictures_json(result.pictures)
        | {
            "text": result.text,
            "thinking": result.thinking,
            "tool_calls": result.tool_calls,
            "ids": list(result.tokens),
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            "avg_logprob": result.avg_logprob,
            "hint": result.hint,
            "canvases": [_canvas_json(canvas) for canvas in result.canvases],
            "statistics": statistics_json(result.statistics),
        }
    )


def _pictures_json(pictures: Sequence[Seen]) -> dict[str, Any]:
    return {"pictures": [asdict(picture) for picture in pictures]} if pictures else {}


def statistics_json(statistics: Statistics) -> dict[str, Any]:
    derived = ("seconds_per_step", "tokens_per_second")
    return asdict(statistics) | {name: getattr(statistics, name) for name in derived}


def event_json(event: Event, decode: Decode) -> dict[str, Any]:
    """An event of one prompt as plain data. `accepted` and `entropy` have one entry a position (nats)."""
    kind = {"event": type(event).__name__.lower()}
    if isinstance(event, Denoised):
        best = only_row(event.best)
        counted = {"canvas": event.index, "step": event.step, "steps": event.steps, "temperature": event.temperature}
        arrays = {"accepted": only_row(event.accepted), "entropy": only_row(event.entropy)}
        if event.pinned is not None:
            arrays["pinned"] = only_row(event.pinned)
        return kind | counted | {"settled": event.settled[0], "text": decode(best), "best": best} | arrays
    if isinstance(event, Committed):
        spoken = {"text": event.text, "thinking": event.thinking}
        return kind | {"canvas": event.index} | spoken | _canvas_json(event.rows[0])
    if isinstance(event, Finished):
        ended = {"reason": event.reasons[0], "statistics": statistics_json(event.statistics)}
        return kind | ended | _pictures_json(event.result.pictures if event.results and event.result else ())
    return kind | asdict(event)


def only_row(array: mx.array) -> list[Any]:
    """The only prompt's row [L] of an array [1, L]."""
    return cast(list[Any], array[0].tolist())


def _canvas_json(canvas: CanvasRow) -> dict[str, Any]:
    """Without its text, which stands beside it, and without scores that were not asked for."""
    return {k: v for k, v in asdict(canvas).items() if k not in ("text", "thinking") and v is not None}
