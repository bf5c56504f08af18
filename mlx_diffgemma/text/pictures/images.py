"""Pictures → patches, as the reference makes them: turned upright, laid on white, scaled to fill a budget of soft
tokens, cut into squares (transformers Gemma4ImageProcessorPil). The one file that knows Pillow.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import PromptError
from .sources import ANYWHERE, Access, read

if TYPE_CHECKING:
    from PIL.Image import Image

BUDGETS = (70, 140, 280, 560, 1120)
WORDS = {"low": 70, "high": 1120}  # as OpenAI's `detail`; "auto" leaves it to the checkpoint
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # Pillow's others may start programs (EPS)
PIXELS = 178_956_970  # the most of one picture: what Pillow itself takes for a decompression bomb
Source = Any  # str | os.PathLike | bytes | bytearray | memoryview | PIL.Image.Image | np.ndarray | Picture


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How a checkpoint's tower wants pictures: squares of `patch_size` pixels, `pooling`² of them to a soft token, and
    the budget of soft tokens where nobody asks for another."""

    patch_size: int = 16
    pooling: int = 3
    budget: int = 280

    @property
    def side(self) -> int:
        """Pixels to a side of what becomes one soft token."""
        return self.patch_size * self.pooling


@dataclass(frozen=True, kw_only=True)
class Seen:
    """To what a picture was scaled."""

    name: str
    original: tuple[int, int]  # width, height, upright
    size: tuple[int, int]  # width, height as the tower sees it
    tokens: int  # soft tokens
    budget: int

    def __str__(self) -> str:
        (w, h), (wide, high) = self.original, self.size
        return f"{self.name}: {w} × {h} → {wide} × {high}, {self.tokens} tokens of {self.budget}"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture scaled for the tower. Two with one `key` give the same soft tokens."""

    key: str  # of the pixels the tower sees, and of the budget
    name: str = field(compare=False)  # what messages call it
    original: tuple[int, int] = field(compare=False)  # width, height, upright
    size: tuple[int, int]  # width, height as the tower sees it
    budget: int
    config: PictureConfig
    draw: Callable[[], np.ndarray] = field(compare=False, repr=False)  # → pixels, uint8 [height, width, 3]
    source: str | None = field(default=None, compare=False, repr=False)  # the path or URL that it was opened from

    @property
    def tokens(self) -> int:
        """Soft tokens in the prompt; two more stand around them."""
        return self.size[0] * self.size[1] // self.config.side**2

    @property
    def columns(self) -> int:
        """Patches to a row."""
        return self.size[0] // self.config.patch_size

    def patches(self) -> np.ndarray:
        """float32 [P, 3 · patch²] in 0 … 1: row by row; inside a patch row by row too, the colours side by side."""
        p, (width, height) = self.config.patch_size, self.size
        squares = self.draw().reshape(height // p, p, width // p, p, 3).swapaxes(1, 2)
        return _LEVELS[squares].reshape(-1, 3 * p * p)

    @property
    def seen(self) -> Seen:
        return Seen(name=self.name, original=self.original, size=self.size, tokens=self.tokens, budget=self.budget)

    def __str__(self) -> str:
        return str(self.seen)


_LEVELS = (np.arange(256) * (1 / 255)).astype(np.float32)  # rounded once, as the reference does


def open_picture(
    source: Source, config: PictureConfig, *, budget: int | str | None = None, access: Access = ANYWHERE
) -> Picture:
    """Read and scale a picture: a path, `data:` URI or http(s) URL, bytes, a PIL picture, or an array uint8 [h, w, 3].

    `budget`: 70, 140, 280, 560 or 1120 soft tokens, "low", "high", or None for the checkpoint's own. One that is open
    already stays as it is. Errors: PromptError, naming the source, for whatever is not a picture that can be read.
    """
    if isinstance(source, Picture):
        return source
    tokens = budget_of(budget, config.budget)
    name, picture = _decode(source, access)
    written = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    return replace(scaled(name, picture, config, tokens), source=written)


def budget_of(asked: int | str | None, default: int) -> int:
    """The soft tokens that a budget or a word for one means. Errors: PromptError for any other."""
    if asked is None or asked == "auto":
        return default
    if isinstance(asked, str) and asked in WORDS:
        return WORDS[asked]
    tokens = int(asked) if isinstance(asked, str) and asked.isdecimal() else asked
    if type(tokens) is not int or tokens not in BUDGETS:
        raise PromptError(
            f"a picture's budget is {asked!r}; expected {', '.join(map(str, BUDGETS))} soft tokens,"
            " 'low' (70) or 'high' (1120)."
        )
    return tokens


def scaled_size(width: int, height: int, budget: int, config: PictureConfig) -> tuple[int, int]:
    """The width and height that fill a budget: the picture's shape, to the next lower multiple of `side` each.

    Small pictures grow. A strip too thin for one row of soft tokens gets one, and loses its shape.
    Source: transformers get_aspect_ratio_preserving_size, in its order of operations.
    """
    side = config.side
    factor = math.sqrt(budget * side**2 / (height * width))
    high, wide = (math.floor(factor * length / side) * side for length in (height, width))
    if high == 0:
        return min(math.floor(width / height) * side, budget * side), side
    if wide == 0:
        return side, min(math.floor(height / width) * side, budget * side)
    return wide, high


def scaled(
    name: str, picture: "Image", config: PictureConfig, budget: int, size: tuple[int, int] | None = None
) -> Picture:
    """An RGB picture, scaled to its budget with Pillow's bicubic filter, on 8 bits as the reference."""
    from PIL import Image

    size = size or scaled_size(*picture.size, budget, config)
    seen = picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(seen)
    facts = f"{budget} {config.patch_size} {config.pooling} {size[0]} {size[1]} "
    key = hashlib.sha256(facts.encode() + pixels.tobytes()).hexdigest()
    return Picture(
        key=key, name=name, original=picture.size, size=size, budget=budget, config=config, draw=lambda: pixels
    )


def from_pixels(
    name: str, pixels: np.ndarray, config: PictureConfig, budget: int, size: tuple[int, int] | None = None
) -> Picture:
    """A picture from an array uint8 [height, width, 3], scaled to `size` if it is named, else to fill its budget.

    Errors: PromptError for any other array.
    """
    return scaled(name, _from_array(pixels, name), config, budget, size)


def _decode(source: Source, access: Access) -> tuple[str, "Image"]:
    """Any source → its name, and the picture in RGB."""
    from PIL import Image

    if isinstance(source, Image.Image):
        name = f"PIL picture of mode {source.mode}"
        return name, _guarded(name, lambda: rgb(source))
    if isinstance(source, np.ndarray):
        return "array", _from_array(source)
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if not isinstance(source, str | os.PathLike | bytes):
        raise PromptError(
            f"a picture is given as {type(source).__name__}; expected a path, a URL, a data: URI, bytes,"
            " a PIL picture, or a uint8 array [height, width, 3]."
        )
    name, data = read(source, access)
    if complaint := _not_a_picture(data):
        raise PromptError(f"{name}: {complaint}")
    return name, _guarded(name, lambda: rgb(_open(name, data)))


def _from_array(array: np.ndarray, name: str = "array") -> "Image":
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        hint = " Numbers from 0 to 1 become (x * 255).round().astype('uint8')." if array.dtype.kind == "f" else ""
        raise PromptError(
            f"a picture's array is {array.dtype} {list(array.shape)}; expected uint8 [height, width, 3], at least one"
            f" pixel.{hint}"
        )
    check_pixels(name, array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(array), "RGB")


def _open(name: str, data: bytes) -> "Image":
    from PIL import Image

    if _brand(data) in _HEIC:
        return _open_heic(name, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's: about sizes, which are checked here, and odd metadata
        picture = Image.open(BytesIO(data), formats=FORMATS)
    check_pixels(name, *picture.size)
    return picture


def _open_heic(name: str, data: bytes) -> "Image":
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PromptError(
            f"{name}: HEIC pictures need an extra: pip install 'mlx-diffgemma[heic]', or export it as JPEG."
        ) from None
    heif = pillow_heif.open_heif(BytesIO(data), convert_hdr_to_8bit=True)
    check_pixels(name, *heif.size)
    return heif.to_pillow()


def check_pixels(name: str, width: int, height: int) -> None:
    """Errors: PromptError for more pixels than one picture may have."""
    if width * height > PIXELS:
        raise PromptError(f"{name}: {width:,} × {height:,} pixels are more than {PIXELS:,}; scale it down first.")


def _guarded(name: str, make: Callable[[], "Image"]) -> "Image":
    try:
        return make()
    except PromptError:
        raise
    except MemoryError as error:
        raise PromptError(f"{name}: too large for the memory that is free.") from error
    except Exception as error:  # Pillow raises nearly every kind for damaged files
        what = " ".join(str(error).split())
        if "cannot identify" in what:
            what = f"not a picture; expected {', '.join(FORMATS)} or HEIC"
        raise PromptError(f"{name}: cannot be read: {what[:160] or type(error).__name__}.") from error


def rgb(picture: "Image") -> "Image":
    """Upright, 8 bits, and laid on white where it is transparent (transformers convert_to_rgb).

    Numbers of 16 bits keep their upper 8, as Pillow does for colours; the reference clips grey ones to white.
    """
    from PIL import Image, ImageOps

    picture.load()
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # damaged metadata: nobody knows which side is up
        picture = picture.copy()
    if picture.mode.startswith("I"):
        picture = _from_integers(picture)
    if picture.mode == "F":
        raise ValueError("it holds floating-point numbers; expected colours of 8 or 16 bits")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if "A" in picture.getbands() or "a" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _from_integers(picture: "Image") -> "Image":
    """Grey of 16 bits (Pillow's modes I;16, I;16B and, for some files, I) → 8 bits."""
    from PIL import Image

    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("it holds 32-bit numbers; expected colours of 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8), "L")


_HEIC = ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")


def _brand(data: bytes) -> str:
    """The kind of an ISO media file (HEIC, AVIF, MP4, MOV), or nothing."""
    return data[8:12].decode("latin-1") if data[4:8] == b"ftyp" else ""


def _not_a_picture(data: bytes) -> str | None:
    """What to say about bytes that people take for a picture."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if data.startswith(b"%PDF"):
        return "is a PDF; give it with --pdf, or its pages as pictures."
    if data.startswith(b"\x1a\x45\xdf\xa3") or data[8:12] == b"AVI ":
        return "is a video; give it with --video."
    if (brand := _brand(data)) and brand not in _HEIC and brand not in ("avif", "avis"):
        return "is a video; give it with --video."
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in start):
        return "is an SVG drawing, not pixels; export it as PNG."
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture."
    return None
