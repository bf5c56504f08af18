"""A tensor in runs of rows, so that memory stays at a few pieces whatever the checkpoint's size; and their packing."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import shards
from ..files.quantization import quantize
from ..files.shards import WORDS, Tensor, as_array, as_raw
from .plan import Planned

PIECE = 4_000_000  # bytes of the source that a worker holds at a time: measured best on two CPU cores
_GPU = Lock()
INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # bits of +∞; above it lie the NaNs


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `start` … `stop` of a tensor, all leading dimensions taken together."""

    tensor: Tensor
    item: Planned
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.tensor.nbytes // self.tensor.rows


def cuts(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The tensor's rows in runs of at most PIECE bytes, or one row."""
    step = max(1, PIECE * tensor.rows // tensor.nbytes)
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


def pieces(pairs: Iterable[tuple[Tensor, Planned]]) -> list[Piece]:
    """All the work there is, in the order of the tensors."""
    return [Piece(tensor=t, item=item, start=a, stop=b) for t, item in pairs for a, b in cuts(t)]


def pack(piece: Piece, raw: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What is stored for a piece and its raw rows, by tensor name, raw again; what is not packed is cast to `dtype`.

    Errors: CheckpointError for NaN or infinity, in the source or because `dtype` cannot hold a value.
    """
    cast = raw
    if piece.tensor.dtype != dtype:
        converted = as_array(raw, piece.tensor.dtype).astype(shards.DTYPES[dtype])
        with device():
            cast = as_raw(converted)
    _refuse_nonfinite(piece.tensor, raw, cast, dtype)
    if (how := piece.item.how) is None:
        return {piece.item.source.name: cast}
    parts = quantize(as_array(cast, dtype), how)
    with device():
        mx.eval(parts)
    return {f"{piece.item.source.path}.{part}": as_raw(array) for part, array in parts.items()}


def device() -> AbstractContextManager[Any]:
    """A GPU is driven by one thread at a time; on a CPU every thread computes."""
    return nullcontext() if mx.default_device() == mx.cpu else _GPU


def _refuse_nonfinite(tensor: Tensor, raw: np.ndarray, cast: np.ndarray, dtype: str) -> None:
    if _largest(cast) < INFINITE[dtype] + (tensor.shape == ()):  # a bound may be infinite: it bounds nothing
        return
    if _largest(raw) >= INFINITE[tensor.dtype]:
        raise CheckpointError(f"{tensor.file.name}: {tensor.name} holds NaN or infinity; expected finite weights.")
    raise CheckpointError(
        f"{tensor.file.name}: {tensor.name} has values that {WORDS[dtype]} cannot hold.\n"
        "Use --dtype bfloat16 or float32."
    )


def _largest(raw: np.ndarray) -> int:
    """The bits of the largest magnitude: for IEEE floats the order of bits is the order of magnitudes."""
    return int((raw & raw.dtype.type((1 << 8 * raw.itemsize - 1) - 1)).max(initial=0))


class Progress(Protocol):
    """Whoever wants to know how far the work is."""

    def begin(self, tensors: int, nbytes: int) -> None:
        """So many tensors and source bytes are ahead."""

    def advance(self, piece: Piece) -> None:
        """One piece is done."""

    def notice(self, said: str) -> None:
        """Something to know, in a sentence, before the work begins."""


class Silence:
    """A Progress that nobody watches."""

    def begin(self, tensors: int, nbytes: int) -> None:
        pass

    def advance(self, piece: Piece) -> None:
        pass

    def notice(self, said: str) -> None:
        pass


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Two threads per core, so that one reads while another computes; MLX keeps few freed buffers, so memory stays
    at what the pieces need."""
    before = mx.set_cache_limit(64 * PIECE)
    pool = ThreadPoolExecutor(min(2 * (os.cpu_count() or 1), 16))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        mx.set_cache_limit(before)
