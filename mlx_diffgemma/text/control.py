"""Control tokens in a user's text, made plain: `<turn|>` in a document is then seven characters, not the end of a turn.

The user's strings are marked before the template is applied, and what is marked is encoded without added tokens.
Source: transformers 5.23, apply_chat_template(sanitize_control_tokens=True).
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import TokenizerError

START, END = "\U000f0000", "\U000f0001"  # private characters; a user's own are dropped
Encode = Callable[[str], list[int]]


def control_tokens(added: Iterable[tuple[str, bool]], declared: Iterable[str] | None, literals: str) -> tuple[str, ...]:
    """Which added tokens (text, special or not) steer a conversation: the special ones, and those that the tokenizer
    declares, or else those that the template writes, blanks aside."""
    if declared is not None:
        names = set(declared)
        return tuple(token for token, special in added if special or token in names)
    return tuple(token for token, special in added if special or (token in literals and not token.isspace()))


@functools.lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def mark(value: Any, tokens: tuple[str, ...]) -> Any:
    """A tree of a user's values with the control tokens in its strings between marks; keys stay."""
    if isinstance(value, str):
        return _any_of(tokens).sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
    if isinstance(value, dict):
        return {key: mark(entry, tokens) for key, entry in value.items()}
    return [mark(entry, tokens) for entry in value] if isinstance(value, list | tuple) else value


def encode(
    text: str, added: Iterable[str], encode: Encode, plainly: Encode, id_of: Callable[[str], int | None]
) -> list[int]:
    """Ids of a conversation whose control tokens are marked: those `plainly`, the rest as always.

    A template may part a token from its marks; a mark alone is dropped, and still keeps its neighbours from becoming a
    token. Errors: TokenizerError for a token that plain text spells, too.
    """
    pieces = re.split(f"{START}({_any_of(tuple(added)).pattern}){END}|[{START}{END}]", text)
    newline = encode("\n")
    ids = encode(pieces[0])
    for number, piece in enumerate(pieces[1:], 1):
        if piece:
            spelt = behind(piece, plainly if number % 2 else encode, newline)
            if number % 2 and id_of(piece) in spelt:
                raise TokenizerError(f"the control token {piece!r} cannot be made plain: ordinary text spells it, too.")
            ids += spelt
    return ids


def behind(piece: str, encode: Encode, newline: list[int]) -> list[int]:
    """As inside a text: some tokenizers put a blank in front of a first word."""
    ids = encode("\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)
