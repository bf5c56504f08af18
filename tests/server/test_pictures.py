"""Pictures in requests, in every protocol: as data, from URLs only where that is allowed, never from files."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.server.pictures import HERE
from mlx_diffgemma.server.prefixes import Prefixes
from mlx_diffgemma.text.pictures import images
from mlx_diffgemma.text.pictures.sources import Access
from tests import seeing, small
from tests.seeing import picture
from tests.server.serving import CHAT, Running, serving, small_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("seeing")
    with serving(lambda: seeing.model(folder), most_tokens=4) as running:
        yield running


def uri(seed: int = 1, **size: int) -> str:
    return "data:image/png;base64," + data(seed, **size)


def data(seed: int = 1, **size: int) -> str:
    stream = io.BytesIO()
    picture(seed, **size).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def body(url: str, text: str = "What?", **more: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": url, **more}}
    return {"messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}]}


def modalities(server: Running) -> list[str]:
    """What the page asks before it offers pictures."""
    with server.client() as client:
        [served] = client.get("/v1/models").json()["data"]
    return served["input_modalities"]


def test_chat(server: Running) -> None:
    told = server.post(body(uri()) | {"seed": 1}).json()
    [seen] = told["diffusion"]["pictures"]
    assert seen["original"] == [30, 20] and seen["budget"] == 70
    text = server.post({"messages": [{"role": "user", "content": "What?"}], "seed": 1}).json()
    assert told["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"] + seen["tokens"] + 2
    chunks = server.chunks(body(uri()) | {"seed": 1})
    assert chunks[-1]["diffusion"]["pictures"] == [seen]
    high = server.post(body(uri(), detail="high") | {"seed": 1}).json()["diffusion"]["pictures"][0]
    assert high["budget"] == 1120 and high["tokens"] > 560


def test_the_same_picture_is_not_encoded_again_and_another_is(server: Running) -> None:
    """They have the same ids."""
    told = [server.post(body(uri(seed), text)).json()["usage"] for seed, text in ((11, "a"), (11, "b"), (12, "a"))]
    assert told[0]["prompt_tokens"] == told[2]["prompt_tokens"]
    asked = body(uri(11), "a")["messages"]
    answered = [*asked, {"role": "assistant", "content": "."}, {"role": "user", "content": "b"}]
    again = server.post({"messages": answered}).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] > 60
    answered[0] = body(uri(13), "a")["messages"][0]
    other = server.post({"messages": answered}).json()["usage"]
    assert other["prompt_tokens"] == again["prompt_tokens"] and other["prompt_tokens_details"]["cached_tokens"] < 20


def test_a_network_goes_on_from_its_own_prefixes_alone() -> None:
    one, other = (small.network(seed=seed) for seed in (0, 1))
    prefixes = Prefixes(1 << 30)
    for network, length in ((one, 3), (other, 2)):
        cache = network.make_cache()
        network.encode(mx.array([[5, 6, 7][:length]]), cache)
        prefixes.keep((5, 6, 7)[:length], network, cache)
    prefixes.keep((5, 6), one, one.make_cache())
    found = [prefixes.longest((5, 6, 7, 8), network) for network in (one, other)]
    assert [cache and cache.length for cache in found] == [3, 2] and len(prefixes) == 3
    assert prefixes.longest((5, 6, "a picture", 8), small.network()) is None


@pytest.mark.parametrize("kind", ["video", "video_url", "pdf"])
def test_videos_and_documents_are_refused(server: Running, kind: str) -> None:
    """Their readers are large, and strangers' files."""
    part = {"type": kind, kind: "data:application/pdf;base64,JVBERi0="}
    answer = server.post({"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("Videos and PDFs are not read here: send frames and pages")


def test_other_protocols(server: Running) -> None:
    expected = server.post(body(uri()) | {"seed": 1}).json()["usage"]["prompt_tokens"]
    source = {"type": "base64", "media_type": "image/png", "data": data()}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]
    message = {"max_tokens": 4, "messages": [{"role": "user", "content": blocks}]}
    answer = server.post(message, "/v1/messages").json()["usage"]
    assert answer["input_tokens"] + answer["cache_read_input_tokens"] == expected
    assert server.post(message, "/v1/messages/count_tokens").json() == {"input_tokens": expected}
    items = [{"type": "input_image", "image_url": uri(), "detail": "auto"}, {"type": "input_text", "text": "What?"}]
    asked = {"input": [{"role": "user", "content": items}]}
    first = server.post(asked, "/v1/responses").json()
    assert first["usage"]["input_tokens"] == expected
    later = server.post({"input": "And?", "previous_response_id": first["id"]}, "/v1/responses").json()
    assert later["usage"]["input_tokens_details"]["cached_tokens"] > 60
    ollama = {"messages": [{"role": "user", "content": "What?", "images": [data()]}], "stream": False}
    assert server.post(ollama, "/api/chat").json()["prompt_eval_count"] == expected
    assert "vision" in server.post({"model": "x"}, "/api/show").json()["capabilities"]
    assert modalities(server) == ["text", "image"]


def test_what_a_tool_answers_may_be_a_picture(server: Running) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": data()}
    told = [{"type": "image", "source": source}, {"type": "text", "text": "a plot"}]
    content = [{"type": "tool_result", "tool_use_id": "1", "content": told}]
    use = {"type": "tool_use", "id": "1", "name": "plot", "input": {}}
    messages = [{"role": "assistant", "content": [use]}, {"role": "user", "content": content}]
    answer = server.post({"max_tokens": 4, "messages": messages}, "/v1/messages")
    assert answer.status_code == 200 and len(answer.json()["diffusion"]["pictures"]) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "files are not opened here; send the picture itself as a data: URI"),
        ("file:///etc/passwd", "file: is not fetched"),
        ("http://127.0.0.1:1/a.png", "URLs are not fetched here"),
        ("data:image/png;base64,AAAA", "cannot be read: not a picture"),
        ("data:image/png;base64,?", "the base64 text is damaged"),
        ("data:image/png;base64,", "has zero bytes"),
    ],
)
def test_what_is_refused(url: str, words: str, server: Running) -> None:
    answer = server.post(body(url))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"


def test_other_bad_requests(server: Running) -> None:
    wide = server.post(body(uri(), detail="widest"))
    assert wide.status_code == 400 and "a picture's budget is 'widest'" in wide.json()["error"]["message"]
    empty = server.post({"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    assert empty.status_code == 400 and "has no picture with it" in empty.json()["error"]["message"]
    many = [{"type": "image_url", "image_url": {"url": uri()}}] * 40
    long = server.post({"messages": [{"role": "user", "content": many}]})
    assert long.status_code == 400 and "40 pictures of 60, 60" in long.json()["error"]["message"]
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_urls_where_they_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(source: Any, access: Access) -> tuple[str, bytes]:
        assert access == Access(files=False, urls=True)
        return source, base64.b64decode(data())

    monkeypatch.setattr(images, "read", read)
    assert Access(files=False, urls=False) == HERE
    access = Access(files=False, urls=True)
    with serving(lambda: seeing.model(tmp_path), most_tokens=4, access=access) as running:
        assert running.post(body("http://example.org/a.png")).status_code == 200


def test_a_model_without_eyes_says_so(tmp_path: Path) -> None:
    with serving(small_model(tmp_path / "m"), most_tokens=4) as running:
        answer = running.post(body(uri()), CHAT)
        assert answer.status_code == 400
        assert "has no vision tower: it reads text alone" in answer.json()["error"]["message"]
        assert "vision" not in running.post({"model": "x"}, "/api/show").json()["capabilities"]
        assert modalities(running) == ["text"]
