"""The bytes behind a path, a `data:` URI or a URL, bounded in size and time. Nothing is fetched that was not named."""

import base64
import binascii
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlsplit

from ...errors import PromptError

FILE_BYTES = 1 << 28  # more is no picture
URL_BYTES = 1 << 25
URL_SECONDS = 30.0  # from the first look-up to the last byte


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where pictures may be taken from. A server that reads strangers' requests opens no files for them."""

    files: bool = True
    urls: bool = True


ANYWHERE = Access()


def read(source: str | os.PathLike[str] | bytes, access: Access = ANYWHERE) -> tuple[str, bytes]:
    """What to call a source in messages, and its bytes, which are not none.

    Errors: PromptError for a source that is absent, empty, too large, too slow, not allowed, or of an unknown kind.
    """
    name, data = (f"{len(source):,} bytes", source) if isinstance(source, bytes) else _read(source, access)
    if not data:
        raise PromptError(f"{name}: has zero bytes.")
    return name, data


@contextmanager
def opened(source: str | os.PathLike[str] | bytes, access: Access = ANYWHERE) -> Iterator[tuple[str, IO[bytes]]]:
    """`read` for what may be large: a file on disk is not read as a whole, whatever its size."""
    if isinstance(source, bytes) or _scheme(source) or not access.files:
        name, data = read(source, access)
        yield name, BytesIO(data)
        return
    name = shortened(os.fspath(source))
    with ExitStack() as stack:
        with _explained(name):
            _check_file(name, Path(source))
            file = stack.enter_context(Path(source).open("rb"))
        yield name, file


def check(source: str, *, folders: bool = False) -> None:
    """Errors: PromptError for a path at which there is nothing to read; URLs and data: URIs are not looked at."""
    if not _scheme(source):
        with _explained(shortened(source)):
            if not (folders and Path(source).is_dir()):
                _check_file(shortened(source), Path(source))


def _read(source: str | os.PathLike[str], access: Access) -> tuple[str, bytes]:
    scheme, name = _scheme(source), shortened(os.fspath(source))
    if scheme == "data":
        return name, _inline(name, os.fspath(source))
    if scheme in ("http", "https"):
        if not access.urls:
            raise PromptError(f"{name}: URLs are not fetched here; send the picture itself as a data: URI.")
        return name, fetch(os.fspath(source))
    if scheme:
        raise PromptError(f"{name}: {scheme}: is not fetched; expected a path, http:, https: or data:.")
    if not access.files:
        raise PromptError(f"{name}: files are not opened here; send the picture itself as a data: URI.")
    return name, _file(name, Path(source))


def shortened(name: str, limit: int = 80) -> str:
    """A name that fits into a message: its beginning and its end."""
    name = name.replace("\n", " ")
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 4 :]}"


def _scheme(source: str | os.PathLike[str]) -> str:
    """`http` of "http://…", `data` of "data:…"; nothing for a path, as C:\\ is one."""
    text = source if isinstance(source, str) else ""
    found = re.match(r"(data|file)(?=:)|[a-z][a-z0-9+.-]+(?=://)", text, re.IGNORECASE)
    return found[0].lower() if found else ""


def _file(name: str, path: Path) -> bytes:
    with _explained(name):
        if (size := _check_file(name, path)) > FILE_BYTES:
            raise PromptError(f"{name}: {size:,} bytes; expected at most {FILE_BYTES:,}.")
        return path.read_bytes()


def _check_file(name: str, path: Path) -> int:
    """The size of an ordinary file that is not empty."""
    if not path.is_file():  # a device would never end
        what = "is a folder" if path.is_dir() else "is not an ordinary file" if path.exists() else "does not exist"
        raise PromptError(f"{name}: this path {what}; expected a file.")
    if not (size := path.stat().st_size):
        raise PromptError(f"{name}: has zero bytes.")
    return size


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PromptError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _inline(name: str, uri: str) -> bytes:
    """The bytes in `data:image/png;base64,…`."""
    header, comma, body = uri.partition(",")
    if not comma:
        raise PromptError(f"{name}: this data: URI has no comma; expected data:image/png;base64,….")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    return decoded(name, body)


def decoded(name: str, text: str) -> bytes:
    """Base64 → bytes; line ends are let through. Errors: PromptError for anything else."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PromptError(f"{name}: the base64 text is damaged: {error}.") from error


def fetch(url: str, *, limit: int = URL_BYTES, seconds: float = URL_SECONDS) -> bytes:
    """The body behind an http or https URL. Errors: PromptError when it fails, exceeds `limit` bytes or `seconds`, or
    is redirected to another scheme.

    A thread of its own, which is left behind when time runs out: a server that trickles headers holds no caller.
    """
    answer: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    deadline = time.monotonic() + seconds
    threading.Thread(target=_download, args=(url, limit, deadline, answer), daemon=True).start()
    name = shortened(url)
    try:
        got = answer.get(timeout=seconds)
    except queue.Empty:
        raise PromptError(f"{name}: not here within {seconds:g} seconds; download it and give the file.") from None
    if isinstance(got, PromptError):
        raise got
    if isinstance(got, Exception):
        raise PromptError(f"{name}: cannot be fetched: {got}.") from got
    return got


def _download(url: str, limit: int, deadline: float, answer: "queue.SimpleQueue[bytes | Exception]") -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mlx-diffgemma", "Accept": "image/*"})
        with _opener().open(request, timeout=max(deadline - time.monotonic(), 0.1)) as response:
            answer.put(_body(response, shortened(url), limit, deadline))
    except (PromptError, OSError, HTTPException, ValueError) as error:  # urllib's errors are OSErrors
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        answer.put(error)


def _body(response: Any, name: str, limit: int, deadline: float) -> bytes:
    too_large = PromptError(f"{name}: more than {limit:,} bytes; download it and give the file.")
    length = response.headers.get("Content-Length") or "0"
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    while time.monotonic() < deadline and (piece := response.read1(1 << 16)):
        body += piece
        if len(body) > limit:
            raise too_large
    if len(body) < int(length if length.isdigit() else 0):
        raise PromptError(f"{name}: the connection ended after {len(body):,} of {int(length):,} bytes.")
    return bytes(body)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows http to https, and within a scheme; urllib's own would follow to ftp:, and from https back to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("https", before):
            fp.close()
            raise PromptError(
                f"{shortened(req.full_url)}: redirects from {before}: to {after}:, which is not followed."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Knows http and https alone: no file:, no ftp:, no data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener
