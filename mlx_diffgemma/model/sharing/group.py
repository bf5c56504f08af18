"""How machines that share a model exchange arrays; or threads of one machine, which stand for as many."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import mlx.core as mx

from ...errors import ConfigError, PeerError


class Group(Protocol):
    """Some machines, of which this one is number `rank`. All call the same methods in the same order."""

    rank: int
    size: int

    def gathered(self, piece: mx.array) -> mx.array:
        """A piece [n] of each machine → all of them, by rank, [size · n]."""
        ...

    def told(self, words: mx.array) -> mx.array:
        """The first machine's words, uint32, on all; the others give as many zeros."""
        ...


class Distributed:
    """What mlx.launch started."""

    def __init__(self) -> None:
        """Errors: ConfigError when the machines do not find each other."""
        try:
            with _ended_by_signals():
                self._group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the machines do not find each other: {error}.\nCheck the file of hosts that mlx.launch was given."
            ) from None
        self.rank, self.size = self._group.rank(), self._group.size()

    def gathered(self, piece: mx.array) -> mx.array:
        return mx.distributed.all_gather(piece, group=self._group)

    def told(self, words: mx.array) -> mx.array:
        return mx.distributed.all_sum(words, group=self._group)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once: MLX looks for other machines for half a minute, and at no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meeting:
    """Where threads of one process exchange arrays. An array that waits to be computed belongs to the thread that made
    it, so only computed ones are handed over."""

    def __init__(self, size: int):
        self.size = size
        self._barrier = threading.Barrier(size)
        self._brought: list[list[mx.array]] = [[mx.array(0)] * size for _ in range(2)]

    def members(self) -> Sequence["Member"]:
        return [Member(self, rank) for rank in range(self.size)]

    def exchange(self, rank: int, turn: int, array: mx.array) -> list[mx.array]:
        """What all have brought to this turn. Nobody is two turns ahead of another."""
        mx.eval(array)
        self._brought[turn % 2][rank] = array
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise PeerError("a thread that computes a piece of the model has ended.") from None
        return list(self._brought[turn % 2])

    def leave(self) -> None:
        """One has gone: nobody is to wait for it."""
        self._barrier.abort()


class Member:
    """A thread that stands for a machine."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self._turn = 0

    def gathered(self, piece: mx.array) -> mx.array:
        return mx.concatenate(self._exchange(piece))

    def told(self, words: mx.array) -> mx.array:
        return self._exchange(words)[0]

    def _exchange(self, array: mx.array) -> list[mx.array]:
        self._turn += 1
        return self.meeting.exchange(self.rank, self._turn, array)
