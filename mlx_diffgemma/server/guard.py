"""Who may ask: a check in front of every request.

A page of the web can make its visitor's browser send requests to this machine. Its name resolved to 127.0.0.1 shows in
`Host` (DNS rebinding), its own address in `Origin`. Beyond this machine a key is needed.
"""

import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .protocols.openai import fault

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
OPEN = frozenset(("/", "/page.css", "/page.js", "/health"))  # needs no key


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Whom to let in."""

    key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK  # names that requests may call this server by; None: any
    origins: frozenset[str] = frozenset()  # of pages elsewhere that may ask, as https://example.org


class Guard:
    """The application, behind the rules."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        refusal = self._refusal(scope["path"], scope["method"], headers)
        granted = origin is not None and origin in self.rules.origins

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and granted:
                answered = MutableHeaders(scope=message)
                answered["access-control-allow-origin"] = origin or ""
                answered["vary"] = "Origin"
            await send(message)

        if refusal is not None:
            await refusal(scope, receive, named)
        elif granted and scope["method"] == "OPTIONS":
            allowed = {"access-control-allow-methods": "GET, POST", "access-control-allow-headers": "*, Authorization"}
            await Response(status_code=204, headers=allowed)(scope, receive, named)
        else:
            await self.app(scope, receive, named)

    def _refusal(self, path: str, method: str, headers: Headers) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.rules.hosts is not None and _name(host) not in self.rules.hosts:
            return _no(403, f"This server is not called {host[:100]!r}. It answers on {', '.join(sorted(LOOPBACK))}.")
        if origin is not None and origin not in self.rules.origins and origin.partition("://")[2] != host:
            return _no(403, f"Pages of {origin[:100]} may not ask this server: see --allowed-origins.")
        if self.rules.key is not None and path not in OPEN and method != "OPTIONS" and not self._has_key(headers):
            return _no(401, "The key is missing or wrong. Send it as: Authorization: Bearer KEY.", "invalid_api_key")
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = (bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        key = (self.rules.key or "").encode()
        return any(hmac.compare_digest(one.strip().encode(), key) for one in given)


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _no(status: int, message: str, code: str | None = None) -> Response:
    return JSONResponse(fault(status, message, code=code), status_code=status)
