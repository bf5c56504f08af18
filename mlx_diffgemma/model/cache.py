"""The prefix cache: keys and values of the prompt and of every committed canvas, per layer.

Buffers keep room for a canvas behind the prefix, so a denoising step writes its own keys and values there
and reads one slice: the prefix is never copied, and nothing of the canvas lasts.
"""

from copy import copy
from dataclasses import dataclass

import mlx.core as mx

from ..config import ModelConfig

GROWTH = 256  # buffers grow in multiples of this many positions


class LayerCache:
    """One layer's keys and values, [B, heads, capacity, D]; the first `length` positions are the prefix.

    With a `window`, only the last window − 1 positions are kept (transformers DynamicSlidingWindowLayer).
    """

    def __init__(self, window: int | None, room: int):
        self.window = window
        self.room = room  # positions kept free behind the prefix
        self.length = 0
        self.wanted = 0  # positions announced by `PrefixCache.reserve`
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add [B, heads, T, D] to the prefix; returns what these T tokens may see (then masked causally)."""
        length, keep = self.length + keys.shape[2], length_limit(self.window)
        if length <= keep:
            seen = self._write(keys, values)
            self.length = length
            return seen
        if self.keys is not None and self.values is not None and self.length:
            keys = mx.concatenate([self.keys[:, :, : self.length], keys], axis=2)
            values = mx.concatenate([self.values[:, :, : self.length], values], axis=2)
        self.length = 0
        kept = self._write(keys[:, :, -keep:], values[:, :, -keep:])
        self.length = keep
        # MLX would else write last, and hold every layer's joined keys and values until then.
        keys, values = mx.depends([keys, values], list(kept))
        return keys, values

    def look(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prefix followed by a canvas's keys and values; the prefix stays as it is."""
        return self._write(keys, values)

    def _write(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put `keys` and `values` behind the prefix and return everything up to their end."""
        end = self.length + keys.shape[2]
        old_keys, old_values = self._reserve(end, keys, values)
        old_keys[:, :, self.length : end] = keys
        old_values[:, :, self.length : end] = values
        self.keys, self.values = old_keys, old_values
        return old_keys[:, :, :end], old_values[:, :, :end]

    def _reserve(self, end: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Buffers for a prefix of `end` positions with room for a canvas behind it.

        New objects even for the old buffers: assigning to a slice changes an mx.array for all who hold it, a snapshot
        included. Their data is shared, and copied by MLX only if a snapshot does hold it.
        """
        if self.keys is not None and self.values is not None and self.keys.shape[2] >= end:
            return copy(self.keys), copy(self.values)
        prefix = max(end, self.wanted, self.length + self.length // 4)
        capacity = min(length_limit(self.window), -(-prefix // GROWTH) * GROWTH) + self.room
        capacity = max(capacity, end)
        return _grown(self.keys, self.length, capacity, keys), _grown(self.values, self.length, capacity, values)


def length_limit(window: int | None) -> int:
    """The most prefix positions a layer keeps: all, or window − 1."""
    return 1 << 62 if window is None else window - 1


def _grown(old: mx.array | None, length: int, capacity: int, like: mx.array) -> mx.array:
    batch, heads, _, dim = like.shape
    if old is None or not length:
        return mx.zeros((batch, heads, capacity, dim), like.dtype)
    free = mx.zeros((batch, heads, capacity - length, dim), old.dtype)
    return mx.concatenate([old[:, :, :length], free], axis=2)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The prefix as it was at `length` tokens; see `PrefixCache.snapshot`."""

    length: int
    stamp: int
    windows: tuple[tuple[int, mx.array | None, mx.array | None], ...]


class PrefixCache:
    """Keys and values of the prefix for every layer, for B rows of equal length.

    `left_padding` counts the padding tokens in front of each row. Positions are not shifted for them, as in
    transformers; rotation is relative, so a padded row differs from the same row alone only by rounding.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        left_padding: list[int] | None = None,
        canvas_length: int | None = None,
    ):
        self.batch_size = batch_size
        self.length = 0  # tokens encoded so far, padding included: the position of the next one
        self.padding = mx.array(left_padding) if left_padding and any(left_padding) else None
        room = canvas_length or config.canvas_length
        self.layers = [LayerCache(config.sliding_window if c.is_sliding else None, room) for c in config.layers]
        self._stamps: dict[int, int] = {}  # snapshots that can still be restored: stamp → length
        self._next_stamp = 0

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, free room included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def state(self) -> list[mx.array]:
        """Every buffer, to be evaluated together."""
        return [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]

    def reserve(self, length: int) -> None:
        """Announce that the prefix will reach `length` tokens, so that buffers are made once."""
        for layer in self.layers:
            layer.wanted = max(layer.wanted, length)

    def advance(self, length: int) -> None:
        """`length` more tokens were appended in every layer."""
        self.length += length

    def snapshot(self) -> Snapshot:
        """Remember this prefix. Costs nothing until the cache is written again, then one window per sliding layer."""
        stamp, self._next_stamp = self._next_stamp, self._next_stamp + 1
        self._stamps[stamp] = self.length
        windows = tuple((c.length, c.keys, c.values) for c in self.layers if c.window is not None)
        return Snapshot(length=self.length, stamp=stamp, windows=windows)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`; later snapshots die. Errors: ValueError for one that is no longer valid."""
        if self._stamps.get(snapshot.stamp) != snapshot.length:
            raise ValueError("this snapshot belongs to another cache, or the cache went back before it")
        self._stamps = {s: n for s, n in self._stamps.items() if n <= snapshot.length}
        windows = iter(snapshot.windows)
        for layer in self.layers:
            if layer.window is None:
                layer.length = snapshot.length
            else:
                layer.length, layer.keys, layer.values = next(windows)
        self.length = snapshot.length
