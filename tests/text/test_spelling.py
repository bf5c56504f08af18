"""The bytes of ids: what ids spell together is what decoding them says, in both libraries."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from mlx_diffgemma.errors import TokenizerError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.text.spelling import spelled
from mlx_diffgemma.text.tokenizer import Tokenizer
from tests import small

TEXTS = [
    "plain words",
    " a blank in front",
    "two  blanks\n\n\tand a tab",
    "Grüße, 東京 🙂",
    '{"name": "Ada"}\n',
    "é" * 9,
    "",
]


@pytest.fixture(params=["sentencepiece", "tokenizers"])
def tokenizer(request: Any, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return Tokenizer.load(BUILT_IN)
    small.write_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path)


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes[i] or b"(none)" for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_of_a_text_spell_it(tokenizer: Tokenizer, text: str) -> None:
    assert joined(tokenizer, tokenizer.encode(text)) == text.encode()


def test_any_ids_spell_what_they_decode_to(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    usable = [i for i, spelling in enumerate(tokenizer.token_bytes) if spelling]
    checked = 0
    for _ in range(600):
        spelling = joined(tokenizer, ids := rng.choices(usable, k=4))
        if spelling.decode(errors="replace").encode() == spelling:  # the libraries spoil more than the broken character
            assert spelling.decode() == tokenizer.decode(ids)
            checked += 1
    assert checked > 20


def test_special_tokens_and_kept_places_are_no_text(tokenizer: Tokenizer) -> None:
    for name in ("<pad>", "<eos>", "<|turn>", "<turn|>", "<|channel>", '<|"|>', "<unused378>"):
        if (token := tokenizer.id_of(name)) is not None:
            assert tokenizer.token_bytes[token] is None, name
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_every_byte_is_spelled_by_an_id(tokenizer: Tokenizer) -> None:
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.token_bytes)


def test_byte_level_pieces_are_bytes() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast = Fast(models.BPE(vocab={piece: i for i, piece in enumerate(sorted(alphabet))}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    found = spelled(sorted(alphabet), {"type": "ByteLevel"})
    assert sorted(found) == [bytes([b]) for b in range(256)]
    for text in TEXTS:
        assert b"".join(found[i] or b"" for i in fast.encode(text).ids) == text.encode()


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece"}, {"type": "Strip", "content": " "}])
def test_other_decoders_are_refused_by_name(decoder: Any) -> None:
    name = "missing" if decoder is None else decoder["type"]
    with pytest.raises(TokenizerError, match=f"its decoder is {name}"):
        spelled(["a"], decoder)
