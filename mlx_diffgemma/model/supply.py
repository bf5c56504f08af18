"""Where a layer's experts are when a pass comes to it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from .layers import Experts

# Takes what a layer gives and the keys and values it wrote; returns the former once the experts may go.
Done = Callable[[mx.array, Sequence[mx.array]], mx.array]


@dataclass(kw_only=True)
class Traffic:
    """What was read since the model was loaded, and how long."""

    nbytes: int = 0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0  # that computing waited for it


class Supply(Protocol):
    """Who sees to it that the experts of a layer are there."""

    streamed: tuple[int, ...]  # numbers of the layers whose experts are not in memory all the time
    traffic: Traffic

    @property
    def nbytes(self) -> int:
        """Memory for the experts of the streamed layers."""
        ...

    @property
    def bytes_a_pass(self) -> int:
        """What is read for every pass."""
        ...

    def owns(self, name: str) -> bool:
        """Whether this parameter of the network is one that comes and goes."""
        ...

    def layer(self, number: int, experts: Experts) -> AbstractContextManager[Done]:
        """The experts of this layer are there as long as the context lasts. Layers come in order, pass after pass."""
        ...


class Resident:
    """All experts are in memory: nothing waits, nothing goes."""

    streamed: tuple[int, ...] = ()
    nbytes = bytes_a_pass = 0

    def __init__(self) -> None:
        self.traffic = Traffic()

    def owns(self, name: str) -> bool:
        return False

    def layer(self, number: int, experts: Experts) -> AbstractContextManager[Done]:
        return nullcontext(_at_once)


def _at_once(x: mx.array, written: Sequence[mx.array]) -> mx.array:
    return x
