"""Where literal text meets a part that is none, a token may reach over the joint: of "re" and a hole the model would
write "return" in one token, of "Dear " and a hole " Ada". Pins in the tokenizer's own spelling up to the joint would
forbid what it likes best, so what such a token could hold is moved from the literal text into its neighbour, which is
spelled as a whole.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from ...text.language.automaton import BYTES, Part, Spelled
from ...text.language.graph import Graph, Table, language

Split = Callable[[str], list[bytes]]  # a text → its own tokens


class Joints:
    """The tokens of one vocabulary, and what of them may reach over a joint."""

    def __init__(self, tokens: Sequence[bytes | None], split: Split):
        self.tokens, self.split = tokens, split

    @cached_property
    def _longest(self) -> int:
        return max((len(token) for token in self.tokens if token), default=0)

    @cached_property
    def _forwards(self) -> list[bytes]:
        return sorted(token for token in self.tokens if token and len(token) > 1)

    @cached_property
    def _backwards(self) -> list[bytes]:
        return sorted(token[::-1] for token in self.tokens if token and len(token) > 1)

    def healed(self, parts: Sequence[Part]) -> list[Part]:
        """Parts for the same texts, without joints that a token could reach over between a literal and another part."""
        made = list(parts)
        for n in range(len(made) - 1):
            if not _is_literal(made[n]) and _is_literal(made[n + 1]):
                made[n : n + 2] = self._head_moved(made[n], made[n + 1])
        for n in range(len(made) - 1):
            if _is_literal(made[n]) and not _is_literal(made[n + 1]):
                made[n : n + 2] = self._tail_moved(made[n], made[n + 1])
        return [part for part in made if part != EMPTY]

    def _head_moved(self, part: Part, literal: Part) -> list[Part]:
        """A part and the literal behind it, whose first tokens move as far as one could reach over."""
        text = _text(literal)
        over = self._over(self._backwards, text.encode()[::-1], _last_bytes(part), lambda rest: _ends_with(part, rest))
        head = _covering(self.split(text), over) if over else ""
        return [_joined("", part, head), Spelled(texts=(text[len(head) :],))] if head else [part, literal]

    def _tail_moved(self, literal: Part, part: Part) -> list[Part]:
        """A literal and the part behind it; the literal's last tokens move as far as one could reach over."""
        text = _text(literal)
        over = self._over(self._forwards, text.encode(), _first_bytes(part), lambda rest: _begins_with(part, rest))
        tail = _covering(self.split(text), over, last=True) if over else ""
        return [Spelled(texts=(text[: -len(tail)],)), _joined(tail, part, "")] if tail else [literal, part]

    def _over(self, tokens: list[bytes], side: bytes, beyond: list[int], fits: Callable[[bytes], bool]) -> int:
        """The most bytes at the end of `side` with which a token begins that `fits` behind them, where it goes on with
        a byte of `beyond`; 0 for none."""
        for size in range(min(len(side), self._longest - 1), 0, -1):
            for byte in beyond:
                begin = side[-size:] + bytes([byte])
                for at in range(bisect_left(tokens, begin), len(tokens)):
                    if not tokens[at].startswith(begin):
                        break
                    if fits(tokens[at][size:]):
                        return size
        return 0


EMPTY = Spelled(texts=("",))


def _is_literal(part: Part) -> bool:
    return isinstance(part, Spelled) and len(part.texts) == 1


def _text(literal: Part) -> str:
    assert isinstance(literal, Spelled)
    return literal.texts[0]


def _covering(tokens: Sequence[bytes], size: int, *, last: bool = False) -> str:
    """As few of the first tokens, or the last ones, as hold so many bytes and whole characters."""
    some = b""
    for token in reversed(tokens) if last else tokens:
        some = token + some if last else some + token
        if len(some) >= size:
            try:
                return some.decode()
            except UnicodeDecodeError:
                continue
    return some.decode()


def _first_bytes(part: Part) -> list[int]:
    if isinstance(part, Spelled):
        return sorted({text.encode()[0] for text in part.texts})
    return np.flatnonzero(part.transitions[part.start, :BYTES] >= 0).tolist()


def _last_bytes(part: Part) -> list[int]:
    if isinstance(part, Spelled):
        return sorted({text.encode()[-1] for text in part.texts})
    return np.flatnonzero(np.append(part.accepting, False)[part.transitions[:, :BYTES]].any(axis=0)).tolist()


def _begins_with(part: Part, some: bytes) -> bool:
    """Whether a text of the part does."""
    if isinstance(part, Spelled):
        return any(text.encode().startswith(some) for text in part.texts)
    return part.walk(some) >= 0


def _ends_with(part: Part, backwards: bytes) -> bool:
    """The same of its end, and bytes from right to left."""
    if isinstance(part, Spelled):
        return any(text.encode().endswith(backwards[::-1]) for text in part.texts)
    states = np.arange(part.states)
    for byte in backwards[::-1]:
        states = part.transitions[states, byte]
        states = states[states >= 0]
    return bool(part.accepting[states].any())


def _joined(before: str, part: Part, after: str) -> Part:
    """The texts of a part, between two others."""
    if isinstance(part, Spelled):
        return Spelled(texts=tuple(before + text + after for text in part.texts))
    size = BYTES + len(part.controls)
    inner = Table(starts=np.arange(size), next=part.transitions, accepting=part.accepting, size=size)
    graph = Graph()
    ends = [graph.state() for _ in range(4)]
    graph.text(ends[0], before, ends[1])
    graph.insert(ends[1], inner, ends[2])
    graph.text(ends[2], after, ends[3])
    [joined] = language(graph, ends[0], ends[3], part.controls, empty="").parts
    return joined
