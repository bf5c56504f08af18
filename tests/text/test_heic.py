"""HEIC pictures, as phones take them: by an extra, read as any other."""

import io
import math
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.text.pictures.images import PictureConfig, open_picture

CONFIG = PictureConfig()


def heic(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(picture).save(file, quality=95, chroma=444, **options)
    return file.getvalue()


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """Four flat quarters, of which each is told apart after any codec."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for n, colour in enumerate([(230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 20)]):
        top, left = height // 2 * (n // 2), width // 2 * (n % 2)
        pixels[top : top + height // 2, left : left + width // 2] = colour
    return Image.fromarray(pixels)


def far(one: Any, other: Any) -> float:
    """How far two pictures are apart at the middles of their quarters."""
    a, b = (picture.draw()[96::192, 96::192].astype(int) for picture in (one, other))
    return float(abs(a - b).max()) if a.shape == b.shape else math.inf


def test_heic_is_read_as_any_picture() -> None:
    seen = open_picture(heic(photo()), CONFIG)
    assert seen.original == (96, 64) and far(seen, open_picture(photo(), CONFIG)) < 12


def test_heic_is_turned_once() -> None:
    """Phones store pictures lying and say so twice: in the container, which its decoder obeys, and in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = open_picture(photo().transpose(Image.Transpose.ROTATE_270), CONFIG)
    seen = open_picture(heic(photo(), exif=exif.tobytes()), CONFIG)
    assert seen.original == (64, 96) and far(seen, upright) < 12


def test_transparent_heic_is_laid_on_white() -> None:
    picture = photo().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size).point(lambda level: 255 * (level > 127)))
    assert far(open_picture(heic(picture), CONFIG), open_picture(picture, CONFIG)) < 12


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
def test_damaged_heic_is_refused(kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = heic(Image.fromarray(noise))
    with pytest.raises(PromptError, match="cannot be read"):
        open_picture(data[: int(len(data) * kept)], CONFIG)
