"""safetensors files: a header that is not believed until it fits, and tensors read in place.

Written by ourselves because a conversion reads a few rows of a tensor at a time, at any alignment, and because the
format's own reader trusts more than a download deserves.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

from ..disk import reason, replacing
from ..errors import CheckpointError
from ..readers import parse_json
from ..values import shown

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
SIZES = {name: dtype.size for name, dtype in DTYPES.items()}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
WORDS = {short: word for word, short in NAMES.items()}
FLOATS = ("BF16", "F16", "F32")
MAX_HEADER = 16_000_000  # bytes; the released checkpoint's largest is 59,784


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies: bytes `start` … `start + nbytes` of `file`; `dtype` in safetensors' words."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return SIZES[self.dtype] * prod(self.shape)

    @property
    def rows(self) -> int:
        """All dimensions but the last, taken together; one for a single number."""
        return prod(self.shape[:-1])


def printable(name: str) -> str:
    """A name as an error message may show it: a downloaded file decides what it is."""
    return name if name.isprintable() and len(name) <= 120 else ascii(name)[:120]


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Errors: CheckpointError unless the header is small, well formed and its tensors tile the file exactly.
    """
    where = file.name
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{where} is not a whole safetensors file: its header claims {length:,} bytes,"
                    f" the file has {size:,} and headers may have {MAX_HEADER:,}.\nDownload it again."
                )
            raw = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{where} is missing in {file.parent}.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}.") from None
    header = parse_json(raw, f"{where}: the header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the header is {shown(header)}, expected names and entries.")
    header.pop("__metadata__", None)
    tensors = [_entry(name, entry, file, 8 + length) for name, entry in header.items()]
    position = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != position:
            raise CheckpointError(
                f"{where}: the header lies about offsets: {printable(tensor.name)} begins at byte {tensor.start:,},"
                f" the tensor before it ends at {position:,}.\nDownload it again."
            )
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(f"{where} is truncated or padded: {position:,} bytes expected, got {size:,}.")
    return sorted(tensors, key=lambda t: t.start)


def _entry(name: str, entry: Any, file: Path, base: int) -> Tensor:
    """One header entry; `base` is where the data begins."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, start, end)) or not isinstance(dtype, str):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{file.name}: the header's entry for {printable(name)} is malformed: {ascii(entry)[:80]}"
        ) from None
    if dtype not in SIZES:
        raise CheckpointError(
            f"{file.name}: {printable(name)} has dtype {printable(dtype)}, expected {', '.join(FLOATS)}.\n"
            "Checkpoints quantized by other tools are not read; start from the released bf16 repository."
        )
    tensor = Tensor(name=name, file=file, dtype=dtype, shape=tuple(shape), start=base + start)
    if tensor.nbytes != end - start:
        raise CheckpointError(
            f"{file.name}: the header lies about offsets: {printable(name)} is {dtype} {shape},"
            f" {tensor.nbytes:,} bytes, and claims {end - start:,}.\nDownload it again."
        )
    return tensor


def read_rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor as raw unsigned integers [rows, width], read in place at any alignment."""
    row = tensor.nbytes // tensor.rows
    kind = np.dtype(f"<u{SIZES[tensor.dtype]}")
    buffer = np.empty((stop - start, prod(tensor.shape[-1:])), kind)
    view, position = buffer.data.cast("B"), tensor.start + start * row
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(position)
        while len(view):
            if not (count := stream.readinto(view)):
                raise CheckpointError(f"{tensor.file.name} ends inside {tensor.name}: it changed while it was read.")
            view = view[count:]
    return buffer


def as_array(raw: np.ndarray, dtype: str) -> mx.array:
    """Raw integers as an MLX array of the dtype they stand for."""
    return mx.array(raw).view(DTYPES[dtype])


def as_raw(array: mx.array) -> np.ndarray:
    """An evaluated MLX array as raw unsigned integers, without a copy."""
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(array.view(kind), copy=False)


def write_at(file: int, data: memoryview, position: int) -> None:
    while len(data):
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count


def write_tensors(file: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole, through a stream of Python's: MLX's own says only that it could not write.
    Errors: OSError."""
    with replacing(file) as stream:
        mx.save_safetensors(cast(BinaryIO, stream), tensors, metadata)
