"""Hold a pack against the checkpoint it was made from, byte for byte, and say what packing cost."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import layout
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.folder import families
from ..files.quantization import dequantize, packing
from ..files.shards import DTYPES, WORDS, as_array, read_rows
from .card import output_config
from .pieces import Piece, Progress, Silence, device, pack, pieces, workers
from .plan import Planned


@dataclass
class Deviation:
    """Squared error and squared weight, summed."""

    error: float = 0.0
    weight: float = 0.0

    def add(self, error: float, weight: float) -> None:
        self.error, self.weight = self.error + error, self.weight + weight

    @property
    def relative(self) -> float:
        return sqrt(self.error / self.weight) if self.weight else sqrt(self.error)


def verify(source: Checkpoint, folder: Path, progress: Progress | None = None) -> dict[str, dict[str, Deviation]]:
    """Re-read a pack against its source: relative RMS error per component and tensor.

    Every stored byte is compared with what its packing makes of the source.
    Errors: CheckpointError for a byte that differs, or a config.json that is not the source's.
    """
    pack_of = open_checkpoint(folder)
    dtype = pack_of.tensors["model.decoder.norm.weight"].dtype
    _compare_configs(source, pack_of, dtype)
    planned = [_as_stored(item, pack_of, dtype) for item in layout.sources(source.config)]
    errors: dict[str, dict[str, Deviation]] = {}
    progress = progress or Silence()
    pairs = [(source.tensors[item.source.name], item) for item in planned]
    progress.begin(len(pairs), sum(tensor.nbytes for tensor, _ in pairs))
    with workers() as pool:
        for piece, error, weight in pool.map(lambda piece: _check(piece, pack_of, dtype), pieces(pairs)):
            progress.advance(piece)
            component = errors.setdefault(piece.item.source.component, {})
            component.setdefault(piece.item.source.name, Deviation()).add(error, weight)
    return errors


def _compare_configs(source: Checkpoint, pack_of: Checkpoint, dtype: str) -> None:
    block = pack_of.raw_config.get("quantization") or {}
    expected = output_config(source, WORDS[dtype], block)
    for name, (want, got) in _differences(expected, pack_of.raw_config).items():
        raise CheckpointError(f"{pack_of.folder}/config.json: {name} is {got!r}, expected {want!r} from the source.")


def _differences(a: Any, b: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ, by dotted path."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return {} if a == b else {name: (a, b)}
    found = {}
    for key in sorted(a.keys() | b.keys()):
        found |= _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    return found


def _as_stored(source: layout.Source, pack_of: Checkpoint, dtype: str) -> Planned:
    how = pack_of.quantized.get(source.path)
    names = [source.name] if how is None else [f"{source.path}.{p}" for p in packing(source.shape, how, dtype)]
    missing = [name for name in names if name not in pack_of.tensors]
    if missing:
        raise CheckpointError(f"{pack_of.folder} lacks {families(missing)}, which the source has.")
    stored = {name: (pack_of.tensors[name].dtype, pack_of.tensors[name].shape) for name in names}
    return Planned(source=source, how=how, stored=stored)


def _check(piece: Piece, pack_of: Checkpoint, dtype: str) -> tuple[Piece, float, float]:
    """Compare one piece byte for byte, and return its squared error and squared weight."""
    raw = read_rows(piece.tensor, piece.start, piece.stop)
    made = pack(piece, raw, dtype)
    found = {name: read_rows(pack_of.tensors[name], piece.start, piece.stop) for name in made}
    for name, rows in made.items():
        if not np.array_equal(rows, found[name]):
            raise CheckpointError(
                f"{pack_of.tensors[name].file.name}: {name} is not what its packing makes of the source:"
                f" {np.count_nonzero(rows != found[name])} of {rows.size} values differ in rows {piece.start:,} to"
                f" {piece.stop - 1:,}.\nThe pack is damaged, or was made from other weights, or on another device."
            )
    parts = {name: as_array(rows, pack_of.tensors[name].dtype) for name, rows in found.items()}
    how, path = piece.item.how, piece.item.source.path
    if how is None:
        stored = parts[piece.item.source.name]
    else:
        named = {name.removeprefix(f"{path}."): array for name, array in parts.items()}
        stored = dequantize(named, how, DTYPES[dtype])
    original = as_array(raw, piece.tensor.dtype).astype(mx.float32)
    error, weight = mx.square(stored.astype(mx.float32) - original).sum(), mx.square(original).sum()
    with device():
        mx.eval(error, weight)
    return piece, float(error), float(weight)
