"""Where a canvas is drawn: the lower rows of a terminal."""

import os
import signal
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Any, Protocol

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
        self.before: Any = None  # the handler of Ctrl-Z outside drawing

    @property
    def size(self) -> tuple[int, int]:
        return max(1, self.console.size.width), max(1, self.console.size.height)  # COLUMNS=0 is possible

    def draw(self, lines: list[Line]) -> None:
        self._mind_stops()
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
        if self.before is not None:
            signal.signal(signal.SIGTSTP, self.before)
            self.before = None

    def _mind_stops(self) -> None:
        """From now on Ctrl-Z shows the cursor first; the next drawing hides it again."""
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self.before = signal.signal(signal.SIGTSTP, self._stop)

    def _stop(self, number: int, _: object) -> None:
        with suppress(OSError, ValueError):  # past the stream's buffer: it may be in use
            os.write(self.console.file.fileno(), b"\x1b[?25h")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here until SIGCONT
        signal.signal(number, self._stop)

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
