"""A network of which a machine holds its share: of every matrix the output rows that are its own, and of the files no
others are read."""

from bisect import bisect_right
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..model.network import Network, leaves
from ..model.sharing.share import Share, Spans
from .checkpoint import Checkpoint
from .layout import is_vision
from .reading import Files, Rows, Run, empty, joined, raw, whole


def cut(network: Network, share: Share) -> None:
    """Leave the network, whose weights are still on disk, the rows that are this machine's."""
    config, pieces = network.config, []
    for name, array in leaves(network.parameters()).items():
        if (spans := share.spans(config, name)) is not None:
            rows = [array[..., start:stop, :] for start, stop in spans]
            pieces.append((name, rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=-2)))
    nested: Any = tree_unflatten(pieces)
    network.update(nested)
    for layer, kind in zip(network.decoder.layers, config.layers, strict=True):
        layer.self_attn.heads, layer.self_attn.kv_heads = share.heads(config, kind)


def fill(network: Network, checkpoint: Checkpoint, share: Share) -> None:
    """Read what `cut` has left, and nothing else; what streams is left out. Errors: CheckpointError."""
    stored, config = rows_of(checkpoint), network.config
    held = {name: array for name, array in leaves(network.parameters()).items() if share.spans(config, name)}
    own = {name: array for name, array in held.items() if not network.experts.owns(name)}
    files = Files(dict.fromkeys(run.tensor.file for name in own for run in stored[name]))
    try:
        for name, array in own.items():
            made = empty(array.shape, array.dtype)
            files.read(own_rows(stored[name], share.spans(config, name)), raw(made))
            nested: Any = tree_unflatten([(name, made)])
            network.update(nested)
        files.check()
    finally:
        files.close()


def rows_of(checkpoint: Checkpoint) -> dict[str, Rows]:
    """Where every parameter of the text network is stored, by its dotted name in it."""
    rows = {name: whole(tensor) for name, tensor in checkpoint.tensors.items() if not is_vision(name)}
    rows |= {name: joined(*halves) for name, halves in checkpoint.joined.items()}
    return {name.removeprefix("model."): found for name, found in rows.items()}


def own_rows(rows: Rows, spans: Spans | None) -> Rows:
    """Of an array's rows those of the `spans` of each of its matrices; one behind the other."""
    if spans is None:
        return rows
    height, total = _height(rows), sum(run.count for run in rows)
    starts = [run.at for run in rows]
    chosen: list[Run] = []
    at = 0
    for matrix in range(0, total, height):
        for start, stop in spans:
            position, end = matrix + start, matrix + stop
            while position < end:
                run = rows[bisect_right(starts, position) - 1]
                skipped = position - run.at
                count = min(run.count - skipped, end - position)
                chosen.append(Run(tensor=run.tensor, first=run.first + skipped, count=count, at=at))
                position, at = position + count, at + count
    return tuple(chosen)


def _height(rows: Rows) -> int:
    """Rows of one matrix; of halves that are joined, of both."""
    first = rows[0].tensor
    matrices = prod(first.shape[:-2])
    return sum(run.count for run in rows) // matrices
