"""A small copy of a picture in a terminal's colours: two pixels a character, one above the other."""

from itertools import pairwise

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text

from ..text.pictures.images import Picture

COLUMNS = 44


def thumbnail(picture: Picture) -> Text:
    """A picture as the model sees it, COLUMNS characters wide."""
    pixels = picture.draw()
    height, width, _ = pixels.shape
    rows = max(2, round(COLUMNS * height / width / 2) * 2)
    small = _means(_means(pixels.astype(np.float32), rows, 0), COLUMNS, 1).round().astype(int)
    drawn = Text()
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            drawn.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        drawn.append("\n")
    drawn.rstrip()
    return drawn


def _means(pixels: np.ndarray, count: int, axis: int) -> np.ndarray:
    """`count` means of neighbours along an axis; nearest pixels where there are fewer than that."""
    size = pixels.shape[axis]
    edges = np.arange(count + 1) * size // count
    parts = [np.take(pixels, range(a, max(b, a + 1)), axis).mean(axis) for a, b in pairwise(edges)]
    return np.stack(parts, axis)
