"""Who may attend to whom. True means "may look". Pure functions; a mask is built only where one is needed.

Positions are absolute. `visible` is how many prefix positions a layer still holds: all of them on a full
layer, at most window − 1 on a sliding one; they are the last ones before `position`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from .blocks import BlockMask


@dataclass(frozen=True, kw_only=True)
class Window:
    """A causal mask in which each of `length` queries sees the last `window` keys up to itself, the first of them
    `visible` keys in. Kept as numbers, so that attention can leave out the keys that a run of queries cannot see."""

    length: int
    visible: int
    window: int

    def pieces(self, step: int) -> Iterator[tuple[slice, slice, mx.array]]:
        """Runs of `step` queries: which queries, the keys any of them sees, and the mask between the two."""
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            first = max(self.visible + start - self.window + 1, 0)
            query = mx.arange(self.visible + start, self.visible + stop)[:, None]
            key = mx.arange(first, self.visible + stop)[None]
            mask = (key <= query) & (query - key < self.window)
            yield slice(start, stop), slice(first, self.visible + stop), mask

    def array(self) -> mx.array:
        """The whole mask, bool [T, visible + T]."""
        [(_, _, mask)] = self.pieces(self.length)
        missing = self.visible + self.length - mask.shape[1]
        return mx.pad(mask, [(0, 0), (missing, 0)])


WholeMask = mx.array | str | None  # as MLX takes it
Mask = WholeMask | Window | tuple[BlockMask, ...]  # the last: one a row, where rows hold pictures


def causal(length: int, *, visible: int, position: int, window: int | None, padding: mx.array | None) -> Mask:
    """Encoding `length` tokens that start at `position`: each sees itself and what lies before it, inside the window.

        keys    p p p t t t      p = prefix, t = the tokens being encoded; window 4
        t0      1 1 1 1 . .
        t1      . 1 1 1 1 .
        t2      . . 1 1 1 1

    `padding` [B] counts left-padding tokens per row: nobody looks at those, except that a padding token sees
    itself (a row of the softmax must not be empty).
    Returns "causal" (MLX's aligned-right fast path) when that says it all, else a Window; with padding, bool
    [B, 1, T, visible + T].
    """
    fits = window is None or visible + length <= window
    if padding is None and window is not None and not fits:
        return Window(length=length, visible=visible, window=window)
    if padding is None:
        return "causal" if length > 1 else None
    query = mx.arange(position, position + length)[:, None]
    key = mx.arange(position - visible, position + length)[None]
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    real = key[None] >= padding[:, None, None]  # [B, 1, keys]
    return (mask[None] & (real | (key == query)[None]))[:, None]


def bidirectional(length: int, *, visible: int, position: int, padding: mx.array | None) -> Mask:
    """Denoising a canvas of `length` behind `position` prefix tokens: every canvas position sees all that the
    layer holds, and the whole canvas.

        keys    p p p c c c      p = prefix (on sliding layers its last window − 1), c = canvas
        c0      1 1 1 1 1 1
        c1      1 1 1 1 1 1
        c2      1 1 1 1 1 1

    Without padding there is nothing to forbid: None. With it, bool [B, 1, 1, visible + L].
    """
    if padding is None:
        return None
    key = mx.arange(position - visible, position + length)
    return (key[None] >= padding[:, None])[:, None, None]
