"""Pictures in a prompt: blocks of soft tokens that stand for embeddings, and who sees whom around them.

A block's positions see one another in both directions. That makes no mask array: every run of queries, a block or the
text between two, is a slice of keys and at most a small mask. Two masks are in use, and differ for every picture:

                     full layers              sliding layers
    "transformers"   causal or same block     (causal and in the window) or same block, beyond the window too
    "gemma4"         causal                   (causal or same block) and in the window, both ways

The first is what transformers 5.23 generates with (DiffusionGemmaEncoderModel.create_masks_for_generate), the second
Google's own code (transformers' gemma4 has it too, but bounds a block by the window on its left alone).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import PictureMask

Spans = Sequence[tuple[int, int]]  # of one row, in order: where each block begins and ends


@dataclass(frozen=True, kw_only=True)
class Block:
    """One picture of one prompt, at ids `start` … `stop` − 1."""

    start: int
    stop: int
    features: Callable[[], mx.array]  # its soft tokens [stop − start, H], made when they are needed


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Who sees whom in one row of `length` queries, behind `visible` keys of which the first `hidden` are padding."""

    length: int
    visible: int
    hidden: int
    window: int | None
    spans: Spans
    kind: PictureMask

    @property
    def skipped(self) -> int:
        """How many of the first queries are padding, and see nothing."""
        return min(max(self.hidden - self.visible, 0), self.length)

    def pieces(self, step: int) -> Iterator[tuple[slice, slice, mx.array | str | None]]:
        """Runs of at most `step` queries, behind the skipped ones: the queries, the keys that any of them sees, and
        the mask between the two."""
        for start, stop, block in self._runs():
            for a in range(start, stop, step):
                b = min(a + step, stop)
                columns, mask = self._text(a, b) if block is None else self._block(a, b, *block)
                yield slice(a, b), columns, mask

    def _runs(self) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
        """Texts and blocks in turn."""
        at = self.skipped
        for start, stop in self.spans if self.window is not None or self.kind == "transformers" else ():
            if at < start:
                yield at, start, None
            yield start, stop, (start, stop)
            at = stop
        if at < self.length:
            yield at, self.length, None

    def _first(self, a: int) -> int:
        """The first key that query `a` sees."""
        return self.hidden if self.window is None else max(self.hidden, self.visible + a - self.window + 1)

    def _text(self, a: int, b: int) -> tuple[slice, mx.array | str | None]:
        first, last = self._first(a), self.visible + b
        if self.window is None or self._first(b - 1) == first:  # the window hides nothing from any of them
            return slice(first, last), "causal" if b - a > 1 else None
        query, key = _grid(self.visible + a, last, first, last)
        return slice(first, last), (key <= query) & (query - key < self.window)

    def _block(self, a: int, b: int, start: int, stop: int) -> tuple[slice, mx.array | None]:
        start, stop = self.visible + start, self.visible + stop
        first, last = self._first(a), stop
        if self.kind == "gemma4" and self.window is not None:
            last = min(stop, self.visible + b - 1 + self.window)
            if self._first(b - 1) == first and last - self.visible - a <= self.window:
                return slice(first, last), None
            query, key = _grid(self.visible + a, self.visible + b, first, last)
            return slice(first, last), mx.abs(query - key) < self.window
        first = min(first, start)
        if self.window is None or min(self._first(b - 1), start) == first:
            return slice(first, last), None
        query, key = _grid(self.visible + a, self.visible + b, first, last)
        return slice(first, last), (key >= start) | (query - key < self.window)


def _grid(a: int, b: int, first: int, last: int) -> tuple[mx.array, mx.array]:
    return mx.arange(a, b)[:, None], mx.arange(first, last)[None]


def chunk_end(start: int, end: int, rows: Sequence[Spans]) -> int:
    """Where a chunk from `start` may end so that it cuts no row's block: `end`, or before the blocks that lie across
    it, or, where nothing would be left, behind them."""
    if (earlier := _moved(end, rows, 0)) > start:
        return earlier
    return _moved(end, rows, 1)


def _moved(end: int, rows: Sequence[Spans], side: int) -> int:
    while cut := next((span for row in rows for span in row if span[0] < end < span[1]), None):
        end = cut[side]
    return end
