"""The application: from HTTP to a protocol's translation and the scheduler, and back.

Every endpoint works alike. The body is read and translated into an Order; when the scheduler has accepted it, a
stream's headers go out, before the prompt is read; what the order's News become is the protocol's matter. Who
disconnects stops the work within a step, whether it streams or not.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..readers import parse_json
from ..text.pictures.sources import Access
from . import pictures
from .exchange import Accepted, Decisions, Drafted, Ended, Failed, Full, News, Order, Refused, Served
from .guard import Guard, Rules
from .protocols import anthropic, decisions, fim, ollama, openai, responses
from .scheduler import Scheduler

LARGEST = 32_000_000  # bytes of a request
OPENING = 4  # requests whose pictures are opened at a time
SILENCE = 5.0  # seconds after which a stream says that it lives
FOLDER = Path(__file__).parent / "page"
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
SAFE = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

T = TypeVar("T")


class Translation(Protocol):
    """One request in a protocol's words, and how its answer is said in them."""

    streams: bool
    media_type: str  # of a stream

    @property
    def order(self) -> Order | Decisions: ...
    def accept(self, accepted: Accepted) -> dict[str, Any] | None: ...  # an answer, where nothing more is wanted
    def frames(self, news: News) -> Iterator[str]: ...
    def alive(self) -> str: ...
    def whole(self, ended: Ended) -> dict[str, Any]: ...


Read = Callable[[Any, Served], Translation]
Fault = Callable[..., dict[str, Any]]  # status, message, param=, code= → an error's body


def app(scheduler: Scheduler, served: Served, rules: Rules | None = None, access: Access = pictures.HERE) -> ASGIApp:
    """The ASGI application. The scheduler has been started. `access`: where requests may have their pictures from."""

    async def health(_: Request) -> Response:
        told = scheduler.health() | {"model": served.name}
        return JSONResponse(told, status_code=200 if told["status"] == "ok" else 503)

    async def models(_: Request) -> Response:
        return JSONResponse(openai.models(served))

    async def model(request: Request) -> Response:
        if request.path_params["name"] != served.name:
            message = f"There is no model {request.path_params['name'][:100]!r} here, only {served.name!r}."
            return JSONResponse(openai.fault(404, message, param="model", code="model_not_found"), status_code=404)
        return JSONResponse(openai.model(served))

    async def tags(_: Request) -> Response:
        return JSONResponse(ollama.tags(served))

    async def version(_: Request) -> Response:
        return JSONResponse({"version": ollama.VERSION})

    async def show(request: Request) -> Response:
        try:
            body = parse_json(await _body(request), "the request", fault=Refused)
            return JSONResponse(ollama.show(body, served))
        except Refused as error:
            return JSONResponse(ollama.fault(error.status, str(error)), status_code=error.status)

    async def described(_: Request) -> Response:
        return Response((FOLDER.parent / "openapi.json").read_bytes(), media_type="application/json")

    def endpoint(path: str, read: Read, fault: Fault) -> Route:
        return Route(path, Endpoint(scheduler, served, read, fault, access), methods=["POST"])

    routes = [
        endpoint("/v1/chat/completions", openai.read_chat, openai.fault),
        endpoint("/v1/completions", openai.read_completion, openai.fault),
        endpoint("/v1/fim/completions", fim.read_fim, openai.fault),
        endpoint("/v1/decisions", decisions.read_decisions, openai.fault),
        endpoint("/v1/responses", responses.Turns().read, openai.fault),
        endpoint("/v1/messages", anthropic.read_messages, anthropic.fault),
        endpoint("/v1/messages/count_tokens", anthropic.read_count, anthropic.fault),
        endpoint("/api/chat", ollama.read_chat, ollama.fault),
        endpoint("/api/generate", ollama.read_generate, ollama.fault),
        Route("/api/tags", tags),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/version", version),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/openapi.json", described),
        *(Route(path, _file(name)) for path, name in PAGE.items()),
    ]
    inside = Starlette(routes=routes, exception_handlers={HTTPException: _unknown, Exception: _broken})
    return Guard(inside, rules or Rules())


class Endpoint:
    """One protocol's way in."""

    def __init__(self, scheduler: Scheduler, served: Served, read: Read, fault: Fault, access: Access):
        self.scheduler, self.served, self.read, self.fault, self.access = scheduler, served, read, fault, access
        self.opening = asyncio.Semaphore(OPENING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mailbox = Mailbox()
        try:
            body = parse_json(await _body(Request(scope, receive)), "the request", fault=Refused)
            translation = self.read(body, self.served)
            job = self.scheduler.submit(await self._opened(translation.order), mailbox.post)
        except Refused as error:
            await self._no(error.status, str(error), param=error.param, code=error.code)(scope, receive, send)
            return
        except Full as error:
            full = self._no(429, str(error), code="queue_full", headers={"retry-after": str(error.seconds)})
            await full(scope, receive, send)
            return
        answering = asyncio.ensure_future(self._answer(translation, mailbox, scope, receive, send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            job.cancel()
            answering.cancel()
            leaving.cancel()

    async def _opened(self, order: Order | Decisions) -> Order | Decisions:
        """With its pictures. Errors: Refused."""
        if not pictures.wanted(order):
            return order
        async with self.opening:
            return await asyncio.to_thread(pictures.opened, order, self.served, self.access)

    async def _answer(
        self, translation: Translation, mailbox: "Mailbox", scope: Scope, receive: Receive, send: Send
    ) -> None:
        first = await mailbox.next()
        told = translation.accept(first) if isinstance(first, Accepted) else None
        if told is not None:
            await JSONResponse(told)(scope, receive, send)
        elif isinstance(first, Failed) or not translation.streams:
            response = await self._whole(translation, mailbox, first)
            await response(scope, receive, send)
        else:
            await self._stream(translation, mailbox, first, send)

    async def _whole(self, translation: Translation, mailbox: "Mailbox", news: News) -> Response:
        while not isinstance(news, Ended | Failed):
            news = await mailbox.next()
        if isinstance(news, Ended):
            return JSONResponse(translation.whole(news))
        status, code = openai.STATUS[news.why], "context_length_exceeded" if news.too_long else None
        return self._no(status, news.message, param="messages" if news.too_long else None, code=code)

    async def _stream(self, translation: Translation, mailbox: "Mailbox", first: News, send: Send) -> None:
        headers = [
            (b"content-type", f"{translation.media_type}; charset=utf-8".encode()),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        news: News | None = first
        while True:
            frames = [translation.alive()] if news is None else list(translation.frames(news))
            if frames:
                body = "".join(frames).encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if isinstance(news, Ended | Failed):
                break
            try:
                news = await asyncio.wait_for(mailbox.next(), SILENCE)
            except TimeoutError:
                news = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _no(self, status: int, message: str, *, headers: dict[str, str] | None = None, **about: Any) -> Response:
        return JSONResponse(self.fault(status, message, **about), status_code=status, headers=headers)


class Mailbox:
    """News on their way from the model's thread to an endpoint. A draft that nobody has read yet gives way to the next
    one of its row: a slow client sees fewer steps, and nobody waits for it."""

    def __init__(self) -> None:
        self._loop, self._news, self._some = asyncio.get_running_loop(), deque[News](), asyncio.Event()

    def post(self, news: News) -> None:
        """In any thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, news)
        except RuntimeError:  # the loop has ended: nobody reads any more
            return

    def _put(self, news: News) -> None:
        if isinstance(news, Drafted):
            rest = (old for old in self._news if not (isinstance(old, Drafted) and old.row == news.row))
            self._news = deque(rest)
        self._news.append(news)
        self._some.set()

    async def next(self) -> News:
        while not self._news:
            self._some.clear()
            await self._some.wait()
        return self._news.popleft()


async def _body(request: Request) -> bytes:
    """Errors: Refused for one that is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise Refused(f"the request is larger than {LARGEST // 1_000_000} MB.", status=413)
        parts.append(part)
    return b"".join(parts)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(_: Request) -> Response:
        return Response((FOLDER / name).read_bytes(), media_type=KINDS[name[name.rindex(".") :]], headers=SAFE)

    return page


async def _unknown(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)
    words = {
        404: f"There is no {request.url.path[:200]} here.",
        405: f"{request.url.path[:200]} takes no {request.method}.",
    }
    message = words.get(error.status_code, error.detail)
    return JSONResponse(openai.fault(error.status_code, message), status_code=error.status_code, headers=error.headers)


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(openai.fault(500, f"{type(error).__name__} in the server: see its log."), status_code=500)
