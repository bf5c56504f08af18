"""A text with holes, cut so that what the canvas must spell fits it: the rest of the text goes into the prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add

from ...errors import ConfigError, PromptError
from ...text.language.automaton import Language, Part, Spelled
from ...text.language.texts import Hole, literal

Count = Callable[[str], int]  # tokens of a text
SOMETHING = Hole(least=1)  # what may stand in a hole of which nothing is said
LINES = Hole(pattern=r"([^\n]*\n)*")  # none, or whole lines


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Runs of literal text with a hole between each two of them; `before` and `after` are not on the canvas."""

    runs: tuple[str, ...]
    holes: tuple[Hole, ...]
    before: str = ""
    after: str = ""

    @classmethod
    def marked(cls, text: str, mark: str, holes: Sequence[Hole]) -> "Draft":
        """A text with holes where `mark` stands. Errors: ConfigError when it is empty or missing, or there are more or
        fewer `holes` than marks."""
        if not mark:
            raise ConfigError("the mark of a hole may not be empty.")
        runs = tuple(text.split(mark))
        if len(runs) == 1:
            raise ConfigError(f"the text has no hole: {mark!r} is not in it.\nWrite it where text is to be filled in.")
        if holes and len(holes) != len(runs) - 1:
            raise ConfigError(f"the text has {len(runs) - 1} marks {mark!r}, but {len(holes)} holes are described.")
        return cls(runs=runs, holes=tuple(holes) or (SOMETHING,) * (len(runs) - 1))

    def language(self) -> Language:
        """Of what the canvas must spell."""
        made: dict[Hole, Language] = {hole: hole.language() for hole in self.holes}  # equal holes are one automaton
        parts = [literal(self.runs[0])] if self.runs[0] else []
        for run, hole in zip(self.runs[1:], self.holes, strict=True):
            parts += [made[hole], literal(run)] if run else [made[hole]]
        return reduce(add, parts)

    def whole(self, canvas: str) -> str:
        """The text around what the canvas says."""
        return self.before + canvas + self.after

    def filled(self, canvas: str) -> tuple[str, ...]:
        """What stands in the holes; of several ways to read them the one with the shortest first holes."""
        text, parts = canvas.encode(), {hole: hole.language().parts for hole in self.holes}

        @cache
        def behind(number: int, at: int) -> tuple[str, ...] | None:
            """The holes from `number` on, where the run before that hole begins at byte `at`."""
            run = self.runs[number].encode()
            if not text.startswith(run, at):
                return None
            start = at + len(run)
            if number == len(self.holes):
                return () if start == len(text) else None
            for end in _ends(parts[self.holes[number]], text, start):
                if (rest := behind(number + 1, end)) is not None:
                    return (text[start:end].decode(), *rest)
            return None

        return behind(0, 0) or ()


def _ends(parts: Sequence[Part], text: bytes, start: int) -> Iterator[int]:
    """Where a text of the (only) part may end that begins at `start`."""
    [part] = parts
    if isinstance(part, Spelled):
        yield from sorted(start + len(t.encode()) for t in part.texts if text.startswith(t.encode(), start))
        return
    state = part.start
    for at in range(start, len(text) + 1):
        if part.accepting[state]:
            yield at
        if at == len(text) or (state := int(part.transitions[state, text[at]])) < 0:
            return


def at_cursor(prefix: str, suffix: str, room: int, count: Count) -> Draft:
    """A hole between `prefix` and `suffix`, with the line it is in and as many lines about it as fit half of `room`
    tokens. Errors: PromptError when that line leaves no room."""
    above, below = lines_of(prefix), lines_of(suffix)
    inside = (above.pop() if above and not above[-1].endswith("\n") else "", below.pop(0) if below else "")
    if (size := count(inside[0]) + count(inside[1])) + 2 > room:
        raise PromptError(f"the line at the cursor has {size} tokens; a canvas has {room}, and the hole needs some.")
    return _around(above, inside, below, SOMETHING, room // 2, count)


def of_lines(text: str, lines: tuple[int, int], room: int, count: Count) -> Draft:
    """A hole in place of some lines, counted from 1 (both ends belong to them), with as many lines about it as fit
    beside half as much again as they have now. Errors: PromptError for lines that are not there, or fill the canvas."""
    check_lines(text, lines)
    every, (first, last) = lines_of(text), lines
    old = every[first - 1 : last]
    size = count("".join(old))
    if size + 2 > room:
        raise PromptError(
            f"lines {first}–{last} have {size} tokens; a canvas has {room}, which must hold them.\nName fewer lines."
        )
    hole = LINES if old[-1].endswith("\n") else Hole()
    left = max(0, min(room // 2, room - size * 3 // 2 - 8))
    return _around(every[: first - 1], ("", ""), every[last:], hole, left, count)


def _around(above: list[str], inside: tuple[str, str], below: list[str], hole: Hole, room: int, count: Count) -> Draft:
    """`inside` is pinned in any case; lines above and below by turns, the nearest first, while `room` tokens hold them.
    A side stops at the first line that does not fit."""
    a, b = len(above), 0
    more = {"above": True, "below": True}
    runs = inside
    while any(more.values()):
        for side in more:
            up, down = (a - 1, b) if side == "above" else (a, b + 1)
            wider = ("".join(above[max(up, 0) :]) + inside[0], inside[1] + "".join(below[:down]))
            more[side] = more[side] and 0 <= up and down <= len(below) and sum(map(count, wider)) <= room
            if more[side]:
                a, b, runs = up, down, wider
    return Draft(runs=runs, holes=(hole,), before="".join(above[:a]), after="".join(below[b:]))


def check_lines(text: str, lines: tuple[int, int]) -> None:
    """Errors: PromptError when the text does not have them."""
    size = len(lines_of(text))
    if not 1 <= lines[0] <= lines[1] <= size:
        raise PromptError(f"there are no lines {lines[0]}–{lines[1]}: the text has {size} lines, counted from 1.")


def lines_of(text: str) -> list[str]:
    """Lines with their ends, which are "\\n"."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
