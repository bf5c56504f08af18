"""The prefix cache: keys and values of the prompt and of every committed canvas, per layer.

Buffers keep room for a canvas behind the prefix, so a denoising step writes its own keys and values there
and reads one slice: the prefix is never copied, and nothing of the canvas lasts. `fork` gives a second prefix that
shares what both hold: a conversation keeps one at the end of each turn, a server one behind its system prompt.
"""

from collections.abc import Sequence
from copy import copy
from weakref import WeakSet

import mlx.core as mx

from ..config import ModelConfig

GROWTH = 256  # buffers grow in multiples of this many positions

KeysValues = tuple[mx.array, mx.array]  # [B, heads, T, D] each


class FullLayer:
    """A layer that sees everything: its keys and values lie in a buffer that forks share.

    A buffer has one writer: whoever holds its longest prefix writes behind it in place. A fork that wants to write
    where another already holds more copies its own part, once.
    """

    window = None

    def __init__(self, room: int, *, write_in_place: bool = True):
        self.room = room  # positions kept free behind the prefix
        self.write_in_place = write_in_place
        self.length = 0  # positions of the prefix
        self.wanted = 0  # positions announced by `PrefixCache.reserve`
        self._buffer = _Buffer(self)

    def append(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Add [B, heads, T, D] to the prefix; returns what these T tokens may see (then masked causally)."""
        seen = self._write(keys, values)
        self.length += keys.shape[2]
        return seen

    def look(self, keys: mx.array, values: mx.array) -> KeysValues:
        """The prefix of the first b rows, followed by their canvases' keys and values [b, heads, T, D]; nothing of
        those lasts."""
        if not self.write_in_place:
            return _joined(self.held, keys, values)
        return self._write(keys, values)

    def fork(self) -> "FullLayer":
        """The same prefix once more, in the same buffer."""
        other = copy(self)
        other._buffer.holders.add(other)
        return other

    def keep(self, rows: mx.array) -> None:
        """Let go of all rows of the batch but these."""
        self._buffer = self._buffer.of(self, rows)

    @property
    def held(self) -> KeysValues | None:
        """The prefix's keys and values."""
        return self._buffer.upto(self.length)

    @property
    def state(self) -> Sequence[mx.array]:
        return self._buffer.arrays

    def _write(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Put `keys` and `values` behind the prefix and return everything up to their end."""
        end = self.length + keys.shape[2]
        if self._buffer.capacity < end or self._buffer.read_behind(self):
            self._buffer = self._buffer.leave(self, self._roomy(end), (keys, values))
        return self._buffer.write(self.length, keys, values)

    def _roomy(self, end: int) -> int:
        """Capacity for a prefix of `end` positions and a canvas behind it."""
        return _rounded(max(end, self.wanted, self.length + self.length // 4)) + self.room


class _Buffer:
    """Keys and values of one full layer, [B, heads, capacity, D], and the layers that hold a prefix of them."""

    def __init__(self, owner: FullLayer, arrays: tuple[mx.array, ...] = ()):
        self.arrays = arrays
        self.holders: WeakSet[FullLayer] = WeakSet([owner])

    @property
    def capacity(self) -> int:
        return self.arrays[0].shape[2] if self.arrays else 0

    def upto(self, end: int) -> KeysValues | None:
        if not self.arrays or not end:
            return None
        keys, values = self.arrays
        return keys[:, :, :end], values[:, :, :end]

    def read_behind(self, writer: FullLayer) -> bool:
        """Whether somebody else holds what `writer` would overwrite."""
        return any(layer.length > writer.length for layer in self.holders if layer is not writer)

    def write(self, start: int, keys: mx.array, values: mx.array) -> KeysValues:
        self.arrays = tuple(_written(old, start, new) for old, new in zip(self.arrays, (keys, values), strict=True))
        rows, end = slice(len(keys)), start + keys.shape[2]
        return self.arrays[0][rows, :, :end], self.arrays[1][rows, :, :end]

    def of(self, layer: FullLayer, rows: mx.array) -> "_Buffer":
        """A buffer of its own for `layer`, with some rows."""
        self.holders.discard(layer)
        return _Buffer(layer, tuple(array[rows] for array in self.arrays))

    def leave(self, layer: FullLayer, capacity: int, like: KeysValues) -> "_Buffer":
        """A buffer of its own for `layer`, with a copy of its prefix."""
        self.holders.discard(layer)
        held = self.upto(layer.length) or (None, None)
        return _Buffer(layer, tuple(_roomier(old, capacity, new) for old, new in zip(held, like, strict=True)))


class SlidingLayer:
    """A layer that sees the last `window` positions: it keeps window − 1 (transformers DynamicSlidingWindowLayer).

    They move through a buffer with room for a canvas, and are shifted to its front when that room is used up.
    """

    def __init__(self, window: int, room: int, *, write_in_place: bool = True):
        self.window, self.room, self.write_in_place = window, room, write_in_place
        self.wanted = 0  # positions announced by `PrefixCache.reserve`
        self._start = self._end = 0  # where the kept positions lie in the buffer
        self._arrays: tuple[mx.array, ...] = ()

    @property
    def kept(self) -> int:
        """The most positions that are kept."""
        return self.window - 1

    @property
    def length(self) -> int:
        """Positions that are kept now."""
        return self._end - self._start

    def append(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Add [B, heads, T, D] to the prefix; returns what these T tokens may see (then masked causally)."""
        count, keep = keys.shape[2], self.kept
        if self.length + count <= keep + self.room:
            seen = self._write(keys, values)
            self._end += count
            self._start = max(self._start, self._end - keep)
            return seen
        seen = _joined(self.held, keys, values)
        last = seen[0].shape[2] - keep
        self._start = self._end = 0
        kept = self._write(*(array[:, :, last:] for array in seen))
        self._end = keep
        # MLX would else write last, and hold every layer's joined keys and values until then.
        keys, values = mx.depends(list(seen), list(kept))
        return keys, values

    def look(self, keys: mx.array, values: mx.array) -> KeysValues:
        """What is kept of the first b rows, followed by their canvases' keys and values [b, heads, T, D]; nothing of
        those lasts."""
        if not self.write_in_place:
            return _joined(self.held, keys, values)
        return self._write(keys, values)

    def fork(self) -> "SlidingLayer":
        """The same positions once more. Who writes first copies them: one window."""
        return copy(self)

    def keep(self, rows: mx.array) -> None:
        """Let go of all rows of the batch but these."""
        self._arrays = tuple(array[rows] for array in self._arrays)

    @property
    def held(self) -> KeysValues | None:
        """The kept positions' keys and values."""
        if not self.length:
            return None
        keys, values = self._arrays
        return keys[:, :, self._start : self._end], values[:, :, self._start : self._end]

    @property
    def state(self) -> Sequence[mx.array]:
        return self._arrays

    def _write(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Put `keys` and `values` behind what is kept and return all of it; shifts it to the front for room."""
        count, new = keys.shape[2], (keys, values)
        if not self._arrays or self._end + count > self._arrays[0].shape[2]:
            held = self.held or (None, None)
            end = self.length + count
            capacity = max(min(self.kept, _rounded(max(end, self.wanted))) + self.room, end)
            self._start, self._end = 0, self.length
            self._arrays = tuple(_roomier(old, capacity, like) for old, like in zip(held, new, strict=True))
        self._arrays = tuple(_written(old, self._end, part) for old, part in zip(self._arrays, new, strict=True))
        rows, seen = slice(len(keys)), slice(self._start, self._end + count)
        return self._arrays[0][rows, :, seen], self._arrays[1][rows, :, seen]


LayerCache = FullLayer | SlidingLayer


def _rounded(length: int) -> int:
    return -(-length // GROWTH) * GROWTH


def _written(old: mx.array, start: int, new: mx.array) -> mx.array:
    """`old` with `new` at positions `start` … of the first rows; MLX writes in place where nobody else holds the array.

    A new object, because assigning to a slice changes an mx.array for all who hold it, a fork included.
    """
    changed = copy(old)
    changed[: len(new), :, start : start + new.shape[2]] = new
    return changed


def _joined(held: KeysValues | None, keys: mx.array, values: mx.array) -> KeysValues:
    """A copy: what is held by the first rows, then their `keys` and `values`."""
    if held is None:
        return keys, values
    rows = len(keys)
    return mx.concatenate([held[0][:rows], keys], axis=2), mx.concatenate([held[1][:rows], values], axis=2)


def _roomier(held: mx.array | None, capacity: int, like: mx.array) -> mx.array:
    """A buffer of `capacity` positions that begins with what is held."""
    if held is None:
        batch, heads, _, dim = like.shape
        return mx.zeros((batch, heads, capacity, dim), like.dtype)
    batch, heads, length, dim = held.shape
    free = mx.zeros((batch, heads, capacity - length, dim), held.dtype)
    return mx.concatenate([held, free], axis=2)


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
        write_in_place: bool = True,
    ):
        self.batch_size = batch_size
        self.length = 0  # tokens encoded so far, padding included: the position of the next one
        self.padding = mx.array(left_padding) if left_padding and any(left_padding) else None
        room = canvas_length or config.canvas_length
        self.layers: list[LayerCache] = [
            SlidingLayer(config.sliding_window, room, write_in_place=write_in_place)
            if layer.is_sliding
            else FullLayer(room, write_in_place=write_in_place)
            for layer in config.layers
        ]

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, free room included; what forks share is counted in each."""
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[mx.array]:
        """Every buffer, to be evaluated together."""
        return [array for layer in self.layers for array in layer.state]

    def reserve(self, length: int) -> None:
        """Announce that the prefix will reach `length` tokens, so that buffers are made once."""
        for layer in self.layers:
            layer.wanted = max(layer.wanted, length)

    def advance(self, length: int) -> None:
        """`length` more tokens were appended in every layer."""
        self.length += length

    def keep(self, rows: list[int]) -> None:
        """Let go of all rows of the batch but these. A layer is copied at a time, so that two of it never lie beside
        one another for long."""
        index = mx.array(rows)
        for layer in self.layers:
            layer.keep(index)
            mx.eval(layer.state)
        self.batch_size = len(rows)
        self.padding = None if self.padding is None else self.padding[index]

    def fork(self) -> "PrefixCache":
        """The same prefix once more: both can go on, each by itself.

        Costs nothing by itself. Writing costs one window per sliding layer; a full layer is copied only when a second
        fork writes where a first one already did, while that one lives.
        """
        other = copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other
