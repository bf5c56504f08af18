"""A text whose unlikely tokens stand out."""

import math
from collections.abc import Sequence

from ..pipeline.results import Decode
from .canvas import Cell, Painter, ansi, wrap

DOUBTED, ODD = math.log(0.5), math.log(0.1)  # nats: below the first a token is marked, below the second strongly


def style(logprob: float) -> str:
    """A style of canvas.STYLES."""
    return "odd" if logprob < ODD else "doubted" if logprob < DOUBTED else ""


def cells(ids: Sequence[int], logprobs: Sequence[float], painter: Painter) -> list[Cell]:
    """The glyphs of a text by how likely each token was given its left. A stop id at the end is left out."""
    pieces = zip(painter.pieces(list(ids)), logprobs, strict=False)
    return [(text, size, style(logprob)) for glyphs, logprob in pieces for text, size in glyphs]


def marked(ids: Sequence[int], logprobs: Sequence[float], decode: Decode, *, columns: int, color: bool) -> str:
    """The same as terminal text, in lines of at most `columns` cells."""
    lines = wrap(cells(ids, logprobs, Painter(decode, color)), columns)
    return "\n".join(ansi(line, color) for line in lines)


def likelihood(avg_logprob: float) -> str:
    """How a mean log-probability is told."""
    return f"{avg_logprob:.3f} nats a token ({math.exp(avg_logprob):.0%})"
