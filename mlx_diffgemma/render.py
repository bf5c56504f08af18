"""Events → terminal: the live canvas, the plain stream, JSON lines, and recordings of what was seen.

A sink takes events one by one; `show` feeds them. Arrays of an event are lazy, and only a sink that draws reads them.
"""

import html
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from rich.cells import cell_len, split_graphemes
from rich.console import Console

from .engine import Committed, Denoised, Event, Finished, Prefilled, Statistics
from .errors import ConfigError

if TYPE_CHECKING:
    import mlx.core as mx

    from .pipeline import Result

Glyph = tuple[str, int]  # what the eye takes for one character, and how many cells it fills
Cell = tuple[str, int, str]  # the same with its style
Run = tuple[str, str]  # text, style
Line = list[Run]
Decode = Callable[[list[int]], str]

FRAMES_PER_SECOND = 15
SHARE = 0.02  # of the time, at most, goes into drawing
SURE, NOISY = 0.1, 1.5  # nats: below, a position not accepted is nearly plain; above, it is noise
NOISE = "·:∙;~+*-=^°'"
# style → SGR in colour, SGR without colour, colour in a recording. `likely` and `unsure` grow dimmer with entropy.
STYLES = {
    "": ("", "", "#d8dee9"),
    "changed": ("1;32", "1", "#a3e635"),
    "likely": ("2", "2", "#a0a8b7"),
    "unsure": ("90", "2", "#6b7280"),
    "noise": ("2;90", "2", "#454c59"),
    "status": ("36", "", "#5eb7c9"),
}


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


def with_thinking(events: Iterable[Event]) -> Iterator[Event]:
    """The same events with the thoughts in front of the text that they led to."""
    thinking = False
    for event in events:
        if isinstance(event, Committed):
            text = ("" if thinking or not event.thinking else "[thinking]\n") + event.thinking
            thinking = thinking or bool(text)
            if event.text and thinking:
                text, thinking = f"{text}\n[answer]\n", False
            event = replace(event, text=text + event.text)
        yield event


def paced(events: Iterable[Event], seconds: float) -> Iterator[Event]:
    """The same events, but every step stays in sight for so long: a small model is too quick to be seen."""
    for event in events:
        yield event
        if isinstance(event, Denoised):
            time.sleep(seconds)


class Plain:
    """Bare text, a committed canvas at a time: for pipes, files and dumb terminals."""

    def __init__(self, file: TextIO):
        self.file, self.last = file, "\n"

    def __call__(self, event: Event) -> None:
        if isinstance(event, Committed) and event.text:
            self.file.write(event.text)
            self.file.flush()
            self.last = event.text[-1]

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


def event_json(event: Event, decode: Decode) -> dict[str, Any]:
    """An event of one prompt as plain data. `accepted` and `entropy` have one entry a position (nats)."""
    kind = {"event": type(event).__name__.lower()}
    if isinstance(event, Denoised):
        best = _row(event.best)
        counted = {"canvas": event.canvas, "step": event.step, "steps": event.steps, "temperature": event.temperature}
        arrays = {"accepted": _row(event.accepted), "entropy": _row(event.entropy)}
        return kind | counted | {"settled": event.settled[0], "text": decode(best), "best": best} | arrays
    if isinstance(event, Committed):
        return kind | {"canvas": event.canvas, "text": event.text, "thinking": event.thinking} | asdict(event.rows[0])
    if isinstance(event, Finished):
        return kind | {"reason": event.reasons[0], "statistics": statistics_json(event.statistics)}
    return kind | asdict(event)


def _row(array: "mx.array") -> list[Any]:
    """The only prompt's row [L] of an array [1, L]."""
    return cast(list[Any], array[0].tolist())


def result_json(result: "Result") -> dict[str, Any]:
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


def summary(result: "Result") -> str:
    """One line: how much, how fast, in how many steps, and what departed from the reference."""
    s = result.stats
    steps = [canvas.steps for canvas in result.canvases]
    unsettled = sum(not canvas.settled for canvas in result.canvases)
    parts = [
        f"{s.generated_tokens} tokens in {s.denoise_seconds + s.commit_seconds:.2f} s",
        f"{s.tokens_per_second:.1f} tokens/s",
        f"{sum(steps) / max(len(steps), 1):.1f} steps a canvas" + f" ({unsettled} not settled)" * bool(unsettled),
        f"{s.seconds_per_step:.3f} s a step",
        f"peak {s.peak_memory_bytes / 1e9:.2f} GB",
        f"seed {result.seed}",
    ]
    departures = [f"not the reference: {name}={value}" for name, value in s.departures.items()]
    return " · ".join(parts + departures + ["stopped at --max-tokens"] * (result.finish_reason == "length"))


# --- The live canvas: a painter turns ids into cells, a screen keeps them where they are. ---


class Screen(Protocol):
    """Where a canvas is drawn: text that stays, and under it lines that the next drawing replaces."""

    @property
    def size(self) -> tuple[int, int]: ...  # columns, rows
    def draw(self, lines: list[Line]) -> None: ...
    def commit(self, text: str) -> None: ...
    def close(self) -> None: ...


class Live:
    """The canvas as it denoises, at most 15 times a second and for at most a fiftieth of the time; or every step."""

    def __init__(self, screen: Screen, decode: Decode, *, color: bool = True, every_step: bool = False):
        self.screen, self.painter, self.every_step = screen, Painter(decode, color), every_step
        self.started: float | None = None
        self.due, self.cost, self.kept = 0.0, 0.001, 0  # seconds, seconds a drawing, committed tokens

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Committed):
            self.kept += len(event.rows[0].ids)
            self.painter.forget()
            self.screen.commit(event.text)
        elif isinstance(event, Prefilled) and now >= self.due:
            told = f"reading the prompt {event.tokens}/{event.total}"
            self.screen.draw([[(told[: self.screen.size[0] - 3], "status")]])
            self.due = now + 1 / FRAMES_PER_SECOND
        elif isinstance(event, Denoised):
            self.started = self.started or now
            if now >= self.due or self.every_step:
                self._draw(event, now - self.started)

    def close(self) -> None:
        self.screen.close()

    def _draw(self, event: Denoised, seconds: float) -> None:
        best, current, accepted, entropy = map(_row, (event.best, event.current, event.accepted, event.entropy))
        begun = time.perf_counter()  # the arrays are here: what follows is the cost of drawing
        columns, rows = self.screen.size
        lines = wrap(self.painter.cells(best, current, accepted, entropy), columns)
        if len(lines) > rows - 2:
            hidden = len(lines) - (rows - 3)
            lines = [[(f"… {hidden} more lines"[:columns], "status")], *lines[hidden:]]
        lines.append([(self._status(event, seconds, columns - 3), "status")])
        self.screen.draw(lines)
        self.cost = min(time.perf_counter() - begun, 2 * self.cost)  # a hiccup is not the rule
        self.due = begun + max(1 / FRAMES_PER_SECOND, self.cost / SHARE)

    def _status(self, event: Denoised, seconds: float, room: int) -> str:
        accepted = event.accepted_count[0]
        parts = [f"step {event.step + 1}/{event.steps}", f"accepted {accepted}/{event.best.shape[1]}"]
        parts += [f"entropy {event.mean_entropy[0]:.3f}"]
        if seconds > 0:
            parts += [f"{(self.kept + accepted) / seconds:.0f} tokens/s"]
        parts += [f"canvas {event.canvas + 1}"]
        text = parts[0]
        for part in parts[1:]:
            if len(text) + len(part) + 3 <= room:
                text += " · " + part
        return text[: max(room, 1)]


class Painter:
    """Ids of one canvas and how certain they are → cells."""

    def __init__(self, decode: Decode, color: bool = True):
        self.decode, self.color = decode, color
        self.before: list[int] = []  # `best` as last drawn
        self.glyphs = lru_cache(maxsize=16384)(self._glyphs)

    def forget(self) -> None:
        """A new canvas begins: nothing has changed yet."""
        self.before = []

    def cells(self, best: list[int], current: list[int], accepted: list[bool], entropy: list[float]) -> list[Cell]:
        """What was accepted is plain, what changed stands out, the rest fades with its entropy into noise."""
        before = self.before or best
        cells: list[Cell] = []
        for i, glyphs in enumerate(self._pieces(best)):
            if accepted[i] or entropy[i] < NOISY:
                style = "" if accepted[i] else "likely" if entropy[i] < SURE else "unsure"
                style = "changed" if best[i] != before[i] else style
                cells += [(text, size, style) for text, size in glyphs]
            else:
                width = sum(size for _, size in glyphs) or 1
                cells += [(self._noise(current[i], k), 1, "noise") for k in range(width)]
        self.before = best
        return cells

    def _noise(self, ident: int, k: int) -> str:
        """A glyph that stands for a random id. Not its text: that would push the words about."""
        return NOISE[(ident + 5 * k) % len(NOISE)] if self.color else NOISE[0]

    def _pieces(self, ids: list[int]) -> list[Sequence[Glyph]]:
        """The glyphs of each id. Bytes of one character are decoded together and shown at the first of them."""
        pieces: list[Sequence[Glyph]] = [self.glyphs((i,)) for i in ids]
        start = 0
        for end in range(len(ids) + 1):
            if end < len(ids) and any(text == "\ufffd" for text, _ in pieces[end]):
                continue
            if end - start > 1:
                pieces[start:end] = [self.glyphs(tuple(ids[start:end]))] + [()] * (end - start - 1)
            start = end + 1
        return pieces

    def _glyphs(self, ids: tuple[int, ...]) -> Sequence[Glyph]:
        """Decoded behind themselves, for a tokenizer strips the blank in front of a first word."""
        once = self.decode(list(ids))
        return glyphs(self.decode(list(ids * 2))[len(once) :])


def glyphs(text: str) -> list[Glyph]:
    """Printable text as (character, cells); newlines have no width, control characters are left out."""
    found: list[Glyph] = []
    for line in harmless(text).splitlines(keepends=True):
        spans, _ = split_graphemes(line.rstrip("\n"))
        found += [(line[start:end], size) for start, end, size in spans]
        found += [("\n", 0)] * line.endswith("\n")
    return found


def harmless(text: str) -> str:
    """Without control characters: a model's words may not move the cursor."""
    text = text.replace("\t", "    ")
    return "".join(c for c in text if c == "\n" or not (c < " " or "\x7f" <= c <= "\x9f" or c in "\u2028\u2029"))


def wrap(cells: Iterable[Cell], columns: int) -> list[Line]:
    """Cells → lines of at most `columns` cells, broken at blanks and between wide characters if possible."""
    lines: list[list[Cell]] = [[]]
    used = cut = 0  # cells used in the last line; how many of its entries may stay when it is broken
    for cell in cells:
        text, size, _ = cell
        if text == "\n":
            lines.append([])
            used = cut = 0
            continue
        if used + size > columns:
            if text == " ":  # a blank at the edge becomes the break
                lines.append([])
                used = cut = 0
                continue
            rest = lines[-1][cut:] if cut else []
            if sum(entry[1] for entry in rest) + size > columns:
                rest = []
            lines[-1:] = [lines[-1][: len(lines[-1]) - len(rest)], rest]
            used, cut = sum(entry[1] for entry in rest), 0
        lines[-1].append(cell)
        used += size
        if text == " " or size > 1:
            cut = len(lines[-1])
    return [_runs(line) for line in lines]


def _runs(cells: list[Cell]) -> Line:
    runs: Line = []
    for text, _, style in cells:
        if runs and runs[-1][1] == style:
            runs[-1] = (runs[-1][0] + text, style)
        else:
            runs.append((text, style))
    return runs


def ansi(line: Line, color: bool) -> str:
    """A line with its styles as terminal codes."""
    return "".join(f"\x1b[{code}m{text}\x1b[0m" if (code := STYLES[style][not color]) else text for text, style in line)


class Terminal:
    """The lower rows of a terminal, redrawn in place. What is committed above them is ordinary scrollback."""

    def __init__(self, console: Console):
        self.console, self.color = console, not console.no_color
        self.tail = ""  # committed text after its last newline: the cursor returns to its end
        self.drawn: list[int] = []  # cells in each line on show

    @property
    def size(self) -> tuple[int, int]:
        return self.console.size.width, self.console.size.height

    def draw(self, lines: list[Line]) -> None:
        text = ("\n" if self.tail else "") + "\n".join(ansi(line, self.color) for line in lines)
        columns = self.size[0]
        erased = self._erased()
        self.drawn = [min(sum(cell_len(text) for text, _ in line), columns) for line in lines]
        # As one picture, without the cursor, and without wrapping: terminals differ about the width of some emoji.
        self._write(f"\x1b[?2026h\x1b[?25l{erased}\x1b[?7l{text}\x1b[?7h\x1b[?2026l")

    def commit(self, text: str) -> None:
        text = harmless(text)
        self._write(self._erased() + text)
        self.drawn = []
        self.tail = (self.tail + text).rpartition("\n")[2]

    def close(self) -> None:
        self._write(self._erased() + ("\n" if self.tail else "") + "\x1b[?25h")
        self.drawn, self.tail = [], ""

    def _erased(self) -> str:
        """Codes that clear what was drawn, also after the window changed its width and rewrapped it."""
        if not self.drawn:
            return ""
        columns = self.size[0]
        rows = sum(max(1, -(-cells // columns)) for cells in self.drawn)
        codes = "\r\x1b[K" + "\x1b[A\x1b[K" * (rows - 1)  # row by row: tmux keeps what is cleared from its top corner
        if self.tail:  # back to its end; its last glyph is written anew, for only writing fills a row to the brim
            at, last = _end(self.tail, columns)
            codes += "\x1b[A" + (f"\x1b[{at}C" if at else "") + last
        return codes

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()


@lru_cache(maxsize=2)
def _end(text: str, columns: int) -> tuple[int, str]:
    """The column of the last glyph of `text`, in a terminal that wraps at `columns`, and that glyph."""
    at, last, width = 0, "", 0
    for glyph, size in glyphs(text):
        at = at + width if at + width + size <= columns else 0
        last, width = glyph, size
    return at, last


def on_stdout(decode: Decode, *, events: bool = False, bare: bool = False) -> Sink:
    """The live canvas on a terminal, bare text elsewhere, JSON lines if asked for."""
    console = Console()
    if events:
        return JsonLines(sys.stdout, decode)
    if bare or not console.is_terminal or console.is_dumb_terminal:
        return Plain(sys.stdout)
    return Live(Terminal(console), decode, color=not console.no_color)


# --- Recordings: the same frames in a file. ---


class Recording:
    """Keeps what is drawn and writes it to FILE.svg or .html, which move by themselves, or to FILE.cast.

    A cast keeps the time; the others show a picture for a fifth of a second at least, or nobody would see it.
    """

    def __init__(self, path: str | Path, columns: int = 80):
        self.path, self.columns = Path(path), columns
        if self.path.suffix not in (".svg", ".html", ".cast"):
            raise ConfigError(f"cannot record to {path}: expected a name ending in .svg, .html or .cast.")
        if not self.path.absolute().parent.is_dir():
            raise ConfigError(f"cannot record to {path}: there is no folder {self.path.parent}.")
        self.text, self.kept, self.begun = "", list[Line](), 0.0
        self.frames: list[tuple[float, list[Line]]] = []

    @property
    def size(self) -> tuple[int, int]:
        return self.columns, 40

    def draw(self, lines: list[Line]) -> None:
        self.begun = self.begun or time.perf_counter()
        self.frames.append((time.perf_counter() - self.begun, self.kept + lines))

    def commit(self, text: str) -> None:
        self.text += text
        self.kept = wrap(((glyph, size, "") for glyph, size in glyphs(self.text.removesuffix("\n"))), self.columns)
        self.draw([])

    def close(self) -> None:
        write = {".svg": _svg, ".html": _page, ".cast": _cast}[self.path.suffix]
        self.path.write_text(write(self.frames, self.columns), encoding="utf-8")


def _cast(frames: list[tuple[float, list[Line]]], columns: int) -> str:
    """asciicast v2: a header, then [seconds, "o", output] a line; each frame repaints the screen."""
    rows = max((len(lines) for _, lines in frames), default=1)
    out = [json.dumps({"version": 2, "width": columns, "height": rows})]
    for seconds, lines in frames:
        painted = "\r\n".join(ansi(line, True) for line in lines)
        out.append(json.dumps([round(seconds, 3), "o", f"\x1b[?25l\x1b[H\x1b[2J{painted}"], ensure_ascii=False))
    return "\n".join(out) + "\n"


def _page(frames: list[tuple[float, list[Line]]], columns: int) -> str:
    body = _svg(frames, columns)
    return f'<!doctype html><meta charset="utf-8"><title>canvas</title><body style="background:#11151c">{body}\n'


def _svg(frames: list[tuple[float, list[Line]]], columns: int) -> str:
    """One group a frame, shown in its turn by CSS; a viewer that does not animate shows the last."""
    advance, leading, shortest, rest = 8.4, 19, 0.2, 4.0  # pixels and seconds
    rows = max((len(lines) for _, lines in frames), default=1)
    width, height = round(columns * advance + 32), rows * leading + 32
    times = [0.0]
    for (before, _), (after, _) in pairwise(frames):
        times.append(times[-1] + max(after - before, shortest))
    total = times[-1] + rest
    css, groups = [], []
    for i, (_, lines) in enumerate(frames):
        start, stop = (100 * seconds / total for seconds in [*times, total][i : i + 2])
        hide = "" if i == 0 else "0%{visibility:hidden}"
        css.append(f"@keyframes k{i}{{{hide}{start:.2f}%{{visibility:visible}}{stop:.2f}%{{visibility:hidden}}}}")
        last = "" if i + 1 < len(frames) else ";visibility:visible"
        shown = "".join(_svg_line(line, advance, 28 + k * leading) for k, line in enumerate(lines))
        groups.append(f'<g style="animation-name:k{i}{last}">{shown}</g>')
    colors = "".join(f".{name or 'plain'}{{fill:{color}}}" for name, (_, _, color) in STYLES.items())
    style = f"g{{visibility:hidden;animation:{total:.2f}s step-end infinite}}text{{white-space:pre}}{colors}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-size="14"'
        f' font-family="ui-monospace,Menlo,Consolas,monospace"><style>{style}{"".join(css)}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="#11151c"/>\n{chr(10).join(groups)}\n</svg>\n'
    )


def _svg_line(line: Line, advance: float, y: int) -> str:
    spans, at = "", 0
    for text, style in line:
        if text.strip():
            spans += f'<tspan x="{16 + at * advance:.1f}" class="{style or "plain"}">{html.escape(text)}</tspan>'
        at += cell_len(text)
    return f'<text y="{y}">{spans}</text>' if spans else ""
