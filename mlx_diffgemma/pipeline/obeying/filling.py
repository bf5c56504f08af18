"""What is said to the model when it fills in a text: a draft for the canvas, and a prompt that goes with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from ...errors import ConfigError
from ...generation.noise import Noise
from ...text.language.texts import Hole
from .drafts import Count, Draft, at_cursor, lines_of
from .drafts import of_lines as draft_of_lines

Start = Literal["noise", "text"]  # how an edit's canvas begins

TEXT = "Fill in what is missing at every {mark} in this text. Answer with the whole text.\n\n{text}"
CURSOR = (
    "Write what is missing at {mark} in this file. Answer with lines {first} to {last}, filled in.\n\n"
    "{prefix}{mark}{suffix}"
)
LINES = (
    "{instruction}\n\nChange nothing but what stands between {open} and {close}. Answer with lines {first} to {last}, "
    "changed and without these marks.\n\n{before}{open}\n{old}{close}\n{after}"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A draft and its prompt; `old` is what the canvas would say if nothing were changed."""

    draft: Draft
    prompt: str
    old: str = ""


class StartingFrom:
    """Another noise, but the only prompt's first canvas begins as a text."""

    def __init__(self, noise: Noise, ids: Sequence[int], *, stop_id: int, pad_id: int):
        self.noise, self.start, self.stop_id, self.pad_id = noise, list(ids), stop_id, pad_id

    def canvas(self, index: int) -> mx.array:
        random = self.noise.canvas(index)
        if index:
            return random
        length = random.shape[1]
        return mx.array([[*self.start, self.stop_id, *[self.pad_id] * length][:length]], mx.int32)

    def draws(self, index: int, step: int) -> mx.array:
        return self.noise.draws(index, step)

    def ids(self, index: int, step: int) -> mx.array:
        return self.noise.ids(index, step)

    def path(self, index: int, step: int) -> mx.array:
        return self.noise.path(index, step)

    def token(self, number: int) -> mx.array:
        return self.noise.token(number)


def of_text(text: str, mark: str, holes: Sequence[Hole]) -> Task:
    """A text with marks. Errors: ConfigError, as `Draft.marked`."""
    return Task(draft=Draft.marked(text, mark, holes), prompt=TEXT.format(mark=mark, text=text))


def of_cursor(prefix: str, suffix: str, room: int, count: Count) -> Task:
    """A cursor in a file. Errors: ConfigError for an empty file, PromptError, as `drafts.at_cursor`."""
    if not prefix and not suffix:
        raise ConfigError("prefix and suffix are empty: there is nothing about the cursor. Use generate instead.")
    draft, mark = at_cursor(prefix, suffix, room, count), _unused("<fill>", prefix + suffix)
    first, last = _lines_on_canvas(draft, prefix + suffix)
    prompt = CURSOR.format(mark=mark, first=first, last=last, prefix=prefix, suffix=suffix)
    return Task(draft=draft, prompt=prompt)


def of_lines(text: str, lines: tuple[int, int], instruction: str, room: int, count: Count) -> Task:
    """Lines of a file to be changed. Errors: ConfigError without an instruction, PromptError, as `drafts.of_lines`."""
    if not instruction.strip():
        raise ConfigError("the instruction is empty: say what is to become of the lines.")
    draft = draft_of_lines(text, lines, room, count)
    every = lines_of(text)
    before, old, after = every[: lines[0] - 1], every[lines[0] - 1 : lines[1]], every[lines[1] :]
    first, last = _lines_on_canvas(draft, text)
    prompt = LINES.format(
        instruction=instruction.strip(),
        open=_unused("<edit>", text),
        close=_unused("</edit>", text),
        first=first,
        last=last,
        before="".join(before),
        old="".join(old) + ("" if old[-1].endswith("\n") else "\n"),
        after="".join(after),
    )
    return Task(draft=draft, prompt=prompt, old=draft.runs[0] + "".join(old) + draft.runs[1])


def _lines_on_canvas(draft: Draft, text: str) -> tuple[int, int]:
    """The first and the last line of the text, counted from 1, that the canvas holds."""
    end = len(text) - len(draft.after)
    return draft.before.count("\n") + 1, max(1, text[:end].count("\n") + (not text[:end].endswith("\n")))


def _unused(mark: str, text: str) -> str:
    """The mark, or one like it that the text does not hold."""
    while mark in text:
        mark = mark[:-1] + "_" + mark[-1]
    return mark
