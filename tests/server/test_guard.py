"""Who may ask."""

from collections.abc import Iterator

import httpx
import pytest

from mlx_diffgemma.server import app as application
from mlx_diffgemma.server.guard import LOOPBACK, Rules
from tests.server.serving import CHAT, Running, said, serving, small_model

BODY = {"messages": said("hi"), "max_tokens": 4}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    rules = Rules(key="secret", origins=frozenset(["https://example.org"]))
    with serving(small_model(tmp_path_factory.mktemp("served")), rules=rules) as running:
        yield running


def ask(server: Running, headers: dict[str, str]) -> httpx.Response:
    return server.post(BODY, headers=headers)


def test_a_key_is_needed_for_all_but_the_page_and_health(locked: Running) -> None:
    key = {"authorization": "Bearer secret"}
    assert ask(locked, {}).status_code == 401 == ask(locked, {"authorization": "Bearer secrets"}).status_code
    assert ask(locked, {}).json()["error"]["code"] == "invalid_api_key"
    assert ask(locked, key).status_code == 200 == ask(locked, {"x-api-key": "secret"}).status_code
    with locked.client() as client:
        assert client.get("/health").status_code == 200 and client.get("/v1/models").status_code == 401


def test_another_name_for_this_machine_is_refused(locked: Running) -> None:
    key = {"authorization": "Bearer secret"}
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.", ""):
        assert ask(locked, key | {"host": host}).status_code in (400, 403), host
    for host in LOOPBACK:
        named = f"[{host}]:80" if ":" in host else f"{host}:80"
        assert ask(locked, key | {"host": named}).status_code == 200, host


def test_pages_elsewhere_are_let_in_only_by_name(locked: Running) -> None:
    key = {"authorization": "Bearer secret"}
    for origin in ("https://evil.example", "null", "http://localhost:1", "https://example.org.evil"):
        answer = ask(locked, key | {"origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    answer = ask(locked, key | {"origin": "https://example.org"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"
    assert ask(locked, key | {"origin": locked.url}).status_code == 200
    with locked.client() as client:
        asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
        granted = client.options(CHAT, headers=asked)
        assert granted.status_code == 204 and granted.headers["access-control-allow-methods"] == "GET, POST"
        assert client.options(CHAT, headers=asked | {"origin": "https://evil.example"}).status_code == 403


def test_a_body_has_bounds(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "LARGEST", 1000)
    key = {"authorization": "Bearer secret"}
    assert locked.post({"messages": said("a" * 1000)}, headers=key).status_code == 413
    deep = b'{"messages":' + b"[" * 100_000
    with locked.client() as client:
        assert client.post(CHAT, content=deep[:900], headers=key).status_code == 400
