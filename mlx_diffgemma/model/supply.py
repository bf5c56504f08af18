"""Where a layer's experts are when a pass comes to it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import mlx.core as mx

# Takes what a layer gives and the keys and values it wrote; returns the former once the experts may go.
Done = Callable[[mx.array, Sequence[mx.array]], mx.array]


class Supply(Protocol):
    """Who sees to it that the experts of a layer are there."""

    streamed: tuple[int, ...]  # numbers of the layers whose experts are not in memory all the time

    def layer(self, number: int) -> AbstractContextManager[Done]:
        """The experts of this layer are there as long as the context lasts. Layers come in order, pass after pass."""
        ...


class Resident:
    """All experts are in memory: nothing waits, nothing goes."""

    streamed = ()

    def layer(self, number: int) -> AbstractContextManager[Done]:
        return nullcontext(_at_once)


def _at_once(x: mx.array, written: Sequence[mx.array]) -> mx.array:
    return x
