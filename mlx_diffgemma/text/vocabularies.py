"""Text ↔ ids by two libraries: `tokenizers` for tokenizer.json; `sentencepiece` where only tokenizer.model is there."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import TokenizerError
from .spelling import is_unused, plain, spelled

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast


class Vocabulary(Protocol):
    """What the two libraries have in common here."""

    special_ids: frozenset[int]  # left out of an answer's text

    def encode(self, text: str) -> list[int]: ...
    def encode_plainly(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def id_of(self, token: str) -> int | None: ...
    def size(self) -> int: ...
    def added(self) -> list[tuple[str, bool]]: ...
    def token_bytes(self) -> list[bytes | None]: ...


class FastVocabulary:
    """tokenizer.json through `tokenizers`."""

    def __init__(self, fast: "Fast"):
        self._fast = fast
        self._added = dict(sorted(fast.get_added_tokens_decoder().items()))
        # Asked, not read from the flags: one that was special once stays so, whatever is said later.
        self.special_ids = frozenset(i for i in self._added if fast.decode([i]) != fast.decode([i], False))

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_plainly(self, text: str) -> list[int]:
        """Without added tokens: the pipeline behind them."""
        fast = self._fast
        text = text if fast.normalizer is None else fast.normalizer.normalize_str(text)
        parts = [text] if fast.pre_tokenizer is None else [p for p, _ in fast.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts for token in fast.model.tokenize(part)]

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def size(self) -> int:
        return self._fast.get_vocab_size()

    def added(self) -> list[tuple[str, bool]]:
        return [(token.content, i in self.special_ids) for i, token in self._added.items()]

    def token_bytes(self) -> list[bytes | None]:
        pieces: dict[int, str] = {i: piece for piece, i in self._fast.get_vocab().items()}
        decoder = self._fast.decoder
        written = None if decoder is None else json.loads(decoder.__getstate__())  # pyright: ignore
        return spelled([pieces.get(i) for i in range(max(pieces) + 1)], written)


class SentencePieceVocabulary:
    """tokenizer.model through `sentencepiece`; template markers must be user-defined symbols there."""

    def __init__(self, path: Path, special: Sequence[str]):
        from sentencepiece import SentencePieceProcessor

        self._pieces = pieces = SentencePieceProcessor(model_file=str(path))
        names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
        self._ids = {name: i for i, name in enumerate(names)}
        # Control symbols are not recognised inside text, and others only if they are cheap: all are split off by hand.
        control = {name for i, name in enumerate(names) if pieces.is_control(i) or pieces.is_unknown(i)}
        control |= {name for name in special if name in self._ids}
        longest = sorted(control, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")
        self.special_ids = frozenset(self._ids[name] for name in control)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._control.split(text)):
            ids += [self._ids[part]] if number % 2 else self._pieces.encode(part)
        return ids

    def encode_plainly(self, text: str) -> list[int]:
        raise TokenizerError("control tokens can be made plain with a tokenizer.json only; this model has none.")

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def size(self) -> int:
        return len(self._ids)

    def added(self) -> list[tuple[str, bool]]:
        return []

    def token_bytes(self) -> list[bytes | None]:
        return [self._bytes_of(i, self._pieces.id_to_piece(i)) for i in range(self._pieces.get_piece_size())]

    def _bytes_of(self, i: int, piece: str) -> bytes | None:
        if self._pieces.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        silent = self._pieces.is_control(i) or self._pieces.is_unknown(i) or self._pieces.is_unused(i)
        return None if silent or is_unused(piece) else plain(piece)
