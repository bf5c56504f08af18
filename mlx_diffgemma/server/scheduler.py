"""One thread holds the model: it loads it, and lets orders take turns. Only plain data leaves it.

A turn is one canvas, or one chunk of a prompt. Of the orders at work each has its turn, then the next; a canvas is
never interrupted, so the first of two has its text after one canvas's time and the second after two, where turns of a
step would give both after two. Between any two steps new orders are looked at, so that what cannot be met is refused at
once, and those that nobody waits for any more are dropped.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx

from ..errors import DiffGemmaError, PeerError
from ..model import threads
from ..pipeline.model import DiffusionGemma
from ..text.pictures.images import PictureConfig
from .answering import Answering, Beat, TooLong, free_bytes
from .deciding import Deciding
from .exchange import Decisions, Ended, Failed, Full, News, Order, Served
from .prefixes import Prefixes

log = logging.getLogger(__name__)

Hear = Callable[[News], None]  # called in the model's thread
SECONDS = 10  # a turn takes about so long where nothing was measured yet


class Job:
    """An order in the scheduler's hands. `cancel` may be called in any thread, any time."""

    def __init__(self, order: Order | Decisions, hear: Hear):
        self.order, self.hear = order, hear
        self.since = time.monotonic()
        self.cancelled = threading.Event()
        self.answering: Answering | Deciding | None = None
        self.beats: Any = None  # while it is at work
        self.queued = 0.0

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled.set()


class Scheduler:
    """The thread, and the queue in front of it."""

    def __init__(
        self,
        load: Callable[[], DiffusionGemma],
        *,
        parallel: int = 2,
        most_queued: int = 32,
        most_tokens: int | None = None,
        cache_bytes: int | None = None,
    ):
        self._load, self.parallel, self.most_queued = load, parallel, most_queued
        self.most_tokens, self._cache_bytes = most_tokens, cache_bytes
        self._changed = threading.Condition()
        self._new: deque[Job] = deque()  # not looked at yet
        self._waiting: deque[Job] = deque()
        self._working: list[Job] = []
        self._stopping = False
        self._facts: dict[str, Any] = {}
        self._lasted: deque[float] = deque(maxlen=20)  # seconds that the last orders took
        self.state: Literal["loading", "ready", "stopped", "dead"] = "loading"
        self.fault: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="model", daemon=True)

    # ------------------------------------------------------------------------------------------- for other threads

    def start(self) -> None:
        """Load the model; returns when it can answer. Errors: whatever loading raises."""
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self.state != "loading")
        if self.fault is not None:
            raise self.fault

    def served(self, name: str) -> Served:
        """What protocols tell of the model, under the name that clients know it by. It has been loaded."""
        return Served(name=name, **self._facts)

    def submit(self, order: Order | Decisions, hear: Hear) -> Job:
        """Put an order into the queue. `hear` gets Accepted or Failed within a step, and news until Ended or Failed.

        Errors: Full.
        """
        job = Job(order, hear)
        with self._changed:
            if self.state == "ready" and not self._stopping:
                self._check_room()
                self._new.append(job)
                self._changed.notify_all()
                return job
        why = "stopped" if self._stopping or self.state == "stopped" else "broken"
        hear(Failed(why=why, message=f"The server is {self.state if self.state != 'ready' else 'stopping'}."))
        return job

    def stop(self) -> None:
        """End within a step: those at work and in the queue are told that the server stops."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> bool:
        """Whether the thread has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def health(self) -> dict[str, Any]:
        """The truth about the thread."""
        with self._changed:
            state = self.state if self._thread.is_alive() or self.state in ("stopped", "dead") else "dead"
            queued = len(self._new) + len(self._waiting)
            return {"status": "ok" if state == "ready" else state, "running": len(self._working), "queued": queued}

    def _check_room(self) -> None:
        queued = [job for job in (*self._new, *self._waiting) if not job.cancelled.is_set()]
        if len(queued) >= self.most_queued:
            each = sum(self._lasted) / len(self._lasted) if self._lasted else SECONDS
            seconds = max(1, min(120, round(each * len(queued) / self.parallel)))
            raise Full(f"{len(queued)} requests are waiting already. Try again in {seconds} s.", seconds=seconds)

    # ----------------------------------------------------------------------------------------- the model's own thread

    def _live(self) -> None:
        try:
            threads.clear_at_the_end()
            self.model = self._load()
            self.model.tokenizer  # noqa: B018  raises, and says what is missing
            reads = self.model.tokenizer.reads
            self._facts = {
                "context": self.model.config.max_position_embeddings,
                "tools": reads("tools"),
                "thinking": reads("enable_thinking"),
                "pictures": _pictures(self.model),
            }
            self._free = free_bytes(self.model)
            self.prefixes = Prefixes(self._free // 4 if self._cache_bytes is None else self._cache_bytes)
            with self.model.alone():
                self._say("ready")
                self._work()
            self._say("stopped")
        except BaseException as error:
            self.fault = error
            if self.state == "ready" and not isinstance(error, PeerError):
                log.exception("the model's thread has ended")
            self._say("dead")
        finally:
            why = "stopped" if self.fault is None else "broken"
            message = "The server has stopped." if why == "stopped" else "The server's model has failed."
            for job in self._everybody():
                self._end(job, Failed(why=why, message=message))
            self.__dict__.pop("model", None)
            self.__dict__.pop("prefixes", None)
            mx.synchronize()
            mx.clear_cache()

    def _say(self, state: Any) -> None:
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def _everybody(self) -> list[Job]:
        with self._changed:
            return [*self._working, *self._waiting, *self._new]

    def _work(self) -> None:
        while True:
            with self._changed:
                if not (self._stopping or self._working or self._waiting or self._new):
                    mx.clear_cache()
                    self._changed.wait_for(lambda: self._stopping or self._new)
                if self._stopping:
                    return
            self._look_around()
            self._admit()
            for job in list(self._working):
                self._take_turn(job)

    def _look_around(self) -> None:
        """Look at new orders, and let go of those that nobody waits for."""
        while self._new:
            self._accept(self._new[0])
        for job in [job for job in self._waiting if job.cancelled.is_set()]:
            self._end(job, None)

    def _accept(self, job: Job) -> None:
        """Into the queue, or refused."""
        if job.cancelled.is_set():
            self._end(job, None)
            return
        try:
            share = self._free // self.parallel
            if isinstance(job.order, Decisions):
                job.answering = Deciding(self.model, job.order)
            else:
                job.answering = Answering(self.model, job.order, most_tokens=self.most_tokens, most_bytes=share)
        except DiffGemmaError as error:
            self._end(job, Failed(why="refused", message=str(error), too_long=isinstance(error, TooLong)))
            return
        except Exception as error:
            log.exception("an order could not be looked at")
            self._end(job, Failed(why="broken", message=f"{type(error).__name__} while the request was read."))
            return
        with self._changed:
            self._new.popleft()
            self._waiting.append(job)
        job.hear(job.answering.accepted)

    def _admit(self) -> None:
        """Let the first in the queue begin, while there is a place and memory for it."""
        while self._waiting and len(self._working) < self.parallel:
            job = self._waiting[0]
            assert job.answering is not None
            others = sum(other.answering.needed for other in self._working if other.answering)
            self.prefixes.shrink(max(self._free - others - job.answering.needed, 0))
            if self._working and others + job.answering.needed + self.prefixes.nbytes > self._free:
                return
            job.queued = time.monotonic() - job.since
            job.beats = job.answering.run(self.prefixes)
            with self._changed:
                self._waiting.popleft()
                self._working.append(job)

    def _take_turn(self, job: Job) -> None:
        """Until it has no turn left, is over, or nobody waits for it."""
        while not (self._stopping or job.cancelled.is_set()):
            try:
                beat: Beat | None = next(job.beats, None)
            except PeerError:
                raise
            except DiffGemmaError as error:
                self._end(job, Failed(why="refused", message=str(error)))
                return
            except Exception as error:
                log.exception("an order failed")
                self._end(job, Failed(why="broken", message=f"{type(error).__name__} while it was answered."))
                return
            if beat is None:
                return
            for news in beat.news:
                if isinstance(news, Ended):
                    self._end(job, replace(news, seconds=news.seconds | {"queue": job.queued}))
                    return
                job.hear(news)
            self._look_around()
            if beat.turn_is_over:
                return
        if job.cancelled.is_set():
            self._end(job, None)

    def _end(self, job: Job, last: News | None) -> None:
        """Out of all lists, with a line in the log. What it held is let go of first."""
        if job.beats is not None:
            job.beats.close()
            self._lasted.append(time.monotonic() - job.since - job.queued)
        with self._changed:
            for jobs in (self._new, self._waiting, self._working):
                if job in jobs:
                    jobs.remove(job)
        log.info(_line(job, last))
        job.answering = job.beats = None
        if last is not None:
            job.hear(last)


def _pictures(model: DiffusionGemma) -> PictureConfig | None:
    """How the model wants pictures, if it has eyes."""
    try:
        return model.seeing.pictures
    except DiffGemmaError as error:
        log.debug("no pictures: %s", error)
        return None


def _line(job: Job, last: News | None) -> str:
    """One line about a request: why it ended, where its time went, and how much was said."""
    if isinstance(last, Ended):
        seconds = last.seconds
        tokens, steps = (sum(getattr(answer, name) for answer in last.answers) for name in ("tokens", "steps"))
        spent = f"queue {seconds['queue']:.2f} s · prefill {seconds['prefill']:.2f} s"
        spent += f" · prompt {last.prompt_tokens} ({last.reused_tokens} reused) · {steps} steps · {tokens} tokens"
        why = ",".join(dict.fromkeys(answer.reason for answer in last.answers))
        return f"{why} · {spent} · {tokens / max(seconds['denoise'], 1e-9):.1f} tok/s"
    waited = f"after {time.monotonic() - job.since:.2f} s"
    if last is None:
        return f"{'cancelled' if job.queued or job.beats else 'cancelled in the queue'} {waited}"
    return f"{getattr(last, 'why', '?')} {waited}: {getattr(last, 'message', '')}".replace("\n", " ")
