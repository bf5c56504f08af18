"""What a run gives people: text, thoughts and calls of every row, and the same as plain data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx

from ..generation.events import CanvasRow, Committed, Denoised, Event, Finished, Statistics
from ..text.tokenizer import Tokenizer

Decode = Callable[[list[int]], str]  # ids → text


@dataclass(frozen=True, kw_only=True)
class Result:
    """One prompt's answer."""

    text: str  # without thinking and tool calls
    thinking: str | None
    tool_calls: list[dict[str, Any]]  # {"name": …, "arguments": {…}}
    tokens: tuple[int, ...]  # everything generated, without the stop id
    finish_reason: str  # "stop" or "length"
    canvases: tuple[CanvasRow, ...]
    stats: Statistics  # of the whole run: in a batch, of all rows together
    seed: int | None  # None when the noise was recorded


class Answer:
    """What one row has said so far."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int]):
        self.tokenizer = tokenizer
        self.open_channel = tokenizer is not None and tokenizer.opens_channel(prompt)
        self.tokens: list[int] = []
        self.canvases: list[CanvasRow] = []
        self.shown = ("", "")

    def add(self, row: CanvasRow) -> tuple[str, str]:
        """Take in a canvas; returns the text and the thoughts that became visible. Half a UTF-8 character waits for
        its rest."""
        if row.steps:
            self.canvases.append(row)
        self.tokens += row.ids
        if self.tokenizer is None:
            return "", ""
        parts = self.tokenizer.split(self.tokens, open_channel=self.open_channel)
        text, thinking = (t if row.reason else t.rstrip("\ufffd") for t in (parts.text, parts.thinking or ""))
        shown, self.shown = self.shown, (text, thinking)
        return text[len(shown[0]) :], thinking[len(shown[1]) :]

    def result(self, reason: str, statistics: Statistics, seed: int | None) -> Result:
        text, thinking, calls = "", None, []
        if self.tokenizer is not None:
            parts = self.tokenizer.split(self.tokens, open_channel=self.open_channel)
            text, thinking, calls = parts.text, parts.thinking, parts.tool_calls
        return Result(
            text=text,
            thinking=thinking,
            tool_calls=calls,
            tokens=tuple(self.tokens),
            finish_reason=reason,
            canvases=tuple(self.canvases),
            stats=statistics,
            seed=seed,
        )


def result_json(result: Result) -> dict[str, Any]:
    """Everything about a reply as plain data; seconds and bytes are in the names."""
    return {
        "text": result.text,
        "thinking": result.thinking,
        "tool_calls": result.tool_calls,
        "ids": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "canvases": [asdict(canvas) for canvas in result.canvases],
        "statistics": statistics_json(result.stats),
    }


def statistics_json(statistics: Statistics) -> dict[str, Any]:
    derived = ("seconds_per_step", "tokens_per_second")
    return asdict(statistics) | {name: getattr(statistics, name) for name in derived}


def event_json(event: Event, decode: Decode) -> dict[str, Any]:
    """An event of one prompt as plain data. `accepted` and `entropy` have one entry a position (nats)."""
    kind = {"event": type(event).__name__.lower()}
    if isinstance(event, Denoised):
        best = only_row(event.best)
        counted = {"canvas": event.canvas, "step": event.step, "steps": event.steps, "temperature": event.temperature}
        arrays = {"accepted": only_row(event.accepted), "entropy": only_row(event.entropy)}
        return kind | counted | {"settled": event.settled[0], "text": decode(best), "best": best} | arrays
    if isinstance(event, Committed):
        return kind | {"canvas": event.canvas, "text": event.text, "thinking": event.thinking} | asdict(event.rows[0])
    if isinstance(event, Finished):
        return kind | {"reason": event.reasons[0], "statistics": statistics_json(event.statistics)}
    return kind | asdict(event)


def only_row(array: mx.array) -> list[Any]:
    """The only prompt's row [L] of an array [1, L]."""
    return cast(list[Any], array[0].tolist())
