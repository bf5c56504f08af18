"""Where pictures stand in a prompt: for each of them the chat template writes one placeholder, `<|image|>`, and the ids
have a token that begins a picture, as many image tokens as it has soft tokens, and one that ends it.

Source: transformers Gemma4Processor, which puts all of these into the text before it is encoded. So it is done here
where the tokenizer knows them as tokens; where it does not, the text is encoded around them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TokenizerError
from . import control

IMAGE = "<|image|>"
VIDEO = "<|video|>"
Encode = Callable[[str], list[int]]
Span = tuple[int, int]  # first id, and the one behind the last


def labels(messages: Sequence[dict[str, Any]]) -> list[Sequence[str]]:
    """When each frame is shown, of every video in a conversation whose pictures have been taken out."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part.get("labels", ()) for part in parts if part.get("type") == "video"]


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

    def filmed(self, text: str, videos: Sequence[Sequence[str]], name: str) -> str:
        """A rendered conversation in whose words each video is its frames, by their labels: `00:00 <|image|> 00:01 …`
        (transformers Gemma4Processor.replace_video_token). Errors: TokenizerError where the template, which `name`
        calls, does not write one placeholder for each video."""
        first, *others = _behind_no_mark(VIDEO).split(text)
        if len(others) != len(videos):
            raise TokenizerError(
                f"{name} writes {len(others)} placeholders {VIDEO} for {len(videos)} videos.\nPut them into messages of"
                " the user; or take the chat template of the original checkpoint; or give the frames as pictures."
            )
        words = [" ".join(f"{label} {self.placeholder}" for label in labels) for labels in videos]
        return first + "".join(a + b for a, b in zip(words, others, strict=True))

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
        return _behind_no_mark(self.placeholder)


def _behind_no_mark(placeholder: str) -> re.Pattern[str]:
    return re.compile(f"(?<!{control.START}){re.escape(placeholder)}")
