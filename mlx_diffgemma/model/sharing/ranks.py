"""Several machines that share one model, through mx.distributed.

Rank 0, the leader, runs everything: it reads, samples, prints, looks at clocks. The others know passes alone. Before
each pass the leader says which one comes, with all that it takes (ids, signal, shapes); the others do the same pass on
their own prefixes and weights, and pieces are gathered on the way. What happened to prefixes between two passes (made,
forked, dropped) is told with the next one. So stopping, errors and clocks need no protocol: there is no next pass.
"""

import atexit
import itertools
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import mlx.core as mx
import numpy as np

from ...config import ModelConfig
from ...errors import ConfigError, DiffGemmaError, PeerError
from ..cache import PrefixCache
from ..threads import clear_at_the_end
from .group import Distributed, Group
from .share import Done, Share, T

HEAD = 4_096  # bytes of a message that travel in its first exchange
RECORD = 4_096  # bytes that each machine says where all say something
LARGE = 1 << 22  # bytes of an exchange by which a link is measured
IDLE, REST = 1.0, 0.2  # seconds without a pass until the others may sleep, and how long they do
LOST = "another machine that shares the model was lost; what it said is above, or on its own screen."
_DTYPES = {str(d): d for d in (mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.int64, mx.uint32, mx.bool_)}


class Ranks(Share):
    """One of the machines of a group."""

    def __init__(self, group: Group):
        super().__init__(group.rank, group.size)
        self._group = group
        self.gathers, self.gathered_bytes = 0, 0  # so far, and what this machine sent in them
        self.messages, self.message_bytes = 0, 0
        self.lost: PeerError | None = None

    def gather(self, *pieces: mx.array) -> list[mx.array]:
        flat = mx.concatenate([piece.flatten() for piece in _alike(pieces)])
        whole = self._gathered(flat).reshape(self.size, -1)  # [machines, n]
        made, start = [], 0
        for piece in pieces:
            *rest, width = piece.shape
            count = piece.size * piece.dtype.size // flat.dtype.size
            part = whole[:, start : start + count].view(piece.dtype).reshape(self.size, -1, width)
            made.append(part.swapaxes(0, 1).reshape(*rest, self.size * width))
            start += count
        return made

    def together(self, work: Callable[[], T]) -> T:
        """The first machine tells what happened to any; the others end silently."""
        made, error = None, None
        try:
            made = work()
        except BaseException as caught:  # Ctrl-C, too, is told to the others
            error = caught
        said = self._everyone({"error": None if error is None else _in_words(error)})
        failed = next((rank for rank, record in enumerate(said) if record["error"] is not None), None)
        if failed is None:
            return cast(T, made)
        if self.rank:
            raise SystemExit(0)
        raise error or ConfigError(f"machine {failed + 1} of {self.size}: {said[failed]['error']}")

    def agree(self, **facts: str) -> None:
        said = self._everyone(facts)
        for name in facts:
            if other := next((rank for rank, record in enumerate(said) if record[name] != said[0][name]), 0):
                raise ConfigError(
                    f"the machines have different {name}: the first {said[0][name]}, number {other + 1}"
                    f" {said[other][name]}.\nA model is shared by machines with the same pack, versions and options."
                )

    def least(self, number: int) -> int:
        return min(record["number"] for record in self._everyone({"number": number}))

    def rehearse(self, nbytes: int, times: int) -> float:
        """Seconds of so many exchanges of so many bytes, which every machine takes part in."""
        piece = mx.zeros((nbytes // 4,), mx.uint32)
        begun = time.perf_counter()
        for _ in range(times):
            self._waited(self._gathered(piece))
        return time.perf_counter() - begun

    def _everyone(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """What each machine says, by rank."""
        raw = json.dumps(record, ensure_ascii=False).encode().ljust(RECORD)
        words = mx.array(np.frombuffer(raw, np.uint32))
        said = np.array(self._waited(self._gathered(words))).reshape(self.size, -1)
        return [json.loads(row.tobytes()) for row in said]

    def _gathered(self, flat: mx.array) -> mx.array:
        self.gathers += 1
        self.gathered_bytes += flat.nbytes * (self.size - 1)
        return self._group.gathered(flat)

    def _sent(self, words: np.ndarray) -> np.ndarray:
        """The leader's words, on every machine: the others add zeros."""
        self.messages += 1
        self.message_bytes += words.nbytes
        return np.array(self._waited(self._group.told(mx.array(words))))

    def _waited(self, array: mx.array) -> mx.array:
        try:
            mx.eval(array)
        except RuntimeError as error:
            self._lose(error)
        return array

    def _lose(self, error: Exception) -> NoReturn:
        self.lost = self.lost or (error if isinstance(error, PeerError) else PeerError(LOST))
        raise self.lost from error


def _in_words(error: BaseException) -> str:
    return str(error)[:1000] if isinstance(error, DiffGemmaError) else type(error).__name__


def _alike(pieces: Sequence[mx.array]) -> Sequence[mx.array]:
    """Of one dtype, so that they travel together."""
    if len({piece.dtype for piece in pieces}) == 1:
        return pieces
    return [piece.flatten().view(mx.uint16) for piece in pieces]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A message of the leader."""

    what: str
    cache: int | None  # the number of the prefix that the pass is about
    log: list[list[Any]]  # what became of prefixes since the message before: see Shared
    plain: dict[str, Any]
    arrays: dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between machines: seconds of an exchange of next to nothing, and what a machine sends in a second."""

    wait: float
    bytes_per_second: float


class Follower(Ranks):
    """Any machine but the first."""

    def hear(self) -> Told:
        """The leader's next message. Errors: PeerError."""
        head = self._sent(np.zeros(HEAD // 4, np.uint32))
        rest = int(head[0]) - (HEAD // 4 - 1)
        words = head[1:]
        if rest > 0:
            words = np.concatenate([words, self._sent(np.zeros(rest, np.uint32))])
        return _unpacked(words)

    @contextmanager
    def announced(self, what: str, cache: PrefixCache | None = None, **told: Any) -> Iterator[Done]:
        yield self._done

    def _done(self, *arrays: Any) -> None:
        try:
            mx.eval(*arrays)
        except RuntimeError as error:
            _if_lost(error, self._lose)
            raise


class Leader(Ranks):
    """The first machine."""

    def __init__(self, group: Group):
        super().__init__(group)
        self._log: list[list[Any]] = []
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._last = time.monotonic()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="machines", daemon=True)

    def make_cache(self, config: ModelConfig, **options: Any) -> PrefixCache:
        return Shared(self._log, self._numbers, config, **options)

    @contextmanager
    def announced(self, what: str, cache: PrefixCache | None = None, **told: Any) -> Iterator[Done]:
        """A signal waits for the end of the pass, which the others would else wait for. An error in it is the end."""
        with _uninterrupted(), self._lock:
            if self.lost is not None:
                raise self.lost
            try:
                self._tell(what, cache.number if isinstance(cache, Shared) else None, told)
                yield mx.eval
            except PeerError:
                raise
            except Exception as error:
                _if_lost(error, self._lose)
                self._lose(PeerError(str(error)) if isinstance(error, DiffGemmaError) else error)
            except BaseException:  # the others wait inside of the pass: they are not to be told of an end
                self.lost = self.lost or PeerError(LOST)
                raise
            finally:
                self._last = time.monotonic()

    def measure(self) -> Link:
        """How fast the link is, by exchanges as a step has them: of next to nothing, and of some megabytes."""
        seconds: list[float] = []
        for nbytes, times in ((4, 20), (4, 100), (LARGE, 10)):  # the first warms up
            with self.announced("link", nbytes=nbytes, times=times):
                seconds.append(self.rehearse(nbytes, times) / times)
        _, wait, large = seconds
        return Link(wait=wait, bytes_per_second=(self.size - 1) * LARGE / max(large - wait, 1e-9))

    def ready(self) -> None:
        atexit.register(self.end)
        self._watcher.start()

    def end(self) -> None:
        """There will be no further pass."""
        if self._over.is_set():
            return
        self._over.set()
        self._watcher.join()
        if self.lost is None:
            with suppress(PeerError):
                self._tell("end", None, {})

    def _watch(self) -> None:
        """Where no pass has come for a while, let the others sleep between looks: who waits for a message spins. And
        notice when one of them is lost."""
        clear_at_the_end()
        with suppress(PeerError):
            while not self._over.wait(REST):
                with self._lock:
                    if self.lost is None and time.monotonic() - self._last > IDLE:
                        self._tell("rest", None, {})

    def _lose(self, error: Exception) -> NoReturn:
        """The main thread is told as by a signal, where another one has noticed."""
        if self.lost is None and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGTERM)
        super()._lose(error)

    def _tell(self, what: str, cache: int | None, told: dict[str, Any]) -> None:
        log = self._log[:]
        words = _packed(what, cache, log, told)
        del self._log[: len(log)]
        head = np.zeros(HEAD // 4, np.uint32)
        inside = words[: HEAD // 4 - 1]
        head[0], head[1 : 1 + len(inside)] = len(words), inside
        self._sent(head)
        if len(words) > len(inside):
            self._sent(words[len(inside) :])


def _if_lost(error: Exception, lose: Callable[[Exception], NoReturn]) -> None:
    """MLX has no type for it."""
    if isinstance(error, RuntimeError) and str(error).startswith(("[ring]", "[jaccl]")):
        lose(error)


class Shared(PrefixCache):
    """A prefix of the leader, which has counterparts on the other machines: what becomes of it is told with the next
    pass, as [what, number, …]."""

    def __init__(self, log: list[list[Any]], numbers: Iterator[int], config: ModelConfig, **options: Any):
        super().__init__(config, **options)
        self._log, self._numbers = log, numbers
        self._begin("make", options)

    def _begin(self, what: str, told: Any) -> None:
        self.number = next(self._numbers)
        self._log.append([what, self.number, told])
        weakref.finalize(self, self._log.append, ["drop", self.number, None])

    def reserve(self, length: int) -> None:
        super().reserve(length)
        self._log.append(["reserve", self.number, length])

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self._log.append(["keep", self.number, rows])

    def fork(self) -> "Shared":
        other = cast(Shared, super().fork())
        other._begin("fork", self.number)
        return other


class Counterparts:
    """A follower's prefixes, by number."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._kept: dict[int, PrefixCache] = {}

    def __getitem__(self, number: int | None) -> PrefixCache:
        return self._kept[cast(int, number)]

    def __len__(self) -> int:
        return len(self._kept)

    def follow(self, log: list[list[Any]]) -> None:
        """Do what was done with the leader's."""
        for what, number, told in log:
            match what:
                case "make":
                    self._kept[number] = PrefixCache(self.config, **told)
                case "fork":
                    self._kept[number] = self._kept[told].fork()
                case "reserve":
                    self._kept[number].reserve(told)
                case "keep":
                    self._kept[number].keep(told)
                case _:
                    self._kept.pop(number, None)


def join(group: Group | None = None) -> Ranks:
    """This process's place among the machines that mlx.launch started, or in another group. Errors: ConfigError."""
    group = group or Distributed()
    return Follower(group) if group.rank else Leader(group)


# ------------------------------------------------------------------------------------------------------ the messages


def _packed(what: str, cache: int | None, log: list[list[Any]], told: dict[str, Any]) -> np.ndarray:
    """A message as words: the length of a JSON text, the text, the arrays."""
    arrays = {name: value for name, value in told.items() if isinstance(value, mx.array)}
    text = json.dumps(
        {
            "what": what,
            "cache": cache,
            "log": log,
            "plain": {name: value for name, value in told.items() if name not in arrays},
            "arrays": [[name, str(array.dtype), array.shape] for name, array in arrays.items()],
        }
    ).encode()
    text += b" " * (-len(text) % 4)
    parts = [np.array([len(text)], np.uint32), np.frombuffer(text, np.uint32)]
    for array in arrays.values():
        raw = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()
        parts.append(np.frombuffer(raw + b"\0" * (-len(raw) % 4), np.uint32))
    return np.concatenate(parts)


def _unpacked(words: np.ndarray) -> Told:
    size = int(words[0])
    raw = words[1:].tobytes()
    message = json.loads(raw[:size])
    arrays, start = {}, size
    for name, kind, shape in message["arrays"]:
        dtype = _DTYPES[kind]
        held = {mx.bfloat16: np.uint16, mx.bool_: np.bool_}.get(dtype) or np.dtype(kind.removeprefix("mlx.core."))
        count = int(np.prod(shape, dtype=np.int64))
        found = mx.array(np.frombuffer(raw, held, count, start).reshape(shape))
        arrays[name] = found.view(dtype) if dtype == mx.bfloat16 else found
        start += -(-count * dtype.size // 4) * 4
    return Told(what=message["what"], cache=message["cache"], log=message["log"], plain=message["plain"], arrays=arrays)


# ------------------------------------------------------------------------------------------------------- the signals


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM count at the end of what is inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        for number, handler in reversed(before.items()):  # Ctrl-C last: what has come until then is raised here
            signal.signal(number, handler)
        for number in caught[:1]:
            signal.raise_signal(number)
