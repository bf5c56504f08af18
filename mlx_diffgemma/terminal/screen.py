"""Where a canvas is drawn: the lower rows of a terminal."""

from functools import lru_cache
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console

from .canvas import Line, ansi, glyphs, harmless


class Screen(Protocol):
    """Where a canvas is drawn: text that stays, and under it lines that the next drawing replaces."""

    @property
    def size(self) -> tuple[int, int]: ...  # columns, rows
    def draw(self, lines: list[Line]) -> None: ...
    def commit(self, text: str) -> None: ...
    def close(self) -> None: ...


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
