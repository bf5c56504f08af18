"""A stage for clients: what the model says follows from what it is asked, and what was asked is kept.

A request that offers a tool the stage has a line for gets a call of it; one with a tool's answer gets what the answer
says; every other one gets GREETING. So a client has made a round trip when WORD, which stands in the tool's answer
alone, comes out of it.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.server.scripted import Scripted, call
from tests.server.serving import Running, serving

GREETING = "Hello there, dear reader."
WORD = re.compile(r"plover-\d+")
THOUGHT = "<|channel>thought\nhm, yes<channel|>"
KINDS = ("function_call_output", "custom_tool_call_output", "tool_result")  # of items and blocks with a tool's answer


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A request, and the status of its answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    status: int


class Stage:
    """An application in front of the server's: one request at a time."""

    def __init__(self, model: Scripted, inside: ASGIApp):
        self.model, self.inside = model, inside
        self.calls: dict[str, dict[str, Any]] = {"weather": {"city": "Rome", "days": 3}}  # arguments by tool
        self.heard: list[Heard] = []
        self._turn = asyncio.Lock()

    @contextmanager
    def calling(self, calls: dict[str, dict[str, Any]]) -> Iterator[None]:
        """Other tools than the usual one are called."""
        usual, self.calls = self.calls, calls
        try:
            yield
        finally:
            self.calls = usual

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, statuses = await _whole(receive), list[int]()

        async def replay() -> Message:
            return {"type": "http.request", "body": unread.pop()} if unread else await receive()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        unread = [body]
        async with self._turn:
            self.model.script = self.line(json.loads(body) if body else {})
            await self.inside(scope, replay, noting)
        told = {"method": scope["method"], "path": scope["path"], "headers": dict(Headers(scope=scope))}
        self.heard.append(Heard(**told, body=json.loads(body) if body else None, status=(statuses or [0])[0]))

    def line(self, body: dict[str, Any]) -> str:
        """What the model says to this request."""
        if answers := list(_answers(body)):
            words = WORD.findall(answers[-1])
            return THOUGHT + f"The tool says {words[-1] if words else 'nothing'}."
        offered = _offered(body.get("tools") or ())
        name = next((name for name in offered if name in self.calls), None)
        return GREETING if name is None else "I look." + call(name, **self.calls[name])


@contextmanager
def staged(folder: Path) -> Iterator[tuple[Running, Stage]]:
    """A server with a stage in front."""
    model, made = Scripted(folder, blind=True), list[Stage]()
    with serving(model, behind=lambda inside: made.append(Stage(model, inside)) or made[0]) as running:
        yield running, made[0]


def _answers(body: dict[str, Any]) -> Iterator[str]:
    """What tools said, in any of the protocols, as text."""
    said = body.get("messages") or body.get("input") or ()
    for item in said if isinstance(said, list) else ():
        blocks = item.get("content")
        for one in [item, *(blocks if isinstance(blocks, list) else ())]:
            if one.get("role") == "tool" or one.get("type") in KINDS:
                yield json.dumps(one)


def _offered(tools: Any) -> Iterator[str]:
    for tool in tools:
        yield from _offered(tool.get("tools") or ())
        if name := tool.get("function", tool).get("name"):
            yield name


async def _whole(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)
