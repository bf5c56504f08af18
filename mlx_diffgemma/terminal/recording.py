"""The same frames in a file: .svg and .html that move by themselves, or an asciicast."""

import html
import json
import time
from itertools import pairwise
from pathlib import Path

from rich.cells import cell_len

from ..disk import replacing
from ..errors import ConfigError
from .canvas import STYLES, Line, ansi, glyphs, wrap


class Recording:
    """Keeps what is drawn and writes it to FILE.svg or .html, which move by themselves, or to FILE.cast.

    A cast keeps the time; the others show a picture for a fifth of a second at least, or nobody would see it.
    """

    def __init__(self, path: str | Path, columns: int = 80):
        self.path, self.columns = Path(path), columns
        if self.path.suffix not in (".svg", ".html", ".cast"):
            raise ConfigError(f"--record {path}: expected a name ending in .svg, .html or .cast.")
        self.said: list[tuple[str, str]] = []  # text that stays, with its style
        self.kept, self.begun = list[Line](), 0.0
        self.frames: list[tuple[float, list[Line]]] = []

    @property
    def size(self) -> tuple[int, int]:
        return self.columns, 40

    def draw(self, lines: list[Line]) -> None:
        self.begun = self.begun or time.perf_counter()
        self.frames.append((time.perf_counter() - self.begun, self.kept + lines))

    def commit(self, text: str, style: str = "") -> None:
        self.said.append((text, style))
        said = [*self.said[:-1], (text.removesuffix("\n"), style)]
        self.kept = wrap(((glyph, size, style) for text, style in said for glyph, size in glyphs(text)), self.columns)
        self.draw([])

    def close(self) -> None:
        write = {".svg": _svg, ".html": _page, ".cast": _cast}[self.path.suffix]
        with replacing(self.path, "w") as stream:
            stream.write(write(self.frames, self.columns))


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
