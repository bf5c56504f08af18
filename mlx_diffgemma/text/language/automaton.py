"""What a language is, as plain data: a sequence of parts, each a byte automaton or a few literal texts.

A part says which texts it stands for and how they may be spelled in tokens. An `Automaton` takes every spelling: any
tokens whose bytes it reads. `Spelled` takes the tokenizer's own: exactly the ids that encode the text.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BYTES = 256  # columns of a table that are UTF-8 bytes; the control symbols come behind them


@dataclass(frozen=True, kw_only=True, eq=False)
class Automaton:
    """A deterministic automaton over bytes and control symbols, with no state that is out of reach or at a dead end.

    transitions  int32 [S, 256 + C]: the state after each symbol, −1 where there is none. Columns 0 … 255 are UTF-8
                 bytes, column 256 + c is the token named `controls[c]`, which is one symbol and has no bytes
    accepting    bool [S]: the text may end here
    controls     names of tokens, such as '<|"|>'
    start        the first state, always 0
    """

    transitions: np.ndarray
    accepting: np.ndarray
    controls: tuple[str, ...] = ()
    start: int = 0

    @property
    def states(self) -> int:
        return len(self.accepting)

    def walk(self, text: str | bytes, state: int | None = None) -> int:
        """The state behind `text`, −1 when no text of the language goes on like this. Inside a str a control symbol
        is written by its name."""
        state = self.start if state is None else state
        for symbol in self.symbols(text):
            if state < 0:
                break
            state = int(self.transitions[state, symbol])
        return state

    def accepts(self, text: str | bytes) -> bool:
        """Whether `text` is in the language."""
        state = self.walk(text)
        return state >= 0 and bool(self.accepting[state])

    def symbols(self, text: str | bytes) -> Iterator[int]:
        """The columns that spell `text`; control symbols are recognised by name in a str, never in bytes."""
        while isinstance(text, str):
            found = [(at, -len(name), c) for c, name in enumerate(self.controls) if (at := text.find(name)) >= 0]
            if not found:
                text = text.encode()
                break
            at, length, control = min(found)
            yield from text[:at].encode()
            yield BYTES + control
            text = text[at - length :]
        yield from text


@dataclass(frozen=True, kw_only=True)
class Spelled:
    """One of `texts`, in the tokenizer's own spelling: exactly the ids that it encodes the text into."""

    texts: tuple[str, ...]


Part = Automaton | Spelled


@dataclass(frozen=True, kw_only=True, eq=False)
class Language:
    """The texts made of one text of each part, in order. `notes`: what it leaves out of what was asked for, in words,
    such as recursion beyond its depth."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    def __add__(self, other: "Language") -> "Language":
        """This language's texts, each followed by one of the other's."""
        return Language(parts=self.parts + other.parts, notes=tuple(dict.fromkeys(self.notes + other.notes)))

    @cached_property
    def digest(self) -> str:
        """A name of the content: equal for languages made of the same parts, whatever they were made from."""
        seen = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            if isinstance(part, Spelled):
                seen.update(repr(part.texts).encode())
            else:
                seen.update(repr((part.transitions.shape, part.controls, part.start)).encode())
                seen.update(np.ascontiguousarray(part.transitions, np.int32).tobytes())
                seen.update(np.packbits(part.accepting).tobytes())
        return seen.hexdigest()
