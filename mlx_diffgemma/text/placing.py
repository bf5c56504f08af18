"""Where pictures stand in a prompt: for each of them the chat template writes one placeholder, `<|image|>`, and the ids
have a token that begins a picture, as many image tokens as it has soft tokens, and one that ends it.

Source: transformers Gemma4Processor, which puts all of these into the text before it is encoded. So it is done here
where the tokenizer knows them as tokens; where it does not, the text is encoded around them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import TokenizerError
from . import control

IMAGE = "<|image|>"
Encode = Callable[[str], list[int]]
Span = tuple[int, int]  # first id, and the one behind the last


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The three tokens of pictures, and the placeholder that templates write."""

    begin: int
    image: int
    end: int
    placeholder: str = IMAGE

    def count(self, text: str) -> int:
        """Placeholders that the template wrote: those of users are between marks."""
        return len(self._pattern.findall(text))

    def encoded(
        self, text: str, tokens: Sequence[int], encode: Encode, piece: Callable[[int], str]
    ) -> tuple[list[int], list[Span]]:
        """A rendered conversation whose pictures have so many soft `tokens` each → its ids, and where those are.

        `encode` is the tokenizer's own, marks included; `piece` an id's text.
        """
        names = [piece(i) for i in (self.begin, self.image, self.end)]
        known = [encode(name) for name in names] == [[self.begin], [self.image], [self.end]]
        if known and names[1] == self.placeholder:
            pieces = self._pattern.split(text)
            frames = [names[0] + names[1] * count + names[2] for count in tokens]
            ids = encode("".join(a + b for a, b in zip(pieces, [*frames, ""], strict=True)))
        else:
            ids = self._around(text, tokens, encode)
        return ids, self._spans(ids, tokens)

    def _around(self, text: str, tokens: Sequence[int], encode: Encode) -> list[int]:
        """For a tokenizer that has no such tokens."""
        first, *others = self._pattern.split(text)
        ids, newline = encode(first), encode("\n")
        for count, piece in zip(tokens, others, strict=True):
            ids += [self.begin, *[self.image] * count, self.end]
            ids += control.behind(piece, encode, newline) if piece else []
        return ids

    def _spans(self, ids: list[int], tokens: Sequence[int]) -> list[Span]:
        """Errors: TokenizerError where the image tokens are not those of the pictures."""
        spans: list[Span] = []
        at = 0
        for count in tokens:
            at = ids.index(self.image, at) if self.image in ids[at:] else len(ids)
            spans.append((at, at + count))
            at += count
        inside = [ids[start - 1 : stop + 1] for start, stop in spans]
        right = [[self.begin, *[self.image] * count, self.end] for count in tokens]
        if inside != right or ids.count(self.image) != sum(tokens):
            raise TokenizerError("the tokenizer does not keep the tokens of pictures apart from the text around them.")
        return spans

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"(?<!{control.START}){re.escape(self.placeholder)}")
