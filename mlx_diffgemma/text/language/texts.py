"""Literal texts: choices, and a text with holes.

What is literal stays as it is, byte for byte, in the tokenizer's own spelling; what fills a hole is free, bounded in
characters, matches a pattern, or is one of a few choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from .automaton import Language, Part, Spelled
from .characters import PLAIN, write
from .graph import Graph, language
from .regex import regex
from .scalars import strings

MARK = "<fill>"


@dataclass(frozen=True, kw_only=True)
class Hole:
    """What may stand in a hole: `least` to `most` characters (None: as many as fit), or a text that `pattern` matches,
    or one of `choices`. Errors: ConfigError when it says two of these, or most < least."""

    least: int = 0
    most: int | None = None
    pattern: str | None = None
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if sum((self.pattern is not None, self.choices is not None, (self.least, self.most) != (0, None))) > 1:
            raise ConfigError("a hole is bounded in characters, or has a pattern, or has choices: only one of these.")
        if self.least < 0 or (self.most is not None and self.most < max(self.least, 1)):
            raise ConfigError(f"a hole of {self.least} to {self.most} characters holds nothing.")

    def language(self) -> Language:
        """The texts of the hole."""
        if self.pattern is not None:
            return regex(self.pattern)
        if self.choices is not None:
            return choices(self.choices)
        return free_text(least=self.least, most=self.most)


def literal(text: str) -> Language:
    """Exactly `text`. Errors: ConfigError when it is empty, or no Unicode."""
    return Language(parts=(_spelled((text,), "the literal text"),))


def choices(texts: Sequence[str]) -> Language:
    """One of `texts`. Errors: ConfigError when there is none, one is empty, or two are equal."""
    if isinstance(texts, str) or not texts:
        raise ConfigError(f"choices need a list of one text or more, got {texts!r}.")
    spelled = _spelled(tuple(texts), "a choice")
    first: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        if first.setdefault(text, number) != number:
            raise ConfigError(f"choices {first[text]} and {number} are equal: {text!r}.")
    return Language(parts=(spelled,))


def free_text(*, least: int = 0, most: int | None = None) -> Language:
    """Any text of `least` to `most` characters, in every spelling."""
    graph = Graph()
    start, end = graph.state(), graph.state()
    write(graph, start, strings((), (), least, most), PLAIN, end)
    return language(graph, start, end, empty=f"no text has {least} characters or more and at most {most}.")


def fill(text: str, *, mark: str = MARK, holes: Sequence[Hole] = ()) -> Language:
    """`text` with a hole wherever `mark` stands: one part for each run of literal text and each hole, in order.

    holes   one for each mark, in order; none: all are free
    Errors: ConfigError when the mark is empty or missing, there are more or fewer holes than marks, or a hole is empty.
    """
    if not mark:
        raise ConfigError("the mark of a hole may not be empty.")
    runs = text.split(mark)
    if len(runs) == 1:
        raise ConfigError(f"the text has no hole: {mark!r} is not in it.\nWrite it where text is to be filled in.")
    filled = list(holes) or [Hole()] * (len(runs) - 1)
    if len(filled) != len(runs) - 1:
        raise ConfigError(f"the text has {len(runs) - 1} marks {mark!r}, but {len(filled)} holes are described.")
    parts: list[Part] = []
    for run, hole in zip(runs, [*filled, None], strict=True):
        if run:
            parts.append(_spelled((run,), "the text"))
        if hole is not None:
            parts.extend(hole.language().parts)
    return Language(parts=tuple(parts))


def _spelled(texts: tuple[str, ...], what: str) -> Spelled:
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{what} is empty." if text == "" else f"{what} is no text: {text!r}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{what} holds half a surrogate pair at character {error.start}: no Unicode.") from error
    return Spelled(texts=texts)
