"""Pictures of 6×6 grids, drawn by Pillow with its own font: what the built-in model's eyes are trained and scored on.

Sizes, margins, lines, colours, noise and where a digit stands in its cell are drawn at random. Two things are held out,
both at once: widths and heights, and the hues of the digits. No picture that eyes are trained on has either.
"""

import colorsys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFont

SEEN_SIDES = (*range(112, 200), *range(260, 340))  # pixels: the square root of a picture's area
UNSEEN_SIDES = (*range(200, 260), *range(340, 480))
UNSEEN_HUES = (0.5, 0.7)  # cyan to blue, on the circle 0 … 1
Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one grid is drawn; lengths in pixels."""

    size: tuple[int, int]  # width, height
    corner: tuple[float, float]  # of the grid, its upper left one
    cell: float
    lines: tuple[int, int]  # width of those between cells; of the frame and those between boxes
    font: int
    paper: Colour
    line: Colour
    ink: Colour
    noise: float  # standard deviation of what is added to every pixel, of 255


def look(rng: np.random.Generator, *, unseen: bool = False, hard: float = 1) -> Look:
    """A look at random, nearly square: 8 × 8 soft tokens at a budget of 70 and 16 pixels each. `hard`, from 0 to 1: how
    wide the margins may be."""
    side = rng.choice(UNSEEN_SIDES if unseen else SEEN_SIDES)
    aspect = np.exp(rng.uniform(-0.08, 0.08))
    width, height = round(side * aspect**0.5), round(side / aspect**0.5)
    grid = min(width, height) * rng.uniform(0.97 - 0.19 * hard, 0.97)
    cell = grid / 6
    thin = int(rng.integers(1, max(2, cell / 10)))
    thick = thin + int(rng.integers(0, max(1, cell / 9) + 1))
    paper, line, ink = _colours(rng, unseen)
    edge = thick / 2
    return Look(
        size=(width, height),
        corner=(_corner(rng, width - grid, edge), _corner(rng, height - grid, edge)),
        cell=cell,
        lines=(thin, thick),
        font=max(7, round(cell * rng.uniform(0.6, 0.9))),
        paper=paper,
        line=line,
        ink=ink,
        noise=rng.uniform(1, 12) if rng.random() < 0.3 else 0,
    )


def _corner(rng: np.random.Generator, spare: float, edge: float) -> float:
    return rng.uniform(edge, max(edge, spare - edge))


def draw(rng: np.random.Generator, cells: np.ndarray, how: Look) -> "Image.Image":
    """Cells [36] (0 = empty) as an RGB picture."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", how.size, how.paper)
    pen, (left, top), cell = ImageDraw.Draw(picture), how.corner, how.cell
    for i in sorted(range(7), key=lambda i: i in (0, 3, 6)):
        pen.line(_between(left + i * cell, top, left + i * cell, top + 6 * cell), how.line, how.lines[i in (0, 3, 6)])
    for i in sorted(range(7), key=lambda i: i % 2 == 0):
        pen.line(_between(left, top + i * cell, left + 6 * cell, top + i * cell), how.line, how.lines[i % 2 == 0])
    shifts = rng.uniform(-0.06, 0.06, (36, 2)) * cell
    for i in np.flatnonzero(cells):
        row, column = divmod(int(i), 6)
        x, y = left + (column + 0.5) * cell + shifts[i, 0], top + (row + 0.5) * cell + shifts[i, 1]
        pen.text((x, y), str(cells[i]), fill=how.ink, font=_font(how.font), anchor="mm")
    return _noisy(rng, picture, how.noise) if how.noise else picture


def _between(*ends: float) -> list[int]:
    return [round(end) for end in ends]


@cache
def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _noisy(rng: np.random.Generator, picture: "Image.Image", deviation: float) -> "Image.Image":
    from PIL import Image

    pixels = picture.width * picture.height
    start = int(rng.integers(0, len(_grain()) - pixels))
    noise = np.float32(deviation) * _grain()[start : start + pixels].reshape(picture.height, picture.width, 1)
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


@cache
def _grain() -> np.ndarray:
    """Normal numbers to cut noise out of: drawing them anew takes longer than all else about a picture."""
    return np.random.default_rng(0).standard_normal(1 << 20, np.float32)


def _colours(rng: np.random.Generator, unseen: bool) -> tuple[Colour, Colour, Colour]:
    """Paper, lines and ink; the digits can be told from the paper by brightness alone."""
    while True:
        hue = rng.uniform(*UNSEEN_HUES) if unseen else (rng.uniform(UNSEEN_HUES[1], 1 + UNSEEN_HUES[0])) % 1
        grey = not unseen and rng.random() < 0.3
        ink = colorsys.hsv_to_rgb(hue, 0 if grey else rng.uniform(0.4, 1), rng.uniform(0, 1))
        paper = colorsys.hsv_to_rgb(rng.random(), rng.choice((0.0, rng.uniform(0, 0.5))), rng.uniform(0, 1))
        share = rng.uniform(0.3, 1)
        line = [share * a + (1 - share) * b for a, b in zip(ink, paper, strict=True)]
        if abs(_brightness(ink) - _brightness(paper)) > 0.35:
            return _bytes(*paper), _bytes(*line), _bytes(*ink)


def _bytes(red: float, green: float, blue: float) -> Colour:
    return round(255 * red), round(255 * green), round(255 * blue)


def _brightness(colour: tuple[float, float, float]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
