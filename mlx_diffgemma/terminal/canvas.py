"""Ids of a canvas and how certain they are → cells, lines, and their colours."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from rich.cells import split_graphemes

from ..pipeline.results import Decode

Glyph = tuple[str, int]  # what the eye takes for one character, and how many cells it fills
Cell = tuple[str, int, str]  # the same with its style
Run = tuple[str, str]  # text, style
Line = list[Run]
SURE, NOISY = 0.1, 1.5  # nats: below, a position not accepted is nearly plain; above, it is noise
NOISE = "·:∙;~+*-=^°'"

# style → SGR in colour, SGR without colour, colour in a recording. `likely` and `unsure` grow dimmer with entropy.
STYLES = {
    "": ("", "", "#d8dee9"),
    "asked": ("1", "1", "#f2f5f9"),
    "changed": ("1;32", "1", "#a3e635"),
    "pinned": ("34", "4", "#6f9ce8"),  # a constraint leaves no choice there
    "likely": ("2", "2", "#a0a8b7"),
    "unsure": ("90", "2", "#6b7280"),
    "noise": ("2;90", "2", "#454c59"),
    "status": ("36", "", "#5eb7c9"),
    "doubted": ("33", "4", "#e5c07b"),
    "odd": ("1;31", "1;4", "#e06c75"),
}


class Painter:
    """Ids of one canvas and how certain they are → cells."""

    def __init__(self, decode: Decode, color: bool = True):
        self.decode, self.color = decode, color
        self.before: list[int] = []  # `best` as last drawn
        self.glyphs = lru_cache(maxsize=16384)(self._glyphs)

    def forget(self) -> None:
        """A new canvas begins: nothing has changed yet."""
        self.before = []

    def cells(
        self,
        best: list[int],
        noise: list[int],
        accepted: list[bool],
        entropy: list[float],
        pinned: list[bool] | None = None,
    ) -> list[Cell]:
        """What was accepted is plain, what changed stands out, the rest fades with its entropy into noise; what is
        pinned has a look of its own."""
        before = self.before or best
        cells: list[Cell] = []
        for i, glyphs in enumerate(self.pieces(best)):
            if pinned and pinned[i]:
                cells += [(text, size, "pinned") for text, size in glyphs]
            elif accepted[i] or entropy[i] < NOISY:
                style = "" if accepted[i] else "likely" if entropy[i] < SURE else "unsure"
                style = "changed" if best[i] != before[i] else style
                cells += [(text, size, style) for text, size in glyphs]
            else:
                width = sum(size for _, size in glyphs) or 1
                cells += [(self._noise(noise[i], k), 1, "noise") for k in range(width)]
        self.before = best
        return cells

    def noise(self, ids: list[int]) -> list[Cell]:
        """A canvas that nobody has looked at: every id is noise, as wide as what it spells."""
        widths = [max(sum(size for _, size in glyphs), 1) for glyphs in self.pieces(ids)]
        return [(self._noise(i, k), 1, "noise") for i, width in zip(ids, widths, strict=True) for k in range(width)]

    def _noise(self, ident: int, k: int) -> str:
        """A glyph that stands for a random id. Not its text: that would push the words about."""
        return NOISE[(ident + 5 * k) % len(NOISE)] if self.color else NOISE[0]

    def pieces(self, ids: list[int]) -> list[Sequence[Glyph]]:
        """The glyphs of each id. Bytes of one character are decoded together and shown at the first of them."""
        pieces: list[Sequence[Glyph]] = [self.glyphs((i,)) for i in ids]
        start = 0
        for end in range(len(ids) + 1):
            if end < len(ids) and any(text == "\ufffd" for text, _ in pieces[end]):
                continue
            if end - start > 1:
                pieces[start:end] = [self.glyphs(tuple(ids[start:end]))] + [()] * (end - start - 1)
            start = end + 1
        return pieces

    def _glyphs(self, ids: tuple[int, ...]) -> Sequence[Glyph]:
        """What the ids spell inside a text: they are decoded twice in a row, and the first time is cut off, because a
        tokenizer strips the blank in front of the first word it decodes."""
        once = self.decode(list(ids))
        return glyphs(self.decode(list(ids * 2))[len(once) :])


def glyphs(text: str) -> list[Glyph]:
    """Printable text as (character, cells); newlines have no width, control characters are left out."""
    found: list[Glyph] = []
    for line in harmless(text).splitlines(keepends=True):
        spans, _ = split_graphemes(line.rstrip("\n"))
        found += [(line[start:end], size) for start, end, size in spans]
        found += [("\n", 0)] * line.endswith("\n")
    return found


def harmless(text: str) -> str:
    """Without control characters: a model's words may not move the cursor."""
    text = text.replace("\t", "    ")
    return "".join(c for c in text if c == "\n" or not (c < " " or "\x7f" <= c <= "\x9f" or c in "\u2028\u2029"))


def wrap(cells: Iterable[Cell], columns: int) -> list[Line]:
    """Cells → lines of at most `columns` cells, broken at blanks and between wide characters if possible."""
    lines: list[list[Cell]] = [[]]
    used = cut = 0  # cells used in the last line; how many of its entries may stay when it is broken
    for cell in cells:
        text, size, _ = cell
        if text == "\n":
            lines.append([])
            used = cut = 0
            continue
        if used + size > columns:
            if text == " ":  # a blank at the edge becomes the break
                lines.append([])
                used = cut = 0
                continue
            rest = lines[-1][cut:] if cut else []
            if sum(entry[1] for entry in rest) + size > columns:
                rest = []
            lines[-1:] = [lines[-1][: len(lines[-1]) - len(rest)], rest]
            used, cut = sum(entry[1] for entry in rest), 0
        lines[-1].append(cell)
        used += size
        if text == " " or size > 1:
            cut = len(lines[-1])
    return [_runs(line) for line in lines]


def _runs(cells: list[Cell]) -> Line:
    runs: Line = []
    for text, _, style in cells:
        if runs and runs[-1][1] == style:
            runs[-1] = (runs[-1][0] + text, style)
        else:
            runs.append((text, style))
    return runs


def ansi(line: Line, color: bool) -> str:
    """A line with its styles as terminal codes."""
    return "".join(f"\x1b[{code}m{text}\x1b[0m" if (code := STYLES[style][not color]) else text for text, style in line)
