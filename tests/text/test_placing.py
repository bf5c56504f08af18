"""Ids of prompts with pictures: those of transformers' processor, and none that a user's text can move."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.video_utils import VideoMetadata

from mlx_diffgemma.errors import TokenizerError
from mlx_diffgemma.text.pictures.images import PictureConfig, open_picture
from mlx_diffgemma.text.pictures.parts import opened, taken_out
from mlx_diffgemma.text.pictures.video import open_video
from mlx_diffgemma.text.placing import Frame
from mlx_diffgemma.text.tokenizer import Tokenizer
from tests import seeing, small
from tests.seeing import BOI, BUDGET, EOI, IMAGE, picture
from tests.text.processor import Processor, processor

FRAME = Frame(begin=BOI, image=IMAGE, end=EOI)
PICTURES = PictureConfig(patch_size=4, pooling=3, budget=BUDGET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    seeing.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Processor:
    return processor(folder)


def place(tokenizer: Tokenizer, messages: Any, frame: Frame = FRAME, **options: Any) -> tuple[list[int], Any]:
    bare, pictures = taken_out(opened(messages, PICTURES))
    return tokenizer.place(bare, frame, [p.tokens for p in pictures], **options)


def image(seed: int, width: int, height: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed, width, height)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one, before the text": [{"role": "user", "content": [image(1, 30, 20), text(" What is it? ")]}],
    "among texts": [{"role": "user", "content": [text("a "), image(1, 9, 90), text(" and "), image(2, 50, 50)]}],
    "side by side": [{"role": "user", "content": [image(1, 31, 7), image(2, 7, 31), text("Compare.")]}],
    "nothing but one": [{"role": "user", "content": [image(3, 64, 64)]}],
    "in any turn": [
        {"role": "user", "content": [image(1, 20, 20), text("One.")]},
        {"role": "assistant", "content": "Seen <turn|>"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": [text("Well "), image(4, 11, 40)]},
        {"role": "user", "content": [text("naïve 東京 🙂\n\n"), image(5, 100, 3), text("\n")]},
    ],
}


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_the_processors(name: str, sanitize: bool, tokenizer: Tokenizer, theirs: Processor) -> None:
    messages = CONVERSATIONS[name]
    right = theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, sanitize_control_tokens=sanitize
    )
    ids, spans = place(tokenizer, messages, sanitize_control_tokens=sanitize)
    assert ids == right["input_ids"][0]
    soft = [i for start, stop in spans for i in range(start, stop)]
    assert soft == [i for i, kind in enumerate(right["mm_token_type_ids"][0]) if kind == 1]
    assert all(ids[start - 1] == BOI and ids[stop] == EOI for start, stop in spans)


@pytest.mark.parametrize("sanitize", [False, True])
def test_ids_of_videos_are_the_processors(sanitize: bool, tokenizer: Tokenizer, theirs: Processor) -> None:
    """Its words for each video, with our picture's token: a checkpoint of this model has no other."""
    films = [
        open_video([picture(n, 40, 20) for n in range(count)], PICTURES, frames=count, rate=0.7) for count in (3, 1)
    ]
    parts = [{"type": "video", "video": film} for film in films]
    content = [image(7, 20, 20), text("Look: "), parts[0], text(" and "), parts[1], text("Which?")]
    messages = [{"role": "user", "content": content}]
    written = theirs.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for film in films:
        metadata = VideoMetadata(total_num_frames=film.total, fps=0.7, frames_indices=list(range(film.total)))
        inputs = {"num_soft_tokens_per_video": [film.pictures[0].tokens], "video_metadata": [metadata]}
        words = SimpleNamespace(boi_token="<|image>", video_token="<|image|>", eoi_token="<image|>")
        written = written.replace("<|video|>", Gemma4Processor.replace_video_token(words, inputs, 0), 1)
    first = open_picture(content[0]["image"], PICTURES).tokens
    written = written.replace("<|image|>", f"<|image>{'<|image|>' * first}<image|>", 1)
    ids, spans = place(tokenizer, messages, sanitize_control_tokens=sanitize)
    assert ids == theirs.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert len(spans) == 5 and "00:02" in tokenizer.decode(ids)


def test_videos_have_their_places(tokenizer: Tokenizer, tmp_path: Path) -> None:
    film = {"type": "video", "video": [picture(1)], "frames": 1}
    messages = [{"role": "user", "content": [text("<|video|> is"), film]}]
    ids, [_] = place(tokenizer, messages, sanitize_control_tokens=True)
    assert "<|video|> is00:00 " in tokenizer.decode(ids)
    with pytest.raises(TokenizerError, match=r"writes 2 placeholders <\|video\|> for 1 videos"):
        place(tokenizer, messages)
    seeing.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(seeing.TEMPLATE.replace("<|video|>", ""))
    with pytest.raises(TokenizerError, match=r"chat_template.jinja writes 0 placeholders <\|video\|> for 1 videos"):
        place(Tokenizer.load(tmp_path), [{"role": "user", "content": [film]}])


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", " ", "\n", "<turn|>", "é", "<|im", "age|>", "<|", "x y", None]), max_size=12))
def test_around_or_in_one_piece_is_the_same(tokenizer: Tokenizer, pieces: list[str | None]) -> None:
    """A tokenizer without the tokens: ids are put in by hand, and the text around them is encoded as always."""
    content = [image(1, 20, 20) if piece is None else text(piece) for piece in pieces]
    messages = [{"role": "user", "content": content}]
    own = [open_picture(part["image"], PICTURES).tokens for part in content if part["type"] == "image"]
    written = tokenizer.render(taken_out(opened(messages, PICTURES))[0]) if not own else None
    try:
        ids, spans = place(tokenizer, messages)
    except TokenizerError as error:
        assert "placeholders" in str(error) and "<|image|>" in "".join(p or "" for p in pieces)
        return
    if written is not None:
        assert ids == tokenizer.encode(written)
    foreign = Frame(begin=small.FIRST_BYTE, image=small.FIRST_BYTE + 1, end=small.FIRST_BYTE + 2)
    names = {BOI: foreign.begin, IMAGE: foreign.image, EOI: foreign.end}
    assert place(tokenizer, messages, foreign) == ([names.get(i, i) for i in ids], spans)


def test_a_users_placeholder_stays_text(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": [text("<|image|> is"), image(1, 20, 20), text("<|image|>?")]}]
    ids, [(start, stop)] = place(tokenizer, messages, sanitize_control_tokens=True)
    assert ids.count(IMAGE) == stop - start
    assert tokenizer.decode(ids[:start]).endswith("<|image|> is") and tokenizer.decode(ids[stop:]).startswith("<|image")
    foreign = Frame(begin=small.FIRST_BYTE, image=small.FIRST_BYTE + 1, end=small.FIRST_BYTE + 2)
    again, _ = place(tokenizer, messages, foreign, sanitize_control_tokens=True)
    assert len(again) == len(ids)
    with pytest.raises(TokenizerError, match=r"writes 3 placeholders <\|image\|> for 1 pictures"):
        place(tokenizer, messages)


def test_a_template_that_knows_no_pictures_is_named(tmp_path: Path) -> None:
    seeing.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja writes 0 placeholders <\|image\|> for 1 pictures"):
        place(Tokenizer.load(tmp_path), [{"role": "user", "content": [image(1, 20, 20)]}])
