"""What every id spells, in bytes, from the vocabulary's pieces: decoding an id by itself loses blanks in front and
halves of characters."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import TokenizerError

BLANK = "▁"  # stands for a space in the pieces of sentencepiece
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_UNUSED = re.compile(r"<unused\d+>")
Step = Callable[[str], str | bytes]  # bytes are the end of it


def spelled(pieces: Sequence[str | None], decoder: Mapping[str, Any] | None) -> list[bytes | None]:
    """The bytes of every piece, as the `decoder` of a tokenizer.json joins them; None for one that is no text.

    Errors: TokenizerError for a decoder that does not join pieces one by one.
    """
    steps = _steps(decoder)
    return [None if piece is None or is_unused(piece) else _through(steps, piece) for piece in pieces]


def plain(piece: str) -> bytes:
    """The bytes of a piece of sentencepiece that is neither a byte nor a control symbol."""
    return piece.replace(BLANK, " ").encode()


def is_unused(piece: str) -> bool:
    """Whether a piece only keeps a place in the vocabulary."""
    return piece.startswith("<unused") and _UNUSED.fullmatch(piece) is not None


def _through(steps: list[Step], piece: str) -> bytes:
    value: str | bytes = piece
    for step in steps:
        value = step(value)
        if isinstance(value, bytes):
            return value
    return value.encode()


def _steps(decoder: Mapping[str, Any] | None) -> list[Step]:
    """What the decoder does to a piece, in turn. Stripping the whole text's ends is no matter of a piece."""
    steps: list[Step] = []
    fused = False
    for part in _flat(decoder):
        kind = part.get("type")
        if kind == "Replace" and "String" in part["pattern"]:
            steps.append(_replacing(part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace":
            steps.append(_replacing(part["replacement"], " "))
        elif kind == "ByteFallback":
            steps.append(_by_fallback)
        elif kind == "ByteLevel":
            steps.append(_by_level)
        elif not (kind == "Fuse" or (kind == "Strip" and fused)):
            raise TokenizerError(
                f"the bytes of this tokenizer's ids are not known: its decoder is {kind or 'missing'}.\n"
                "Constraints work with byte-fallback (Gemma's) and byte-level decoders."
            )
        fused = fused or kind == "Fuse"
    return steps


def _flat(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Sequences inside sequences as one list."""
    if decoder is not None and decoder.get("type") == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flat(inner)]
    return [decoder or {}]


def _replacing(old: str, new: str) -> Step:
    return lambda value: value.replace(old, new)


def _by_fallback(value: str) -> str | bytes:
    found = _BYTE.fullmatch(value) if len(value) == 6 else None
    return bytes([int(found[1], 16)]) if found else value


def _by_level(value: str) -> str | bytes:
    """GPT-2's alphabet, where every byte is a visible character; an added token that uses others is plain text."""
    if not all(character in _ALPHABET for character in value):
        return value
    return bytes(_ALPHABET[character] for character in value)


def _alphabet() -> dict[str, int]:
    """Bytes that are visible in Latin-1 stand for themselves, the others for the code points from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _alphabet()
