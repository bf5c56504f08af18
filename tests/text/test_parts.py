"""Parts that are pictures, in every form that people write them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.text.pictures.images import Picture, PictureConfig
from mlx_diffgemma.text.pictures.parts import (
    bare,
    check_literals,
    has_pictures,
    opened,
    seen,
    taken_out,
    with_budget,
    written,
)
from mlx_diffgemma.text.pictures.sources import Access
from tests.seeing import picture

CONFIG = PictureConfig()


def png(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


URI = "data:image/png;base64," + base64.b64encode(png()).decode()


def said(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


def only(part: dict[str, Any]) -> Picture:
    [found] = taken_out(opened(said(part), CONFIG))[1]
    return found


def test_every_form_gives_the_same_picture(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    parts: list[dict[str, Any]] = [{"type": "image", "image": source} for source in (picture(), str(file), file, png())]
    parts += [{"type": "image", "image": source} for source in (URI, np.asarray(picture()), bytearray(png()))]
    parts += [{"type": "image", "url": URI}, {"type": "image", "path": str(file)}]
    parts += [{"type": "image", "base64": base64.b64encode(png()).decode()}]
    parts += [
        {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}},
        {"type": "image_url", "image_url": URI},
    ]
    parts += [{"type": "input_image", "image_url": URI, "detail": "auto"}]
    assert len({only(part).key for part in parts}) == 1


@pytest.mark.parametrize(
    ("part", "budget"),
    [
        ({"type": "image", "image": URI}, 280),
        ({"type": "image", "image": URI, "budget": 70}, 70),
        ({"type": "image", "image": URI, "budget": "560"}, 560),
        ({"type": "image", "image": URI, "budget": "high"}, 1120),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, 70),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "high"}}, 1120),
        ({"type": "input_image", "image_url": URI, "detail": "low"}, 70),
    ],
)
def test_budgets(part: dict[str, Any], budget: int) -> None:
    assert only(part).budget == budget
    [changed] = with_budget(said(part), 140)
    own = budget != 280
    assert only(changed["content"][0]).budget == (budget if own else 140)


def test_pictures_are_taken_out_of_any_turn() -> None:
    words = {"type": "text", "text": "Hi"}
    messages = [*said({"type": "image", "image": URI}, words), {"role": "assistant", "content": "x"}, *said(words)]
    messages += said({"type": "image_url", "image_url": {"url": URI}}, role="tool")
    assert has_pictures(messages) and not has_pictures(said(words)) and not has_pictures("Hi")
    rest, pictures = taken_out(opened(messages, CONFIG))
    assert len(pictures) == 2 and rest == bare(messages)
    assert json.dumps(rest).count('{"type": "image"}') == 2 and rest[1:3] == messages[1:3]
    again = opened(opened(messages, CONFIG), CONFIG)
    assert [p.key for p in taken_out(again)[1]] == [p.key for p in pictures]


def test_opened_ones_are_written_as_files_and_urls(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    found = opened(said({"type": "image", "path": str(file), "budget": "low"}), CONFIG)
    plain = written(found)
    assert plain == said({"type": "image", "image": str(file), "budget": 70})
    assert taken_out(opened(json.loads(json.dumps(plain)), CONFIG))[1] == taken_out(found)[1]
    with pytest.raises(PromptError, match="which cannot be written: give pictures as files"):
        written(opened(said({"type": "image", "image": picture()}), CONFIG))


def frames(folder: Path, count: int = 3) -> Path:
    """A folder with a video's frames."""
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return folder


def test_videos_are_pictures_with_labels(tmp_path: Path) -> None:
    folder = frames(tmp_path)
    part = {"type": "video", "video": str(folder), "frames": 3, "rate": 0.5, "budget": 140}
    messages = opened(said({"type": "image", "image": URI}, part, {"type": "text", "text": "Hi"}), CONFIG)
    rest, pictures = taken_out(messages)
    assert [part["type"] for part in rest[0]["content"]] == ["image", "video", "text"]
    assert rest[0]["content"][1]["labels"] == ["00:00", "00:02", "00:04"]
    assert [p.budget for p in pictures] == [280, 140, 140, 140] and pictures[1].key != pictures[2].key
    assert written(opened(said(part), CONFIG)) == said(part)
    assert [str(found)[:8] for found in seen(messages)][1] == str(folder)[:8]
    again = opened(messages, CONFIG)
    assert taken_out(again)[1] == pictures
    forms: list[dict[str, Any]] = [{"type": "video", "path": str(folder)}, {"type": "video", "video": folder}]
    forms += [{"type": "video", "video": [str(folder / f"{n}.png") for n in range(3)]}]
    for form in forms:
        assert taken_out(opened(said(form | {"frames": 3}), CONFIG))[1][1].tokens <= 70
    with pytest.raises(PromptError, match="which cannot be written: give pictures as files"):
        written(opened(said(forms[2] | {"frames": 3}), CONFIG))


def test_budgets_of_videos() -> None:
    part = {"type": "video", "video": [picture(1)], "frames": 1}
    assert taken_out(opened(with_budget(said(part), 140), CONFIG))[1][0].budget == 140
    assert taken_out(opened(with_budget(said(part | {"budget": "low"}), 140), CONFIG))[1][0].budget == 70


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"type": "image"},
            "messages[0].content[0] is an image, and has no picture with it: expected one of image, url",
        ),
        ({"type": "image", "image": None}, "has no picture with it"),
        ({"type": "image", "image": URI, "url": URI}, "has image and url: give one"),
        ({"type": "image", "url": 5}, "messages[0].content[0].url is 5, expected text"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "content[0].image_url is null, expected text"),
        ({"type": "image", "base64": "?"}, "messages[0].content[0].base64: the base64 text is damaged"),
        ({"type": "image", "image": URI, "budget": 100}, "a picture's budget is 100; expected 70, 140"),
        ({"type": "image", "image": 5}, "a picture is given as int; expected a path"),
        ({"type": "image", "image": np.zeros((4, 4, 3))}, "a picture's array is float64 [4, 4, 3]; expected uint8"),
        ({"type": "image", "image": np.zeros((4, 4), np.uint8)}, "expected uint8 [height, width, 3]"),
        ({"type": "image", "image": b"GIF89a"}, "cannot be read"),
        ({"type": "image", "image": b""}, "has zero bytes"),
        ({"type": "image", "path": "/nowhere/a.png"}, "/nowhere/a.png: this path does not exist"),
        ({"type": "image", "url": "file:///a.png"}, "file: is not fetched"),
        (
            {"type": "video"},
            'is a video, and has no video with it: expected one of video, url, path, base64, as in {"ty',
        ),
        ({"type": "video", "video": "/nowhere/a.mp4"}, "/nowhere/a.mp4: this path does not exist"),
        ({"type": "video", "video": [picture()]}, "32 frames are asked for, and it has 1"),
        ({"type": "video", "video": [picture()], "frames": 1, "rate": "x"}, "frames a second of a video are 'x'"),
        ({"type": "video_url", "video_url": {"url": "file:///a.mp4"}}, "file: is not fetched"),
        ({"type": "pdf", "image": "a.pdf"}, "is a PDF, and has no PDF with it: expected one of pdf, url, path, base64"),
        ({"type": "pdf", "pdf": b"hello"}, "is not a PDF"),
    ],
)
def test_what_is_no_picture_is_named(part: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError) as caught:
        opened(said(part), CONFIG)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_who_may_not_open_files_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    closed = Access(files=False, urls=False)
    for source in (str(tmp_path / "a.png"), "http://127.0.0.1:1/a.png"):
        with pytest.raises(PromptError, match="send the picture itself as a data: URI"):
            opened(said({"type": "image", "image": source}), CONFIG, access=closed)
    assert opened(said({"type": "image", "image": URI}), CONFIG, access=closed)


def test_literal_placeholders_are_found_where_they_stand() -> None:
    check_literals(said({"type": "text", "text": "<image>"}), "<|image|>", "messages")
    for value, place in (
        (said({"type": "text", "text": "a <|image|>"}), "messages[0].content[0].text"),
        ([{"role": "user", "content": "<|image|>"}], "messages[0].content"),
        ([{"role": "a", "tool_calls": [{"function": {"arguments": {"x": "<|image|>"}}}]}], "arguments.x"),
    ):
        with pytest.raises(PromptError) as caught:
            check_literals(value, "<|image|>", "messages")
        assert place in str(caught.value) and "stands for a picture" in str(caught.value)
