"""A server for the tests: a real one, on a free port, in threads of this process."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.server.app import app
from mlx_diffgemma.server.guard import Rules
from mlx_diffgemma.server.pictures import HERE
from mlx_diffgemma.server.scheduler import Scheduler
from mlx_diffgemma.text.pictures.sources import Access
from tests import small

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, kw_only=True)
class Running:
    url: str
    scheduler: Scheduler

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **settings)

    def post(self, body: Any, path: str = CHAT, **settings: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **settings)

    def chunks(self, body: Any, path: str = CHAT) -> list[dict[str, Any]]:
        """Every chunk of a stream, which must end as streams do."""
        with self.client() as client, client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]


@contextmanager
def serving(
    load: Callable[[], DiffusionGemma],
    *,
    rules: Rules | None = None,
    access: Access = HERE,
    behind: Callable[[ASGIApp], ASGIApp] = lambda inside: inside,
    **options: Any,
) -> Iterator[Running]:
    """`behind` is put in front of the application."""
    scheduler = Scheduler(load, **options)
    scheduler.start()
    served = scheduler.served("small")
    inside = app(scheduler, served, rules, access)
    config = uvicorn.Config(behind(inside), log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield Running(url=f"http://127.0.0.1:{listener.getsockname()[1]}", scheduler=scheduler)
        finally:
            scheduler.stop()
            server.should_exit = True
            thread.join(30)
            assert scheduler.join(30) and not thread.is_alive()


def small_model(folder: Path) -> Callable[[], DiffusionGemma]:
    folder.mkdir(parents=True, exist_ok=True)
    return lambda: small.model(folder)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def content(chunks: list[dict[str, Any]], name: str = "content", row: int = 0) -> str:
    """What a stream's deltas say together."""
    deltas = (choice["delta"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == row)
    return "".join(delta.get(name) or "" for delta in deltas)
