"""Pictures against transformers' Pil backend, bit for bit; the known traps as mutants; every refusal."""

import base64
import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)
from transformers.utils import logging

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.text.pictures import images
from mlx_diffgemma.text.pictures.images import BUDGETS, PIXELS, PictureConfig, budget_of, open_picture, scaled_size

logging.set_verbosity_error()  # it wonders about pictures 1 or 3 pixels wide
CONFIG = PictureConfig()
REFERENCE = Gemma4ImageProcessorPil()
MODES = ("1", "L", "LA", "P", "P one colour clear", "PA", "RGB", "RGB one colour clear", "L one grey clear", "RGBA")
MODES += ("RGBX", "CMYK", "YCbCr", "HSV", "LAB")
PICTURES = 20  # of every mode


def drawn(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise or waves of every mode that Pillow's files come in; "clear" is a colour that counts as transparent."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([x * 7, y * 5, x + y, x * 3], axis=-1) % 256
    noise = random.integers(0, 256, (height, width, 4))
    full = Image.fromarray((noise if seed % 2 else waves).astype(np.uint8), "RGBA")
    plain = full.convert("RGB")
    name, _, clear = mode.partition(" ")
    if name == "P":
        picture = plain.quantize(16)
        marked: Any = 3
    elif name == "LAB":
        return Image.merge("LAB", plain.split())
    else:
        picture = (full if name in ("RGBA", "LA", "PA") else plain).convert(name)
        marked = picture.getpixel((0, 0))
    if clear:
        picture.info["transparency"] = marked
    return picture


def reference(picture: Image.Image, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """transformers' patches and their positions, without the padding."""
    seen = REFERENCE(picture, max_soft_tokens=budget, return_tensors="np")
    [count] = seen["num_soft_tokens_per_image"]
    patches, positions = seen["pixel_values"][0], seen["image_position_ids"][0]
    assert patches.shape == (9 * budget, 768) and not patches[9 * count :].any()
    return patches[: 9 * count], positions[: 9 * count]


def agrees(picture: Image.Image, budget: int) -> bool:
    return matches(picture, budget, *reference(picture, budget))


def matches(picture: Image.Image, budget: int, patches: np.ndarray, positions: np.ndarray) -> bool:
    ours = open_picture(picture, CONFIG, budget=budget)
    own = ours.patches()
    if own.shape != patches.shape or own.dtype != np.float32 or not np.array_equal(own, patches):
        return False
    rows, columns = divmod(np.arange(len(patches)), ours.columns)
    return np.array_equal(np.stack([columns, rows], axis=-1), positions) and ours.tokens * 9 == len(patches)


@pytest.mark.parametrize("mode", MODES)
def test_patches_are_the_references(mode: str) -> None:
    """All modes and budgets, 300 pictures, sizes from 1 × 1 to strips and screens."""
    random = np.random.default_rng(MODES.index(mode))
    budgets = [*BUDGETS, *random.choice(BUDGETS[:3], PICTURES - len(BUDGETS)).tolist()]
    for number, budget in enumerate(budgets):
        width, height = (int(math.exp(random.uniform(0, 6.3))) for _ in range(2))
        assert agrees(drawn(mode, width, height, number), budget), (mode, width, height, budget, number)


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), budget=st.sampled_from(BUDGETS))
def test_sizes_are_the_references(width: int, height: int, budget: int) -> None:
    expected = get_aspect_ratio_preserving_size(height, width, 16, 9 * budget, 3)
    wide, high = scaled_size(width, height, budget, CONFIG)
    assert (high, wide) == expected
    assert budget / 2 <= wide * high / 48**2 <= budget


@given(scale=st.integers(1, 400), budget=st.sampled_from(BUDGETS), wider=st.integers(-1, 1))
def test_sizes_at_the_steps_are_the_references(scale: int, budget: int, wider: int) -> None:
    """Shapes whose ideal side is a whole multiple, where the order of operations decides."""
    for side in [d for d in range(1, budget + 1) if budget % d == 0]:
        width, height = scale * side + wider, scale * (budget // side)
        if width:
            expected = get_aspect_ratio_preserving_size(height, width, 16, 9 * budget, 3)
            assert scaled_size(width, height, budget, CONFIG)[::-1] == expected


def test_a_smaller_tower_has_smaller_squares() -> None:
    config = PictureConfig(patch_size=8, pooling=2, budget=70)
    ours = open_picture(drawn("RGB", 128, 128, 1), config)
    assert (ours.size, ours.tokens, ours.columns, ours.budget) == ((128, 128), 64, 16, 70)
    pixels = np.asarray(drawn("RGB", 128, 128, 1))
    patch = ours.patches()[17]  # second row, second column
    assert np.array_equal(patch, (pixels[8:16, 8:16] * (1 / 255)).astype(np.float32).ravel())


# --- Traps


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def mutant(make: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    MUTANTS[make.__name__.replace("_", "-")] = make
    return make


@mutant
def transparency_is_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "rgb", lambda picture: picture.convert("RGB"))


@mutant
def transparency_is_laid_on_black(patch: pytest.MonkeyPatch) -> None:
    new = Image.new
    patch.setattr(Image, "new", lambda mode, size, colour: new(mode, size, (0, 0, 0, 255)))


@mutant
def sizes_are_rounded_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "scaled_size", lambda w, h, b, c: tuple(s + 48 for s in scaled_size(w, h, b, c)))


@mutant
def small_pictures_do_not_grow(patch: pytest.MonkeyPatch) -> None:
    def size(width: int, height: int, budget: int, config: PictureConfig) -> tuple[int, int]:
        wide, high = scaled_size(width, height, budget, config)
        return min(wide, -(-width // 48) * 48), min(high, -(-height // 48) * 48)

    patch.setattr(images, "scaled_size", size)


@mutant
def the_budget_stays_at_280(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "budget_of", lambda asked, default: 280)


def resized(change: Callable[..., Image.Image]) -> Callable[[pytest.MonkeyPatch], None]:
    original = Image.Image.resize
    return lambda patch: patch.setattr(
        Image.Image, "resize", lambda self, size, method: change(original, self, size, method)
    )


MUTANTS["resized-bilinear"] = resized(lambda resize, x, size, _: resize(x, size, Image.Resampling.BILINEAR))
MUTANTS["resized-lanczos"] = resized(lambda resize, x, size, _: resize(x, size, Image.Resampling.LANCZOS))
MUTANTS["resized-in-two-steps"] = resized(lambda resize, x, size, m: resize(x, size, m, reducing_gap=1.0))


@mutant
def resized_in_float(patch: pytest.MonkeyPatch) -> None:
    original = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], method: Any) -> Image.Image:
        bands = [np.asarray(original(band.convert("F"), size, method)) for band in self.split()]
        return Image.fromarray(np.stack(bands, axis=-1).round().clip(0, 255).astype(np.uint8), "RGB")

    patch.setattr(Image.Image, "resize", resize)


def patched(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[pytest.MonkeyPatch], None]:
    """Other orders inside `patches`: `change` takes the pixels [h, w, 3] in 0 … 1."""
    return lambda patch: patch.setattr(
        images.Picture, "patches", lambda self: change((self.draw() * (1 / 255)).astype(np.float32), self.size[0] // 16)
    )


def squares(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0] // 16, 16, -1, 16, 3)


MUTANTS["colours-first"] = patched(lambda x, _: squares(x).transpose(0, 2, 4, 1, 3).reshape(-1, 768))
MUTANTS["patches-by-column"] = patched(lambda x, _: squares(x).transpose(2, 0, 1, 3, 4).reshape(-1, 768))
MUTANTS["pixels-by-column"] = patched(lambda x, _: squares(x).transpose(0, 2, 3, 1, 4).reshape(-1, 768))
MUTANTS["from-minus-one"] = patched(lambda x, _: squares(2 * x - 1).swapaxes(1, 2).reshape(-1, 768))


@mutant
def levels_are_divided_in_float32(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "_LEVELS", np.arange(256, dtype=np.float32) * np.float32(1 / 255))


SUITE = [("RGBA", 30, 20, 70), ("RGB", 1901, 1000, 140), ("RGB", 40, 61, 560), ("P one colour clear", 5, 7, 70)]


@pytest.fixture(scope="module")
def suite() -> list[tuple[Any, ...]]:
    """The arguments of `matches`, from the reference before any patch."""
    pictures = [(drawn(mode, w, h, 1), budget) for mode, w, h, budget in SUITE]
    return [(picture, budget, *reference(picture, budget)) for picture, budget in pictures]


def test_the_suite_agrees_as_it_is(suite: list[tuple[Any, ...]]) -> None:
    assert all(matches(*case) for case in suite)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_trap_is_noticed(name: str, suite: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    assert not all(matches(*case) for case in suite)


# --- Files


CORNERS = np.zeros((60, 100, 3), np.uint8)
CORNERS[:30, :50], CORNERS[:30, 50:], CORNERS[30:, :50] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_is_read(kind: str) -> None:
    mode = "P" if kind == "GIF" else "RGB"
    data = saved(Image.fromarray(CORNERS).convert(mode), kind)
    picture = open_picture(data, CONFIG, budget=70)
    assert (picture.original, picture.size, picture.tokens) == ((100, 60), (480, 288), 60)
    assert agrees(Image.open(io.BytesIO(data)), 70)
    assert np.abs(picture.draw()[10, 10].astype(int) - CORNERS[0, 0]).max() < 32


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_counts(kind: str) -> None:
    first, second = Image.fromarray(CORNERS), Image.new("RGB", (100, 60), "black")
    data = saved(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    assert open_picture(data, CONFIG).key == open_picture(CORNERS, CONFIG).key


@pytest.mark.parametrize("side", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(kind: str, side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = side
    upright = np.rot90(CORNERS, {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(side, 0))
    upright = upright[:, ::-1] if side in (2, 4, 5, 7) else upright
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    picture = open_picture(saved(Image.fromarray(CORNERS), kind, exif=exif, **options), CONFIG)
    assert picture.original == upright.shape[1::-1]
    difference = picture.draw().astype(int) - open_picture(np.ascontiguousarray(upright), CONFIG).draw()
    assert np.abs(difference).mean() < (2 if kind == "JPEG" else 1e-9)


def test_a_turned_picture_with_transparency_is_laid_on_white() -> None:
    """The reference composites pictures, or turns paths: never both."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = np.dstack([CORNERS, np.zeros((60, 100), np.uint8)])
    picture = open_picture(saved(Image.fromarray(clear, "RGBA"), "PNG", exif=exif), CONFIG)
    assert picture.original == (60, 100) and (picture.draw() == 255).all()


def test_damaged_metadata_does_not_lose_the_picture() -> None:
    data = saved(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    assert open_picture(data, CONFIG).key == open_picture(CORNERS, CONFIG).key


GREY = np.arange(0, 60_000, 10, dtype=np.uint16).reshape(60, 100)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM-like"])
def test_sixteen_bits_keep_their_upper_eight(kind: str) -> None:
    """transformers hands them to Pillow, which clips: everything above 255 becomes white."""
    picture = Image.fromarray(GREY)
    source = picture.convert("I") if kind == "PPM-like" else saved(picture, kind)
    expected = np.repeat((GREY >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    assert open_picture(source, CONFIG).key == open_picture(expected, CONFIG).key


def test_premultiplied_pictures_are_laid_on_white() -> None:
    full = drawn("RGBA", 20, 20, 1)
    for mode, other in (("RGBa", full), ("La", full.convert("LA"))):
        kept = other.convert(mode).convert(other.mode)
        assert open_picture(other.convert(mode), CONFIG).key == open_picture(kept, CONFIG).key


# --- Sources, keys, budgets


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    data = saved(Image.fromarray(CORNERS), "PNG")
    path = tmp_path / "ünïcode name.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.encodebytes(data).decode()
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    sources = [path, str(path), data, bytearray(data), memoryview(data), uri, percent, CORNERS, CORNERS[::1]]
    sources += [Image.fromarray(CORNERS), Image.open(path)]
    keys = {open_picture(source, CONFIG).key for source in sources}
    assert len(keys) == 1


def test_a_picture_says_how_it_was_scaled(tmp_path: Path) -> None:
    path = tmp_path / "screen.png"
    Image.new("RGB", (1920, 1080)).save(path)
    assert str(open_picture(path, CONFIG)).endswith("screen.png: 1920 × 1080 → 1056 × 576, 264 tokens of 280")
    assert open_picture(path, CONFIG, budget="high").tokens == 1100


def test_the_source_is_left_as_it_was() -> None:
    picture = drawn("P one colour clear", 9, 9, 1)
    before = (picture.mode, picture.size, picture.tobytes(), dict(picture.info))
    pixels = CORNERS.copy()
    open_picture(picture, CONFIG)
    seen = open_picture(pixels, CONFIG, budget=70)
    first = seen.draw().copy()
    pixels[:] = 0
    assert before == (picture.mode, picture.size, picture.tobytes(), dict(picture.info))
    assert np.array_equal(seen.draw(), first)


def test_an_array_that_needs_no_scaling_is_kept_apart_from_its_owner() -> None:
    pixels = np.full((768, 768, 3), 7, np.uint8)
    seen = open_picture(pixels, CONFIG)
    pixels[:] = 0
    assert seen.size == (768, 768) and (seen.draw() == 7).all()


def test_keys_tell_content_budget_and_tower_apart() -> None:
    other = CORNERS.copy()
    other[5, 5] ^= 1
    pictures = [open_picture(CORNERS, CONFIG, budget=budget) for budget in BUDGETS]
    pictures += [open_picture(other, CONFIG, budget=1120), open_picture(CORNERS, PictureConfig(pooling=1), budget=1120)]
    assert len({picture.key for picture in pictures}) == len(pictures)
    assert open_picture(CORNERS, CONFIG).key == open_picture(CORNERS.copy(), CONFIG, budget=280).key


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        (None, 140),
        ("auto", 140),
        ("low", 70),
        ("high", 1120),
        (560, 560),
        ("280", 280),
        *zip(BUDGETS, BUDGETS, strict=True),
    ],
)
def test_budgets(asked: Any, tokens: int) -> None:
    assert budget_of(asked, 140) == tokens


@pytest.mark.parametrize("asked", [0, -70, 100, 1121, 280.0, True, "medium", "", "٧٠x", [70]])
def test_other_budgets_are_refused(asked: Any) -> None:
    with pytest.raises(PromptError, match="expected 70, 140, 280, 560, 1120 soft tokens"):
        budget_of(asked, 140)


# --- What is refused


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than anyone wants."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PNG, JPEG = saved(Image.fromarray(CORNERS), "PNG"), saved(Image.fromarray(CORNERS), "JPEG")
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
FTYP = b"\0\0\0\x18ftyp"
REFUSED: dict[str, tuple[Any, str]] = {
    "zero bytes": (b"", "has zero bytes"),
    "not a picture": (b"hello" * 100, "not a picture; expected PNG, JPEG"),
    "cut short": (saved(Image.fromarray(NOISE), "PNG")[:2000], "cannot be read"),
    "cut short, JPEG": (saved(Image.fromarray(NOISE), "JPEG")[:1500], "truncated"),
    "only a header": (PNG[:20], "cannot be read"),
    "damaged": (PNG[:50] + bytes(40) + PNG[90:], "cannot be read"),
    "bomb": (bomb(20_000, 20_000), "20,000 × 20,000 pixels are more than 178,956,970|decompression bomb"),
    "bomb below Pillow's limit": (bomb(13_000, 13_000), "cannot be read"),
    "SVG": (b'<?xml version="1.0"?>\n<svg width="1"></svg>', "is an SVG drawing"),
    "SVG alone": (b'\xef\xbb\xbf <svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
    "web page": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "PDF": (b"%PDF-1.7\n", "--pdf"),
    "MP4": (FTYP + b"isom\0\0\0\0", "--video"),
    "MOV": (FTYP + b"qt  \0\0\0\0", "--video"),
    "WebM": (b"\x1a\x45\xdf\xa3....", "--video"),
    "AVI": (b"RIFF\0\0\0\0AVI LIST", "--video"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "float array": (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\].*\(x \* 255\)"),
    "int64 array": (np.zeros((4, 4, 3), np.int64), r"int64 \[4, 4, 3\]; expected uint8"),
    "grey array": (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]; expected"),
    "four channels": (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]; expected"),
    "channels first": (np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\]; expected"),
    "a batch": (np.zeros((1, 4, 4, 3), np.uint8), r"uint8 \[1, 4, 4, 3\]; expected"),
    "no pixels": (np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\]; expected.*at least one"),
    "float picture": (Image.new("F", (4, 4)), "floating-point numbers"),
    "32-bit picture": (Image.new("I", (4, 4), 70_000), "32-bit numbers"),
    "a list": ([1, 2, 3], "given as list; expected a path"),
    "None": (None, "given as NoneType; expected a path"),
    "no such file": ("nothing/here.png", "nothing/here.png: this path does not exist"),
    "a folder": (str(Path(__file__).parent), "is a folder"),
    "a device": ("/dev/zero", "is not an ordinary file"),
    "a long name": ("x" * 5000, "cannot be read"),
    "a NUL in the name": ("a\0b", "cannot be read|does not exist"),
    "file URL": (Path(__file__).as_uri(), "file: is not fetched"),
    "short file URL": ("file:/etc/passwd", "file: is not fetched"),
    "FTP": ("ftp://host/a.png", "ftp: is not fetched"),
    "S3": ("s3://bucket/a.png", "s3: is not fetched"),
    "data without a comma": ("data:image/png;base64", "has no comma"),
    "data that is no base64": ("data:image/png;base64,%%%", "base64 text is damaged"),
    "empty data": ("data:image/png;base64,", "has zero bytes"),
    "SVG data": ("data:image/svg+xml,%3Csvg%2F%3E", "is an SVG drawing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused(case: str) -> None:
    source, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PromptError) as caught:
            open_picture(source, CONFIG)
    said = str(caught.value)
    assert re.search(message, said, re.DOTALL), said
    assert said.count("\n") < 3 and len(said) < 400


def test_the_limit_of_pixels_holds_whatever_pillow_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PromptError, match=f"more than {PIXELS:,}"):
        open_picture(bomb(20_000, 20_000), CONFIG)


def test_a_heic_picture_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(PromptError, match=r"mlx-diffgemma\[heic\]"):
        open_picture(FTYP + b"heic" + bytes(40), CONFIG)
