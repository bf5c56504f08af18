"""Experts that pass through memory: the network's trunk and some layers stay, the other layers' experts are read from
the disk whenever a pass comes to them.

A pass uses every layer once, in order, and the next pass begins again at the first: what is needed next is always
known. So one thread reads ahead into two slots, each as large as one layer's experts: while a layer computes from one,
the next layer is read into the other. A step takes as long as the slower of computing and reading, not both.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..model.layers import Experts
from ..model.network import Network, leaves
from ..model.supply import Done, Resident, Traffic
from .checkpoint import Checkpoint
from .reading import Files, Rows, empty, raw
from .shared import own_rows, rows_of
from .weights import nonfinite

SLOTS = 2
ALIGNED = 4_096  # bytes between the arrays of a slot, at least


@dataclass(frozen=True, kw_only=True)
class Part:
    """One array of a layer's experts: where it is stored, and how it is held."""

    rows: Rows
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        size = self.dtype.size
        for length in self.shape:
            size *= length
        return size


Layer = Mapping[str, Part]  # by name below `experts`: down_proj.weight, …


@dataclass
class _Slot:
    """Room for one layer's experts."""

    room: mx.array  # uint32: of bytes, an array could not hold enough
    number: int | None = None  # the layer that is in it, or on its way
    ready: "Future[None] | None" = None
    views: dict[str, mx.array] = field(default_factory=dict)

    def wait(self) -> None:
        """Errors: CheckpointError of the reader."""
        if self.ready is not None:
            self.ready.result()


class Streamed:
    """Supplies the experts of some layers from disk, and has the others in memory."""

    def __init__(self, layers: Mapping[int, Layer]):
        self._layers = dict(sorted(layers.items()))
        self._order = list(self._layers)
        self.streamed = tuple(self._order)
        self._slots = [_Slot(room=empty((_room(layers.values()) // 4,), mx.uint32)) for _ in range(SLOTS)]
        tensors = (run.tensor for layer in layers.values() for part in layer.values() for run in part.rows)
        self._files = Files(dict.fromkeys(tensor.file for tensor in tensors))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._seen: set[int] = set()  # layers whose numbers were looked at
        self.traffic = Traffic()
        self._restart(self._order[0])

    @property
    def nbytes(self) -> int:
        """What the slots hold."""
        return sum(slot.room.nbytes for slot in self._slots)

    @property
    def bytes_a_pass(self) -> int:
        return sum(part.nbytes for layer in self._layers.values() for part in layer.values())

    def owns(self, name: str) -> bool:
        """Whether a parameter of the network, by its dotted name, lies in a slot."""
        match name.split("."):
            case ["decoder", "layers", number, "experts", projection, *_, part]:
                return f"{projection}.{part}" in self._layers.get(int(number), {})
        return False

    @contextmanager
    def layer(self, number: int, experts: Experts) -> Iterator[Done]:
        """The experts of this layer, bound to it; what is computed from them is evaluated before they go."""
        if number not in self._layers:
            with Resident().layer(number, experts) as done:
                yield done
            return
        slot = self._slot(number)
        _bind(experts, slot.views)
        self._look_at(number, slot)
        yield _evaluated
        self._queue(slot, self._after(number, SLOTS))

    def _slot(self, number: int) -> _Slot:
        """The slot with this layer, once it is read. A pass that was broken off leaves slots with other layers."""
        if not any(slot.number == number for slot in self._slots):
            self._restart(number)
        slot = next(slot for slot in self._slots if slot.number == number)
        begun = time.perf_counter()
        try:
            slot.wait()
        except BaseException:
            slot.number = None if slot.ready and slot.ready.done() else number
            raise
        self.traffic.waited_seconds += time.perf_counter() - begun
        return slot

    def _restart(self, number: int) -> None:
        for slot in self._slots:  # whoever is written to must not be written to twice
            with suppress(CheckpointError):
                slot.wait()
        for ahead, slot in enumerate(self._slots):
            self._queue(slot, self._after(number, ahead))

    def _after(self, number: int, ahead: int) -> int:
        return self._order[(self._order.index(number) + ahead) % len(self._order)]

    def _queue(self, slot: _Slot, number: int) -> None:
        layer = self._layers[number]
        slot.number, slot.views = number, _views(slot.room, layer)
        targets = {name: raw(view) for name, view in slot.views.items()}
        slot.ready = self._reader.submit(_read, self._files, layer, targets, self.traffic)

    def _look_at(self, number: int, slot: _Slot) -> None:
        """NaN and infinity are no weights: asked once, when a layer is first there. Errors: CheckpointError."""
        if number in self._seen:
            return
        if (name := nonfinite(slot.views)) is not None:
            file = self._layers[number][name].rows[0].tensor.file.name
            raise CheckpointError(
                f"{file}: the experts of layer {number} hold NaN or infinity ({name}), expected finite weights.\n"
                "Download the checkpoint again."
            )
        self._seen.add(number)


def stream(network: Network, checkpoint: Checkpoint, numbers: Sequence[int]) -> Streamed:
    """Have the experts of these layers of a network, whose weights are still on disk, pass through memory.

    The reader begins at once. Errors: CheckpointError.
    """
    streamed = Streamed({number: _stored(network, checkpoint, number) for number in numbers})
    for number in numbers:
        _bind(network.decoder.layers[number].experts, _views(streamed._slots[0].room, streamed._layers[number]))
    network.experts = streamed
    return streamed


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of so many layers, evenly: while those between them compute, the next one is read."""
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


def _stored(network: Network, checkpoint: Checkpoint, number: int) -> Layer:
    prefix, stored = f"decoder.layers.{number}.experts.", rows_of(checkpoint)
    held, share = leaves(network.decoder.layers[number].experts.parameters()), network.tuning.share
    rows = {name: own_rows(stored[prefix + name], share.spans(network.config, prefix + name)) for name in held}
    return {name: Part(rows=rows[name], shape=array.shape, dtype=array.dtype) for name, array in held.items()}


def _read(files: Files, layer: Layer, targets: Mapping[str, np.ndarray], traffic: Traffic) -> None:
    """In the reader's thread, which knows no MLX: its streams belong to threads."""
    begun = time.perf_counter()
    for name, part in layer.items():
        files.read(part.rows, targets[name])
        traffic.nbytes += part.nbytes
    files.check()
    traffic.read_seconds += time.perf_counter() - begun


def _views(room: mx.array, layer: Layer) -> dict[str, mx.array]:
    """The arrays of a layer, one behind the other in a slot."""
    made, start = {}, 0
    for name, part in layer.items():
        made[name] = room[start : start + part.nbytes // 4].view(part.dtype).reshape(part.shape)
        start += -(-part.nbytes // ALIGNED) * ALIGNED // 4
    mx.eval(made)
    return made


def _room(layers: Any) -> int:
    """Bytes of the largest."""
    return max(sum(-(-part.nbytes // ALIGNED) * ALIGNED for part in layer.values()) for layer in layers)


def _bind(experts: Experts, arrays: Mapping[str, mx.array]) -> None:
    """Put arrays in the places of a layer's weights; an adapter stands before the projection that it changes."""
    for name, array in arrays.items():
        projection, part = name.split(".")
        module = experts[projection]
        setattr(module.linear if "linear" in module else module, part, array)


def _evaluated(x: mx.array, written: Sequence[mx.array]) -> mx.array:
    mx.eval(x, *written)
    return x
