"""Bytes from URLs against a server that misbehaves in every known way, and who may read what."""

import io
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.text.pictures import sources
from mlx_diffgemma.text.pictures.sources import Access, fetch, read, shortened

BODY = bytes(range(256)) * 4
REDIRECTS = {
    "/moved": "/good",
    "/to-file": "file:///etc/passwd",
    "/to-ftp": "ftp://127.0.0.1/a.png",
    "/to-data": "data:image/png;base64,AAAA",
    "/around": "/around",
}


class Server(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - of the whole server
    stop = threading.Event()

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if target := REDIRECTS.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif answer := getattr(self, self.path[1:].replace("-", "_"), None):
            answer()
        else:
            self.send_error(404)

    def good(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def large(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.stop.is_set():
            self.wfile.write(BODY)

    def slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.stop.wait(0.05):
            self.wfile.write(b".")
            self.wfile.flush()

    def slow_headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not self.stop.wait(0.05):
            self.wfile.write(b".")
            self.wfile.flush()

    def cut_short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:100])

    def nonsense(self) -> None:
        self.wfile.write(b"hello\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    listening.handle_error = lambda *_: None  # type: ignore[method-assign] # clients hang up on purpose
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    Server.stop.set()
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["/good", "/moved"])
def test_a_url_is_fetched(server: str, path: str) -> None:
    assert read(server + path) == (server + path, BODY)
    assert read((server + path).replace("http", "HTTP", 1))[1] == BODY


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "cannot be fetched: HTTP Error 404"),
        ("/large", "more than 4,096 bytes"),
        ("/endless", "more than 4,096 bytes"),
        ("/cut-short", "ended after 100 of 1,024 bytes|IncompleteRead"),
        ("/nonsense", "cannot be fetched"),
        ("/to-file", "file:///etc/passwd.*not allowed|to file:"),
        ("/to-ftp", "redirects from http: to ftp:, which is not followed"),
        ("/to-data", "data:.*not allowed|to data:"),
        ("/around", "cannot be fetched"),
    ],
)
def test_what_a_server_can_do_wrong(server: str, path: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        fetch(server + path, limit=4096, seconds=20)
    assert server + path in str(caught.value) and str(caught.value).count("\n") < 3


@pytest.mark.parametrize("path", ["/slow", "/slow-headers"])
def test_time_is_bounded_even_where_bytes_keep_trickling(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(PromptError, match=r"within 0\.4 seconds"):
        fetch(server + path, seconds=0.4)
    assert time.monotonic() - start < 10  # the server would go on for ever


def test_nobody_there() -> None:
    with pytest.raises(PromptError, match="cannot be fetched"):
        fetch("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize(("before", "after"), [("https://a/x", "http://a/x"), ("http://a/x", "ftp://a/x")])
def test_redirects_keep_their_scheme(before: str, after: str) -> None:
    request = urllib.request.Request(before)
    with pytest.raises(PromptError, match="not followed"):
        sources._Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, after)  # type: ignore[arg-type]


def test_redirects_to_https_are_followed() -> None:
    request = urllib.request.Request("http://a/x")
    followed = sources._Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, "https://a/x")  # type: ignore[arg-type]
    assert followed is not None and followed.full_url == "https://a/x"


def test_a_server_opens_no_files_and_may_fetch_nothing(server: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(BODY)
    for source in (path, str(path), "/etc/passwd", "nothing.png"):
        with pytest.raises(PromptError, match="files are not opened here"):
            read(source, Access(files=False))
    before = len(Server.asked)
    with pytest.raises(PromptError, match="URLs are not fetched here"):
        read(server + "/good", Access(urls=False))
    assert len(Server.asked) == before
    assert read("data:,abc", Access(files=False, urls=False))[1] == b"abc"


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILE_BYTES", 3)
    path = tmp_path / "a.png"
    path.write_bytes(b"1234")
    with pytest.raises(PromptError, match="4 bytes; expected at most 3"):
        read(path)


def test_windows_paths_and_colons_are_paths() -> None:
    for path in ("C:\\a.png", "a:b.png", "12:30.png"):
        with pytest.raises(PromptError, match="does not exist"):
            read(path)


def test_long_names_are_shortened() -> None:
    assert shortened("a" * 80) == "a" * 80
    assert shortened("data:image/png;base64," + "A" * 1_000_000).startswith("data:image/png;base64,AAA")
    assert len(shortened("b" * 1000 + "\n")) < 70
