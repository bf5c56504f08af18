"""Videos against transformers' sampling, words and decoder; folders and lists of frames; every refusal."""

import io
import os
import re
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.text.pictures import video
from mlx_diffgemma.text.pictures.images import PictureConfig, from_pixels
from mlx_diffgemma.text.pictures.sources import Access
from mlx_diffgemma.text.pictures.video import Video, open_video, sampled
from mlx_diffgemma.text.placing import Frame

CONFIG = PictureConfig()
SMALL = PictureConfig(patch_size=4, pooling=2)  # 70 soft tokens are 70 · 64 pixels


def level(number: int) -> int:
    """How grey frame `number` is: far enough from its neighbours to survive a codec."""
    return 20 + 5 * number


def filmed(
    kind: str = "mp4", *, frames: int = 40, rate: Any = 8, sound: bool = False, codec: str = "mpeg4", **options: str
) -> bytes:
    """A film of 64 × 48 whose frames grow lighter."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, container_options=options) as out:
        stream = out.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        heard = out.add_stream("aac", rate=8000) if sound else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level(number), np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if heard is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            out.mux(heard.encode(silence))
            out.mux(heard.encode())
    return file.getvalue()


def numbers(seen: Video) -> list[int]:
    """Which frames were taken, by how grey they are."""
    return [round((float(picture.draw().mean()) - 20) / 5) for picture in seen.pictures]


def greys(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), (level(n),) * 3) for n in range(count)]


# --- As transformers


@given(total=st.integers(1, 100_000), frames=st.integers(1, 400))
def test_sampling_is_the_references(total: int, frames: int) -> None:
    try:
        expected = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=24.0), num_frames=frames)
    except ValueError:
        with pytest.raises(PromptError, match="ask for at most that many"):
            sampled(frames, total, "film")
    else:
        assert sampled(frames, total, "film") == expected.tolist()


@pytest.mark.parametrize("rate", ["8", "24000/1001", "1/70"])
def test_the_words_are_the_references(rate: str) -> None:
    """Labels, spaces and soft tokens as Gemma4Processor writes them; 1/70 makes minutes."""
    seen = open_video(filmed("matroska", rate=rate), CONFIG, frames=7)
    metadata = VideoMetadata(
        total_num_frames=40,
        fps=float(Fraction(rate)),
        frames_indices=np.arange(7) * 40 // 7,  # type: ignore[arg-type]
    )
    words = SimpleNamespace(boi_token="<|image>", video_token="<|video|>", eoi_token="<image|>")
    [count] = {picture.tokens for picture in seen.pictures}
    inputs = {"num_soft_tokens_per_video": [count], "video_metadata": [metadata]}
    expected = Gemma4Processor.replace_video_token(words, inputs, 0)
    frame = Frame(begin=0, image=1, end=2, placeholder=f"<|image>{'<|video|>' * count}<image|>")
    assert frame.filmed("Look: <|video|>!", [seen.labels], "template") == f"Look: {expected}!"
    assert seen.tokens == 7 * count and count > 60


def test_frames_are_the_references(tmp_path: Path) -> None:
    """The same pixels as transformers' decoder, scaled as pictures of 70 tokens."""
    path = tmp_path / "film.mp4"
    path.write_bytes(filmed(codec="libx264"))

    def sample(metadata: VideoMetadata, **_: Any) -> Any:
        return default_sample_indices_fn(metadata, num_frames=32)

    frames, metadata = read_video_pyav(str(path), sample)
    seen = open_video(path, CONFIG)
    assert [p.key for p in seen.pictures] == [from_pixels("", frame, CONFIG, 70).key for frame in frames]
    assert list(seen.seconds) == list(metadata.timestamps) and seen.rate == metadata.fps
    assert len({p.key for p in seen.pictures}) == 32


# --- Files


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "avi", "mpegts"])
def test_containers(kind: str) -> None:
    """Matroska and MPEG-TS do not say how many frames they have, MPEG-TS not how many there are a second."""
    seen = open_video(filmed(kind), SMALL, frames=5)
    assert (numbers(seen), seen.total, seen.rate) == ([0, 8, 16, 24, 32], 40, 8.0)
    assert seen.labels == ("00:00", "00:01", "00:02", "00:03", "00:04")


def test_a_video_says_what_was_sampled(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(filmed(sound=True))
    seen = open_video(path, CONFIG, frames=4)
    tokens = f"64 × 48 → 432 × 336, {4 * 63} tokens"
    assert str(seen).endswith(f"film.mp4: 4 of 40 frames, 5.0 seconds; {tokens}; its sound is ignored")
    assert "sound" not in str(open_video(filmed(), CONFIG, frames=4))
    assert [picture.name for picture in seen.pictures] == [f"{path}, 00:0{n}" for n in range(4)]


def test_more_frames_and_other_budgets() -> None:
    film = filmed()
    assert len(open_video(film, SMALL).pictures) == 32
    seen = open_video(film, SMALL, frames=40, budget=140)
    assert len(seen.pictures) == 40 and {picture.budget for picture in seen.pictures} == {140}


def test_a_phone_is_turned_upright() -> None:
    """The matrix in an MP4's track header, as a phone writes it that is held upright."""
    film = bytearray(filmed())
    at = film.index(b"tkhd") + 44
    matrix = (0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    film[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in matrix)
    [picture] = open_video(bytes(film), CONFIG, frames=1).pictures
    assert picture.original == (48, 64)


def test_turning_is_the_way_the_file_says() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for angle, expected in ((0, pixels), (90, np.rot90(pixels)), (-90, np.rot90(pixels, 3)), (180, pixels[::-1, ::-1])):
        frame = SimpleNamespace(to_ndarray=lambda format: pixels, rotation=angle)
        assert np.array_equal(video._upright(frame), expected)


def test_one_decoded_frame_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[np.ndarray]] = []

    def spy(name: str, pixels: np.ndarray, *rest: Any) -> Any:
        assert not [kept for kept in before if kept() is not None]
        before.append(weakref.ref(pixels))
        return from_pixels(name, pixels, *rest)

    monkeypatch.setattr(video, "from_pixels", spy)
    assert len(open_video(filmed(), SMALL).pictures) == len(before) == 32


# --- Folders, lists, arrays


def test_a_folder_is_read_in_the_order_people_mean(tmp_path: Path) -> None:
    for number, picture in enumerate(greys(12)):
        picture.save(tmp_path / f"frame{number}.png")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture")
    seen = open_video(tmp_path, SMALL, frames=12)
    assert (numbers(seen), seen.total) == (list(range(12)), 12)
    assert numbers(open_video(str(tmp_path), SMALL, frames=5)) == [0, 2, 4, 7, 9]


def test_lists_and_arrays_are_videos(tmp_path: Path) -> None:
    pictures = greys(8)
    pictures[3].save(tmp_path / "three.png")
    mixed: list[Any] = [*pictures[:3], tmp_path / "three.png", *map(np.asarray, pictures[4:])]
    keys = [p.key for p in open_video(mixed, SMALL, frames=4).pictures]
    array = np.stack([np.asarray(picture) for picture in pictures])
    assert keys == [p.key for p in open_video(array, SMALL, frames=4).pictures]
    assert keys == [p.key for p in open_video(tuple(pictures), SMALL, frames=4).pictures]


def test_frames_have_the_rate_that_is_said() -> None:
    seen = open_video(greys(40), SMALL, frames=4, rate=0.1)
    assert seen.labels == ("00:00", "01:40", "03:20", "05:00") and "assumed" not in str(seen)
    seen = open_video(greys(48), SMALL, frames=2)
    assert seen.labels == ("00:00", "00:01") and "2.0 seconds at the 24 frames a second that are assumed" in str(seen)


def test_what_is_open_stays_as_it_is() -> None:
    seen = open_video(greys(2), SMALL, frames=2)
    assert open_video(seen, CONFIG, frames=9) is seen


# --- What is refused

FILM = filmed()
FAST = filmed(movflags="+empty_moov+default_base_moof", frag_duration="500000")
SOUND = io.BytesIO()
with av.open(SOUND, "w", format="mp4") as _out:
    _heard = _out.add_stream("aac", rate=8000)
    _silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    _silence.sample_rate = 8000
    _out.mux(_heard.encode(_silence))
    _out.mux(_heard.encode())
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "zero bytes": (b"", {}, "has zero bytes"),
    "text": (b"this is no film\n" * 99, {}, "cannot be read as a video"),
    "subtitles": (b"1\n00:00:01,000 --> 00:00:02,000\nHello\n", {}, "cannot be read as a video"),
    "a picture": ((b"\x89PNG\r\n\x1a\n" + bytes(99)), {}, "cannot be read as a video"),
    "a playlist of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", {}, "cannot be read as a video"),
    "a playlist of URLs": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", {}, "cannot be read"),
    "cut short": (FILM[: len(FILM) // 2], {}, "cannot be read"),
    "cut short behind its index": (FAST[: len(FAST) * 2 // 3], {}, "cannot be read"),
    "sound alone": (SOUND.getvalue(), {}, "holds no video"),
    "fewer frames": (FILM, {"frames": 41}, "41 frames are asked for, and it has 40"),
    "fewer pictures": (greys(3), {}, "32 frames are asked for, and it has 3"),
    "no pictures": ([], {}, "32 frames are asked for, and it has 0"),
    "no frames": (FILM, {"frames": 0}, "expected a whole number of at least 1"),
    "half a frame": (FILM, {"frames": 1.5}, "expected a whole number of at least 1"),
    "a budget": (FILM, {"budget": 71}, "expected 70, 140"),
    "a rate for a file": (FILM, {"rate": 3.0}, "says itself"),
    "a rate of nothing": (greys(3), {"frames": 3, "rate": 0}, "expected a number above 0"),
    "a rate that is none": (greys(3), {"frames": 3, "rate": float("nan")}, "expected a number above 0"),
    "a list of numbers": ([1, 2], {"frames": 1}, "given as int; expected a path"),
    "None": (None, {}, "given as NoneType; expected a path"),
    "no such file": ("nothing/here.mp4", {}, "nothing/here.mp4: this path does not exist"),
    "a NUL in the name": ("a\0b", {}, "cannot be read|does not exist"),
    "file URL": ("file:///etc/passwd", {}, "file: is not fetched"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_video_is_refused(case: str) -> None:
    source, options, message = REFUSED[case]
    with pytest.raises(PromptError) as caught:
        open_video(source, SMALL, **options)
    said = str(caught.value)
    assert re.search(message, said, re.DOTALL), said
    assert said.count("\n") < 3 and len(said) < 400


def test_text_named_as_a_video_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_text("hello " * 99)
    with pytest.raises(PromptError, match=r"film\.mp4: cannot be read as a video"):
        open_video(path, SMALL)


def test_a_folder_without_frames_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(PromptError, match=r"this folder has no frames; expected pictures named \.png"):
        open_video(tmp_path, SMALL)


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    greys(1)[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"hello" * 99)
    with pytest.raises(PromptError, match=r"b\.png: cannot be read"):
        open_video(tmp_path, SMALL, frames=2)


def test_a_video_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(PromptError, match=r"pip install 'mlx-diffgemma\[video\]', or give a folder of frames"):
        open_video(FILM, SMALL)
    greys(1)[0].save(tmp_path / "a.png")
    assert open_video(tmp_path, SMALL, frames=1).total == 1


def test_a_server_opens_no_folders(tmp_path: Path) -> None:
    greys(1)[0].save(tmp_path / "a.png")
    for source in (tmp_path, [tmp_path / "a.png"], os.fspath(tmp_path)):
        with pytest.raises(PromptError, match="files are not opened here"):
            open_video(source, SMALL, frames=1, access=Access(files=False))
