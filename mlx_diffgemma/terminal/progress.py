"""Long work, seen: a progress bar on a terminal, now and then a line elsewhere."""

import time
from typing import TYPE_CHECKING

from .console import console

if TYPE_CHECKING:
    from ..packing.pieces import Piece


class Bar:
    """A progress bar on a terminal; elsewhere a log line every 15 seconds. Both on stderr."""

    def __init__(self, verb: str):
        from rich.progress import BarColumn, Progress, TimeRemainingColumn

        self.verb, self.console = verb, console(stderr=True)
        columns = ("{task.description}", BarColumn(), "{task.fields[state]}", TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tensors = self.nbytes = self.whole = self.done = 0
        self.began = self.logged = time.monotonic()

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.done:
            self.console.print(f"{self.verb}: {self._state()} in {time.monotonic() - self.began:.0f} s")

    def begin(self, tensors: int, nbytes: int) -> None:
        self.tensors, self.nbytes = tensors, nbytes
        self.began = self.logged = time.monotonic()
        self.bar.add_task(self.verb, total=nbytes, state="")

    def advance(self, piece: "Piece") -> None:
        self.done += piece.nbytes
        self.whole += piece.stop == piece.tensor.rows
        self.bar.update(self.bar.task_ids[0], completed=self.done, state=self._state())
        if not self.console.is_terminal and time.monotonic() - self.logged > 15:
            self.logged = time.monotonic()
            left = (self.logged - self.began) * (self.nbytes / self.done - 1)
            self.console.print(f"{self.verb}: {self._state()}, {left:.0f} s left")

    def notice(self, said: str) -> None:
        self.console.print(f"Note: {said}", markup=False)

    def _state(self) -> str:
        rate = self.done / max(time.monotonic() - self.began, 1e-9)
        return f"{self.whole}/{self.tensors} tensors, {self.done / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s"


class Count:
    """How many of so many are done, and how long the rest may take: a bar on a terminal, else a line now and then."""

    def __init__(self, what: str, *, quiet: bool = False):
        from rich.progress import BarColumn, Progress, TimeRemainingColumn

        from .console import console

        self.what, self.console = what, console(stderr=True, quiet=quiet)
        columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", "{task.fields[said]}")
        shown = self.console.is_terminal and not quiet
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not shown)
        self.first: int | None = None  # what was done already
        self.began = self.logged = time.monotonic()

    def __enter__(self) -> "Count":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, said: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.began = done, now
            self.bar.add_task(self.what, total=total, completed=done, said=said)
            return
        self.bar.update(self.bar.task_ids[0], completed=done, said=said)
        if not self.console.is_terminal and (now - self.logged > 15 or done == total):
            self.logged = now
            left = (now - self.began) / max(done - self.first, 1) * (total - done)
            told = [f"{done}/{total} {self.what}", *([said] if said else []), f"{left:.0f} s left"]
            self.console.print(", ".join(told))
