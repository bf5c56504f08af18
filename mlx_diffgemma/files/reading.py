"""Rows of stored tensors, read into arrays that exist already: no copy, and no memory but theirs.

`mx.load` takes memory when a read is queued, and a layer that is read again would be a new array each time.
"""

import errno
import os
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..disk import reason
from ..errors import CheckpointError
from .shards import SIZES, Tensor

AT_ONCE = 1 << 26  # bytes of one call: what is asked for together is read together


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows `first` … `first` + `count` of a tensor, which become the rows from `at` on of an array."""

    tensor: Tensor
    first: int
    count: int
    at: int


Rows = tuple[Run, ...]  # all rows of an array; an array's rows are all its dimensions but the last, taken together


def whole(tensor: Tensor) -> Rows:
    """The array that a tensor is."""
    return (Run(tensor=tensor, first=0, count=tensor.rows, at=0),)


def joined(first: Tensor, second: Tensor) -> Rows:
    """Two tensors [E, n, w] as one [E, 2 n, w]: in each of E, the rows of the second after the first's."""
    rows = first.shape[-2]
    return tuple(
        Run(tensor=tensor, first=i * rows, count=rows, at=(2 * i + half) * rows)
        for i in range(first.shape[0])
        for half, tensor in enumerate((first, second))
    )


class Files:
    """Open files that must stay as they are, read around the file cache on macOS. Errors: CheckpointError."""

    def __init__(self, paths: Iterable[Path]):
        self._open: dict[Path, tuple[int, tuple[int, ...]]] = {}
        self._end = weakref.finalize(self, _close, self._open)
        for path in paths:
            try:
                number = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {reason(error)}.") from None
            self._open[path] = (number, _state(number))
            if sys.platform == "darwin":  # streamed weights would push everything else out of the cache
                import fcntl

                fcntl.fcntl(number, fcntl.F_NOCACHE, 1)

    def close(self) -> None:
        self._end()

    def read(self, rows: Rows, target: np.ndarray) -> None:
        """Fill an array (as `raw` gives it) with rows that are stored in its dtype, or are floats of half its width."""
        for run in rows:
            self._fill(run, target)

    def check(self) -> None:
        """Errors: CheckpointError when a file was changed, replaced or deleted since it was opened."""
        for path, (number, before) in self._open.items():
            if (now := _state(number)) != before:
                what = "was deleted or replaced" if before[-1] and not now[-1] else "was changed"
                raise CheckpointError(f"{path} {what} while it was read.\nLoad the model again.")

    def _fill(self, run: Run, target: np.ndarray) -> None:
        stored = SIZES[run.tensor.dtype]
        width, size = run.tensor.shape[-1], target.dtype.itemsize
        into = target.reshape(-1, width)[run.at : run.at + run.count]
        start = run.tensor.start + run.first * width * stored
        if stored == size:
            self._bytes(run.tensor, start, into.data.cast("B"))
            return
        step = max(AT_ONCE // (width * size), 1)
        for row in range(0, run.count, step):
            part = into[row : row + step]
            packed = np.empty(part.shape, f"<u{stored}")
            self._bytes(run.tensor, start + row * width * stored, packed.data.cast("B"))
            part[:] = _widened(packed, run.tensor.dtype)

    def _bytes(self, tensor: Tensor, position: int, into: memoryview) -> None:
        number, _ = self._open[tensor.file]
        while into:
            try:
                count = os.preadv(number, [into[:AT_ONCE]], position)
            except OSError as error:
                where = f"{tensor.file}: {tensor.name}"
                lost = " Is its disk still there?" if error.errno in (errno.EIO, errno.ESTALE, errno.ENXIO) else ""
                raise CheckpointError(f"{where} cannot be read: {reason(error)}.{lost}") from None
            if not count:
                raise CheckpointError(f"{tensor.file} ends inside {tensor.name}: it changed while it was read.")
            into, position = into[count:], position + count


def raw(array: mx.array) -> np.ndarray:
    """The numbers of an evaluated array as unsigned integers that can be written."""
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(array.view(kind), copy=False)


def _widened(packed: np.ndarray, dtype: str) -> np.ndarray:
    """Half-width floats, as integers → the same numbers in float32, as integers."""
    if dtype == "BF16":
        return packed.astype(np.uint32) << 16
    return packed.view(np.float16).astype(np.float32).view(np.uint32)


def _state(number: int) -> tuple[int, ...]:
    """What changes with a file; the last is 0 once it has no name."""
    found = os.fstat(number)
    return found.st_size, found.st_mtime_ns, min(found.st_nlink, 1)


def _close(opened: dict[Path, tuple[int, Any]]) -> None:
    while opened:
        os.close(opened.popitem()[1][0])


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of its own, to be filled."""
    made = mx.zeros(shape, dtype)
    mx.eval(made)
    return cast(mx.array, made)
