"""Requests together: turns, the queue, those who leave, what does not fit, and a thread that dies."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_diffgemma.model.memory import weight_bytes
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.server import app as application
from mlx_diffgemma.server.answering import STEP, held
from mlx_diffgemma.server.exchange import Conversation, Drafted, Ended, Failed, News, Order, Said
from mlx_diffgemma.server.scheduler import Scheduler
from tests import small
from tests.server.serving import CHAT, Running, said, serving

LONG = {"messages": said("hello"), "seed": 3, "max_tokens": 200}  # 13 canvases that do not stop early
WAIT = 20.0  # seconds, at most


class Slowed:
    """A small model whose passes take their time, and are counted."""

    def __init__(self, folder: Path, *, step: float = 0.0, encode: float = 0.0):
        self.folder, self.seconds = folder, {"denoise": step, "encode": encode}
        self.passes = {"denoise": 0, "encode": 0}
        self.fault: BaseException | None = None

    def __call__(self) -> DiffusionGemma:
        model = small.model(self.folder)
        for name in self.passes:
            setattr(model.network, name, self._slow(name, getattr(model.network, name)))
        return model

    def _slow(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **settings: Any) -> Any:
            self.passes[name] += 1
            time.sleep(self.seconds[name])
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault
            return run(*args, **settings)

        return slow


def eventually(good: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT
    while not good() and time.monotonic() < end:
        time.sleep(0.01)
    return good()


def order(text: str = "hello", *, tokens: int = 64, drafts: Any = None, seed: int | None = 3) -> Order:
    return Order(of=Conversation(messages=said(text)), options={"max_tokens": tokens}, seed=seed, drafts=drafts)


class Heard:
    """What was heard of some orders, in one list."""

    def __init__(self) -> None:
        self.news: list[tuple[str, News]] = []

    def of(self, name: str) -> Callable[[News], None]:
        return lambda news: self.news.append((name, news))

    def over(self, count: int) -> bool:
        return sum(isinstance(news, Ended | Failed) for _, news in self.news) == count


@contextmanager
def scheduling(load: Callable[[], DiffusionGemma], **options: Any) -> Iterator[Scheduler]:
    scheduler = Scheduler(load, **options)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.stop()
        assert scheduler.join(WAIT)


def test_turns_are_canvases(tmp_path: Path) -> None:
    heard = Heard()
    with scheduling(Slowed(tmp_path, step=0.01)) as scheduler:
        for name in "abc":
            scheduler.submit(order(drafts="text"), heard.of(name))
        assert eventually(lambda: heard.over(3))
    blocks: list[tuple[str, int]] = []
    for name, news in heard.news:
        if isinstance(news, Drafted) and (not blocks or blocks[-1] != (name, news.block)):
            blocks.append((name, news.block))
    assert sorted(blocks) == sorted(set(blocks))  # no canvas was interrupted
    both = [name for name, _ in blocks if name != "c"]
    assert both[:4] == ["a", "b", "a", "b"] and blocks.index(("c", 0)) > min(blocks.index((n, 3)) for n in "ab")
    texts = {name: "".join(n.text for who, n in heard.news if who == name and isinstance(n, Said)) for name in "abc"}
    assert texts["a"] and texts["a"] == texts["b"] == texts["c"]  # the same seed alone, beside another, and later


def test_the_queue_has_an_end_and_opens_again(tmp_path: Path) -> None:
    load = Slowed(tmp_path, step=0.05)
    with serving(load, parallel=1, most_queued=1) as server, server.client() as client:
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as first:
            assert first.status_code == 200 and eventually(lambda: server.scheduler.health()["running"] == 1)
            with client.stream("POST", CHAT, json=LONG | {"stream": True}) as second:
                assert second.status_code == 200 and eventually(lambda: server.scheduler.health()["queued"] == 1)
                third = server.post(LONG)
                assert third.status_code == 429 and 1 <= int(third.headers["retry-after"]) <= 120
                assert third.json()["error"]["type"] == "rate_limit_error"
        load.seconds["denoise"] = 0.0
        assert eventually(lambda: server.scheduler.health()["running"] == 0)
        assert server.post(LONG).status_code == 200


@pytest.mark.parametrize("where", ["denoising", "denoising, not streaming", "prefill", "the queue"])
def test_who_leaves_stops_the_work(where: str, tmp_path: Path) -> None:
    load = Slowed(tmp_path, step=0.05, encode=1.0 if where == "prefill" else 0.0)
    with serving(load, parallel=1) as server, server.client() as other, ExitStack() as stack:
        if where == "the queue":
            stack.enter_context(other.stream("POST", CHAT, json=LONG | {"stream": True}))
        asked = LONG | {"stream": "not" not in where}
        begun = {
            "prefill": lambda: load.passes["encode"] > 0,
            "the queue": lambda: server.scheduler.health()["queued"] == 1,
        }
        asyncio.run(_leave(server, asked, begun.get(where, lambda: load.passes["denoise"] > 1)))
        running = int(where == "the queue")
        assert eventually(lambda: server.scheduler.health() == {"status": "ok", "running": running, "queued": 0})
        passes = dict(load.passes)
        if where != "the queue":
            time.sleep(0.3)
            assert load.passes == passes and (passes["denoise"] > 0) == (where != "prefill")


async def _leave(server: Running, body: dict[str, Any], begun: Callable[[], bool]) -> None:
    """Ask, and go away once the work has begun."""
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT) as client:
        asking = asyncio.create_task(client.post(CHAT, json=body))
        while not begun():
            assert not asking.done()
            await asyncio.sleep(0.01)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


def test_headers_come_before_the_prompt_is_read_and_silence_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "SILENCE", 0.1)
    load = Slowed(tmp_path, encode=1.0)
    asked = LONG | {"stream": True, "max_tokens": 16}
    with serving(load) as server, server.client() as client, client.stream("POST", CHAT, json=asked) as response:
        assert response.status_code == 200 and load.passes["denoise"] == 0
        lines = list(response.iter_lines())
    assert lines.count(": waiting") >= 3 and lines[-2] == "data: [DONE]"


def test_what_does_not_fit_beside_others_waits(tmp_path: Path) -> None:
    """Memory for one and a half requests, and no word of a failure."""
    load = Slowed(tmp_path, step=0.01)

    def tight() -> DiffusionGemma:
        model = load()
        prompt = len(model.ids(said("hello")))
        model.memory_limit = weight_bytes(model.network) + STEP + held(model, prompt + 64) * 3 // 2
        return model

    heard = Heard()
    with scheduling(tight, parallel=2) as scheduler:
        for name in "ab":
            scheduler.submit(order(), heard.of(name))
        scheduler.submit(order(tokens=400), heard.of("c"))
        assert eventually(lambda: heard.over(3))
    said_by = [name for name, news in heard.news if isinstance(news, Said)]
    assert said_by == sorted(said_by) and set(said_by) == {"a", "b"}
    [refused] = [news for name, news in heard.news if name == "c"]
    assert (
        isinstance(refused, Failed)
        and refused.why == "refused"
        and "tokens of prompt and reply would fit" in refused.message
    )


def test_one_request_fails_and_the_next_does_not(tmp_path: Path) -> None:
    load = Slowed(tmp_path)
    with serving(load) as server:
        load.fault = RuntimeError("the device is lost")
        failed = server.post(LONG)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert "device" not in failed.json()["error"]["message"]  # that is for the log
        assert server.post(LONG).status_code == 200


def test_health_tells_the_truth_about_a_dead_thread(tmp_path: Path) -> None:
    load = Slowed(tmp_path)
    with serving(load) as server, server.client() as client:
        assert client.get("/health").json() == {"status": "ok", "running": 0, "queued": 0, "model": "small"}
        load.fault = SystemExit()
        assert server.post(LONG).status_code == 500
        assert eventually(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "dead"
        assert server.post(LONG).status_code == 500


def test_a_model_that_cannot_be_loaded_says_so() -> None:
    def load() -> DiffusionGemma:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        Scheduler(load).start()


def test_a_stream_has_an_end_when_the_server_stops(tmp_path: Path) -> None:
    with serving(Slowed(tmp_path, step=0.05)) as server, server.client() as client:
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.scheduler.stop()
            rest = [line for line in lines if line]
        assert '"error"' in rest[-1] and "data: [DONE]" not in rest
        assert server.post(LONG).status_code == 503


def test_a_prefix_is_read_once(tmp_path: Path) -> None:
    """The second turn encodes what is new; another conversation shares the system prompt."""
    load = Slowed(tmp_path)
    system = {"role": "system", "content": "You are a small model. " * 4}
    first = [system, {"role": "user", "content": "one"}]
    with serving(load) as server:
        asked = {"messages": first, "max_tokens": 16}
        cold = server.post(asked).json()
        assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        turn = [*first, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
        warm = server.post(asked | {"messages": turn}).json()["usage"]
        model = small.model(tmp_path)
        lasting = cold["usage"]["prompt_tokens"]  # all of it: this template writes history as it opens turns
        assert warm["prompt_tokens_details"]["cached_tokens"] == lasting
        other = server.post(asked | {"messages": [system, {"role": "user", "content": "else"}]}).json()["usage"]
        shared = len(model.tokenizer.encode("<bos><|turn>system\n" + system["content"] + "<turn|>\n<|turn>user\n"))
        assert other["prompt_tokens_details"]["cached_tokens"] == shared
        seeded = server.post(asked | {"messages": turn, "seed": 1}).json()["usage"]
        assert seeded["prompt_tokens_details"]["cached_tokens"] == 0  # a seed repeats to the bit
    with serving(load, cache_bytes=0) as server:
        server.post(asked)
        assert server.post(asked).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
