"""Events → terminal: the live canvas, the plain stream, JSON lines.

A sink takes events one by one; `show` feeds them. Arrays of an event are lazy, and only a sink that draws reads them.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TextIO

from ..generation.events import CanvasRow, Committed, Denoised, Event, Finished, Prefilled
from ..pipeline.results import Decode, Result, event_json, only_row
from . import marks
from .canvas import Cell, Painter, wrap
from .console import console
from .screen import Screen, Terminal

FRAMES_PER_SECOND = 15
SHARE = 0.02  # of the time, at most, goes into drawing


class Sink(Protocol):
    def __call__(self, event: Event) -> None: ...
    def close(self) -> None: ...


def show(events: Iterable[Event], *sinks: Sink) -> Finished:
    """Feed every event to every sink; returns the last. The sinks are closed whatever happens, Ctrl-C included."""
    last = None
    try:
        for event in events:
            for sink in sinks:
                sink(event)
            last = event
    finally:
        for sink in sinks:
            sink.close()
    assert isinstance(last, Finished)
    return last


class Voice:
    """What of a committed canvas is said: the text, or the thoughts in front of the text that they led to."""

    def __init__(self, *, show_thinking: bool = False):
        self.show_thinking = show_thinking
        self.in_thought = False

    def __call__(self, event: Committed) -> str:
        if not self.show_thinking:
            return event.text
        said = ("" if self.in_thought or not event.thinking else "[thinking]\n") + event.thinking
        self.in_thought = self.in_thought or bool(said)
        if event.text and self.in_thought:
            said, self.in_thought = f"{said}\n[answer]\n", False
        return said + event.text


class Pace:
    """The same events, but the noise of a canvas and every step of it stay in sight for so long: a small model is too
    quick to be seen. `slept` are the seconds that went into waiting."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.slept = seconds, 0.0

    def __call__(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            yield event
            if isinstance(event, Denoised) or (isinstance(event, Prefilled) and event.tokens == event.total):
                self.rest()

    def rest(self) -> None:
        if self.seconds:
            time.sleep(self.seconds)
            self.slept += self.seconds


class BareText:
    """Text and nothing else, a committed canvas at a time: for pipes, files and dumb terminals."""

    def __init__(self, file: TextIO, voice: Voice | None = None):
        self.file, self.voice, self.last = file, voice or Voice(), "\n"

    def __call__(self, event: Event) -> None:
        if isinstance(event, Committed) and (said := self.voice(event)):
            self.file.write(said)
            self.file.flush()
            self.last = said[-1]

    def close(self) -> None:
        if self.last != "\n":
            self.file.write("\n")
        self.file.flush()


class JsonLines:
    """One JSON object a line for every event, drafts included; `decode` is ids → text."""

    def __init__(self, file: TextIO, decode: Decode):
        self.file, self.decode = file, decode

    def __call__(self, event: Event) -> None:
        self.file.write(json.dumps(event_json(event, self.decode), ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        pass


class Live:
    """The canvas as it denoises, from its noise on: the first step and the last, and those between them at most 15
    times a second and for at most a fiftieth of the time; or every step. `noise` gives the ids a canvas starts from."""

    def __init__(
        self,
        screen: Screen,
        decode: Decode,
        *,
        color: bool = True,
        every_step: bool = False,
        voice: Voice | None = None,
        pace: Pace | None = None,
        noise: Callable[[int], list[int]] | None = None,
    ):
        self.screen, self.painter = screen, Painter(decode, color)
        self.pace, self.voice, self.noise = pace or Pace(), voice or Voice(), noise
        self.every_step = every_step or self.pace.seconds > 0
        self.started: float | None = None  # when the prompt was read
        self.due, self.cost, self.kept = 0.0, 0.001, 0  # seconds, seconds a drawing, committed tokens

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Prefilled):
            if event.tokens == event.total:
                self.started = now
                self._draw_noise(0)
            elif now >= self.due:
                told = f"reading the prompt {event.tokens}/{event.total}"
                self.screen.draw([[(told[: self._room()], "status")]])
                self.due = now + 1 / FRAMES_PER_SECOND
        elif isinstance(event, Denoised):
            if now >= self.due or self.every_step or event.step == 0 or event.settled[0]:
                self._draw(event)
        elif isinstance(event, Committed):
            self.kept += len(event.rows[0].ids)
            if event.rows[0].canvas_logprobs is not None:
                self._draw_scores(event.rows[0])
            self.painter.forget()
            self.screen.commit(self.voice(event))
            if not event.rows[0].reason:
                self._draw_noise(event.index + 1)

    def close(self) -> None:
        self.screen.close()

    def _draw_scores(self, row: CanvasRow) -> None:
        """The last frame of a canvas whose log-probabilities were asked for: unlikely tokens are marked."""
        logprobs = row.logprobs or ()
        lines = wrap(marks.cells(row.ids, logprobs, self.painter), self.screen.size[0])
        mean = sum(logprobs) / max(len(logprobs), 1)
        self.screen.draw([*lines[-(self.screen.size[1] - 3) :], [(marks.likelihood(mean), "status")]])

    def _draw_noise(self, index: int) -> None:
        """What a canvas is before its first step."""
        if self.noise is not None:
            ids = self.noise(index)
            self._show(self.painter.noise(ids), f"step 0 · noise · canvas {index + 1}")

    def _draw(self, event: Denoised) -> None:
        arrays = (event.best, event.next_canvas, event.accepted, event.entropy)
        best, noise, accepted, entropy = map(only_row, arrays)
        begun = time.perf_counter()  # the arrays are here: what follows is the cost of drawing
        pinned = None if event.pinned is None else only_row(event.pinned)
        self._show(self.painter.cells(best, noise, accepted, entropy, pinned), self._status(event))
        self.cost = min(time.perf_counter() - begun, 2 * self.cost)  # a hiccup is not the rule
        self.due = begun + max(1 / FRAMES_PER_SECOND, self.cost / SHARE)

    def _show(self, cells: list[Cell], status: str) -> None:
        columns, rows = self.screen.size
        lines = wrap(cells, columns)
        if len(lines) > rows - 2:
            hidden = len(lines) - (rows - 3)
            lines = [[(f"… {hidden} more lines"[:columns], "status")], *lines[hidden:]]
        self.screen.draw([*lines, [(status[: self._room()], "status")]])

    def _room(self) -> int:
        """Columns for a line of status."""
        return max(self.screen.size[0] - 3, 1)

    def _status(self, event: Denoised) -> str:
        accepted, seconds = event.accepted_count[0], self._seconds()
        parts = [f"step {event.step + 1}/{event.steps}", f"accepted {accepted}/{event.best.shape[1]}"]
        parts += [f"entropy {event.mean_entropy[0]:.3f}"]
        if seconds > 0:
            parts += [f"{(self.kept + accepted) / seconds:.0f} tokens/s"]
        parts += [f"canvas {event.index + 1}"]
        text = parts[0]
        for part in parts[1:]:
            if len(text) + len(part) + 3 <= self._room():
                text += " · " + part
        return text

    def _seconds(self) -> float:
        """Since the prompt was read, without the pauses."""
        return 0.0 if self.started is None else time.perf_counter() - self.started - self.pace.slept


def on_stdout(
    decode: Decode,
    *,
    events: bool = False,
    bare: bool = False,
    show_thinking: bool = False,
    pace: Pace | None = None,
    noise: Callable[[int], list[int]] | None = None,
) -> Sink:
    """The live canvas on a terminal, bare text elsewhere, JSON lines if asked for."""
    voice, out = Voice(show_thinking=show_thinking), console()
    if events:
        return JsonLines(sys.stdout, decode)
    if bare or not out.is_terminal or out.is_dumb_terminal:
        return BareText(sys.stdout, voice)
    return Live(Terminal(out), decode, color=not out.no_color, voice=voice, pace=pace, noise=noise)


def summary(result: "Result") -> str:
    """One line: how much, how fast, in how many steps, what departed from the reference, and a hint if there is one."""
    s = result.statistics
    diffusion = s.decoding == "diffusion"
    parts = [
        f"{s.generated_tokens} tokens in {s.denoise_seconds + s.commit_seconds:.2f} s",
        f"{s.tokens_per_second:.1f} tokens/s",
        *(_canvases(result) if diffusion else ["token by token"]),
        f"peak {s.peak_memory_bytes / 1e9:.2f} GB",
        f"seed {result.seed}",
    ]
    if s.read_bytes:
        parts.append(f"read {s.read_bytes / 1e9:.2f} GB of experts, waited {s.waited_seconds:.2f} s for them")
    if result.constraint:
        obeyed = result.constraint
        how = "token by token" if obeyed.log_probability is None else f"log Z {obeyed.log_probability:.2f}"
        parts.append(f"obeyed, {how}, {obeyed.states} states, {obeyed.classes} classes")
        parts += [f"compiled in {obeyed.compile_seconds:.2f} s", *obeyed.notes]
    if result.avg_logprob is not None:
        parts.append(f"log-probability {marks.likelihood(result.avg_logprob)}")
    if s.attempts > 1:
        parts.append(f"{s.attempts:.3g} answers drawn")
    parts += [f"{'not the reference: ' * diffusion}{name}={value}" for name, value in s.departures.items()]
    parts += ["stopped at --max-tokens"] * (result.finish_reason == "length")
    return " · ".join(parts + [result.hint] * bool(result.hint))


def _canvases(result: "Result") -> list[str]:
    s = result.statistics
    steps = [canvas.steps for canvas in result.canvases]
    unsettled = sum(not (canvas.settled or canvas.early) for canvas in result.canvases)
    return [
        f"{sum(steps) / max(len(steps), 1):.1f} steps a canvas"
        + f" ({unsettled} not settled)" * bool(unsettled)
        + f" ({s.early_canvases} ended early)" * bool(s.early_canvases),
        f"{s.seconds_per_step:.3f} s a step",
    ]
