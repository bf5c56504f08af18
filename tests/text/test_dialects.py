"""Tokenizer folders in the dialects that people publish: the same ids, specials and templates as AutoTokenizer's."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_demo
from mlx_diffgemma.errors import TokenizerError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.text.dialects import read_beside
from mlx_diffgemma.text.tokenizer import Growing, Tokenizer
from mlx_diffgemma.text.vocabularies import SentencePieceVocabulary

MARKERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "\n\n"]
CONFIG: dict[str, Any] = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
CONFIG |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BPE of byte fallback, as Gemma's: merges learned from the tests' own source."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*MARKERS, *bytes_], show_progress=False)
    fast.train_from_iterator(Path(__file__).read_text("utf-8").splitlines(keepends=True) * 2, trainer)
    values = json.loads(fast.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in MARKERS]
    for token in values["added_tokens"]:
        token["special"] = token["content"] != "\n\n"
    fast = Tokenizer.from_str(json.dumps(values))
    fast.add_tokens([AddedToken("<|plain|>", normalized=False)])
    folder = tmp_path_factory.mktemp("base")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "diffusion_gemma"}')
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


Change = Callable[[Path], None]


def in_config(**values: Any) -> Change:
    return lambda folder: _edit(folder / "tokenizer_config.json", lambda old: old.update(values))


def without(*names: str) -> Change:
    return lambda folder: _edit(folder / "tokenizer_config.json", lambda old: [old.pop(name) for name in names])


def in_file(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda folder: _edit(folder / "tokenizer.json", change)


def also(**files: Any) -> Change:
    return lambda folder: [(folder / f"{name}.json").write_text(json.dumps(v)) for name, v in files.items()] and None


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def _numbered(folder: Path) -> None:
    """The older form: every added token in tokenizer_config.json, one of them with another flag."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    decoder["7"]["special"] = False
    _edit(folder / "tokenizer_config.json", lambda old: old.update(added_tokens_decoder=decoder))


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
OBJECT = {"__type": "AddedToken", "content": "<|new|>", "lstrip": True, "normalized": False, "rstrip": False}
OBJECT |= {"single_word": False, "special": True}
GENERIC = in_config(tokenizer_class="PreTrainedTokenizerFast")
DIALECTS: dict[str, list[Change]] = {
    "as released": [],
    "no class named": [without("tokenizer_class")],
    "no tokenizer_config": [lambda folder: (folder / "tokenizer_config.json").unlink()],
    "GemmaTokenizerFast": [in_config(tokenizer_class="GemmaTokenizerFast")],
    "TokenizersBackend": [in_config(tokenizer_class="TokenizersBackend")],
    "PreTrainedTokenizerFast": [GENERIC],
    "truncation left on": [in_file(lambda v: v.update(truncation=TRUNCATION))],
    "padding left on": [in_file(lambda v: v.update(padding={**PADDING, "pad_token": "<pad>"}))],
    "both, generic": [
        GENERIC,
        in_file(lambda v: v.update(truncation=TRUNCATION, padding={**PADDING, "pad_token": "<pad>"})),
    ],
    "extra specials, a list": [in_config(extra_special_tokens=["<|turn>", "<|new|>"])],
    "extra specials, a list, generic": [GENERIC, in_config(extra_special_tokens=["<|turn>", "<|new|>", "q"])],
    "extra specials, a dict": [in_config(extra_special_tokens={"image_token": "<|image|>", "eot_token": "<turn|>"})],
    "additional_special_tokens": [in_config(additional_special_tokens=["<|new|>", "<|newer|>"])],
    "model_specific_special_tokens": [
        in_config(model_specific_special_tokens={"sot_token": "<|turn>", "x_token": "<|x|>"})
    ],
    "a key of its own": [in_config(think_token="<|think|>")],
    "token objects": [in_config(bos_token={**OBJECT, "content": "<bos>"}, extra_special_tokens=[OBJECT])],
    "numbered tokens": [_numbered],
    "numbered tokens, generic": [_numbered, GENERIC],
    "special_tokens_map": [
        also(
            special_tokens_map={
                "bos_token": "<bos>",
                "sep_token": {
                    "content": "<|sep|>",
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                },
            }
        )
    ],
    "added_tokens.json": [also(added_tokens={"<|late|>": 701, "<|turn>": 5})],
    "names that the file lacks": [in_config(cls_token="<cls>", sep_token="<sep>")],
    "a special that is a word": [in_config(extra_special_tokens=["the"])],
    "split_special_tokens": [in_config(split_special_tokens=True)],
    "flags changed in the file": [in_file(lambda v: [t.update(special=False) for t in v["added_tokens"][5:7]])],
    "a normalized added token": [in_file(lambda v: v["added_tokens"][-1].update(normalized=True))],
    "another normalizer": [in_file(lambda v: v.update(normalizer={"type": "Lowercase"}))],
    "another normalizer, generic": [GENERIC, in_file(lambda v: v.update(normalizer={"type": "Lowercase"}))],
    "a prefix space": [
        GENERIC,
        in_file(
            lambda v: v.update(
                pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
            )
        ),
    ],
    "no unk fusing": [in_file(lambda v: v["model"].update(fuse_unk=False, byte_fallback=False))],
    "no unk fusing, generic": [GENERIC, in_file(lambda v: v["model"].update(fuse_unk=False, byte_fallback=False))],
    "merges as text": [in_file(lambda v: v["model"].update(merges=[" ".join(pair) for pair in v["model"]["merges"]]))],
    "a post-processor": [
        in_file(
            lambda v: v.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
                }
            )
        )
    ],
}


def texts(count: int = 240) -> list[str]:
    """Words, markers, blanks and foreign scripts, put together at random."""
    rng = random.Random(3)
    words = MARKERS + "abc xyz The the def (x): return \\ é ü ß 東京 🙂 👩‍👩‍👧 ﷽ <|new|> <|plain|> <0x41> ▁ q".split()
    words += ["\n", "\t", "\u200b", "\u2028"]
    words += [
        "<|new|>",
        " <|new|> ",
        "<|x|>",
        "<|image|>",
        "<|sep|>",
        "<|late|>",
        "<cls>",
        "<|think|>",
        "  ",
        "\n\n",
        "e\u0301",
        "A B",
    ]
    return ["", " ", "\n"] + [
        "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(1, 14))) for _ in range(count)
    ]


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_ids_as_transformers(base: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    for change in DIALECTS[name]:
        change(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in texts():
        right = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == right, text
        assert ours.decode(right) == theirs.decode(right, skip_special_tokens=True), text
        assert ours.decode(right, skip_special=False) == theirs.decode(right), text
    right = ours.encode("".join(texts()))[:1500]
    growing = Growing(ours.decode)
    for end in range(1, len(right), 7):
        whole = ours.decode(right[:end])
        assert whole.endswith("\ufffd") or growing.text(0, right[:end]) == whole, end
    assert all(theirs.decode([i], skip_special_tokens=True) == "" != theirs.decode([i]) for i in ours.special_ids)
    assert ours.vocab_size == len(theirs)
    assert ours.beside.texts == theirs.special_tokens_map


def test_the_built_in_models_two_files_give_the_same_ids() -> None:
    beside = read_beside(BUILT_IN)
    fast, pieces = Tokenizer.load(BUILT_IN), SentencePieceVocabulary(BUILT_IN / "tokenizer.model", beside.special)
    rng = random.Random(0)
    parts = [
        *train_demo.pieces(),
        *train_demo.SPECIAL.values(),
        "\n",
        "  ",
        "é",
        "東",
        "🙂",
        "<0x41>",
        "<unused300>",
        "\x00",
    ]
    examples = [*train_demo.structured(3, 200), *train_demo.sudoku(3, 20)]
    said = [text for example in examples for text in (example.prompt, example.answer)]
    said += ["".join(rng.choice(parts) for _ in range(rng.randint(1, 30))) for _ in range(3000)]
    for text in said:
        ids = fast.encode(text)
        assert ids == pieces.encode(text), text
        plain = [i for i in ids if i not in fast.special_ids]
        assert not plain or fast.decode(plain) == pieces.decode(plain), text


REFUSED: dict[str, tuple[Change, str]] = {
    "another class": (
        in_config(tokenizer_class="LlamaTokenizer"),
        "tokenizer_class is 'LlamaTokenizer', expected Gemma",
    ),
    "a class that is a number": (in_config(tokenizer_class=3), "tokenizer_class is 3, expected text"),
    "a token that is a number": (in_config(bos_token=2), "bos_token is 2, expected text"),
    "a token object without text": (in_config(bos_token={"lstrip": True}), "bos_token.content is null, expected text"),
    "an unknown flag": (in_config(bos_token={"content": "a", "left": True}), "bos_token.left"),
    "numbered by words": (in_config(added_tokens_decoder={"x": {"content": "a"}}), "the key 'x', expected an id"),
    "extra specials a text": (in_config(extra_special_tokens="<x>"), "extra_special_tokens is '<x>', expected a list"),
    "templates without names": (in_config(chat_template=[{"template": "x"}]), "chat_template[0].name is null"),
    "a template that is a number": (in_config(chat_template=5), "chat_template is 5, expected text or a list"),
    "not JSON": (lambda f: (f / "tokenizer_config.json").write_text("{") and None, "tokenizer_config.json is not JSON"),
    "a list": (lambda f: (f / "tokenizer_config.json").write_text("[]") and None, "expected an object"),
    "NaN": (lambda f: (f / "tokenizer_config.json").write_text('{"a": NaN}') and None, "a is nan, expected"),
    "a map of numbers": (also(special_tokens_map={"bos_token": 3}), "special_tokens_map.json: bos_token is 3"),
    "added tokens without ids": (also(added_tokens={"a": "b"}), "added_tokens.json: a is 'b', expected an integer"),
    "unigram for Gemma's class": (
        in_file(lambda v: v.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]})),
        "has a Unigram model; GemmaTokenizer",
    ),
    "no vocabulary": (in_file(lambda v: v.update(model={})), "the tokenizer cannot be read"),
    "cut": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:900]) and None,
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    change, words = REFUSED[name]
    change(folder)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("declared", [None, ["<|plain|>"], []])
def test_control_tokens_made_plain_as_transformers_does(base: Path, tmp_path: Path, declared: list[str] | None) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    if declared is not None:
        in_config(chat_control_tokens=declared)(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<bos>", "") + "<|plain|>{{ tools }}")
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    changed = 0
    for text in texts(80):
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        tools = [{"type": "function", "function": {"name": text}}]
        right = theirs.apply_chat_template(messages, tools=tools, sanitize_control_tokens=True, return_dict=False)
        assert ours.apply_chat_template(messages, tools=tools, sanitize_control_tokens=True) == right, text
        changed += right != ours.apply_chat_template(messages, tools=tools)
    assert changed > 40
