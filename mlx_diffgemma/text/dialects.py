"""tokenizer.json as transformers reads it, together with the files that lie beside it.

AutoTokenizer does not take the file as it is. Truncation and padding that a training script left there are off.
GemmaTokenizer, which a folder that names no class gets too, keeps vocabulary and merges and replaces the rest. Tokens
named in tokenizer_config.json, special_tokens_map.json and added_tokens.json are added when the file lacks them. And
templates may lie in three places.
Source: transformers 5.23, TokenizersBackend, GemmaTokenizer, PreTrainedTokenizerBase._from_pretrained.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import visible
from ..errors import TokenizerError
from ..readers import decoded, read_bytes, read_json
from ..values import Field, Table, anything, either, flag, integer, many, mapping, nearest, optional, text

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

FILE = "tokenizer.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GEMMA = {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")}  # what its class assumes
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")  # classes that take the file as it is

_TOKEN = Table(
    Field("content", text(empty=False)),
    *(Field(name, flag, None) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")),
    Field("__type", anything, None),
)
_NAME = either(text(empty=False), _TOKEN.kind)
CONFIG = Table(
    Field("tokenizer_class", optional(text()), None),
    Field("split_special_tokens", flag, False),
    Field("added_tokens_decoder", mapping(_TOKEN.kind), None),
    Field("extra_special_tokens", either(many(_NAME), mapping(_NAME)), ()),
    Field("additional_special_tokens", many(_NAME), ()),
    Field("model_specific_special_tokens", mapping(_NAME), {}),
    Field("chat_control_tokens", many(text()), None),
    Field("chat_template", either(text(), many(Table(Field("name", text()), Field("template", text())).kind)), None),
    *(Field(name, _NAME, None) for name in NAMED),
    open=True,
)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What the files beside the vocabulary say."""

    generic: bool  # tokenizer.json counts as it is
    split_special: bool
    named: dict[str, Any]  # bos_token, …: as they were given
    extra: tuple[Any, ...]  # other special tokens
    numbered: dict[int, Any] | None  # tokenizer_config's added tokens, which then stand for tokenizer.json's
    legacy: dict[int, Any]  # added_tokens.json's
    control: tuple[str, ...] | None  # what chat_control_tokens names
    templates: dict[str, tuple[str, str]]  # name → source, and where it stands

    @property
    def texts(self) -> dict[str, str]:
        """The named tokens' texts: the variables of templates."""
        return {name: _text(token) for name, token in self.named.items()}

    @property
    def special(self) -> list[str]:
        """The texts of all special tokens named here."""
        return [*self.texts.values(), *map(_text, self.extra)]


def read_beside(folder: Path) -> Beside:
    """Read all of them. Errors: TokenizerError with file and key."""
    file = folder / "tokenizer_config.json"
    config = _object(file)
    values = CONFIG.read(config, str(file), fault=TokenizerError)
    generic = _is_generic(values["tokenizer_class"], str(file))
    given = {name: values[name] for name in NAMED if values[name] is not None}
    own = {k: v for k, v in config.items() if k.endswith("_token") and k not in NAMED and isinstance(v, str)}
    extra = values["extra_special_tokens"] or values["additional_special_tokens"]
    listed: list[Any] = []
    if isinstance(extra, dict):
        own |= extra
    else:
        listed += extra
    own |= values["model_specific_special_tokens"]
    legacy: dict[int, Any] = {}
    if values["added_tokens_decoder"] is None:
        for name, token in _object(folder / "special_tokens_map.json").items():
            _legacy_name(name, token, given, own, listed, folder / "special_tokens_map.json")
        legacy = _legacy_tokens(folder / "added_tokens.json", [*given.values(), *listed])
    return Beside(
        generic=generic,
        split_special=values["split_special_tokens"],
        named=({} if generic else GEMMA) | given | own,
        extra=tuple(listed),
        numbered=_numbered(values["added_tokens_decoder"], str(file)),
        legacy=legacy,
        control=values["chat_control_tokens"],
        templates=_templates(folder, values["chat_template"], str(file)),
    )


def _object(file: Path) -> dict[str, Any]:
    return read_json(file, fault=TokenizerError) if file.is_file() else {}


def _is_generic(name: str | None, where: str) -> bool:
    """Whether the class takes the file as it is. transformers has others, which build yet another tokenizer."""
    plain = (name or "GemmaTokenizer").removesuffix("Fast")
    if plain != "GemmaTokenizer" and plain not in AS_IT_IS:
        raise TokenizerError(
            f"{where}: tokenizer_class is {name!r}, expected GemmaTokenizer or PreTrainedTokenizerFast."
            f"{nearest(plain, ('GemmaTokenizer', 'PreTrainedTokenizerFast'))}\n"
            "PreTrainedTokenizerFast takes tokenizer.json as it is."
        )
    return plain in AS_IT_IS


def _legacy_name(
    name: str, token: Any, given: dict[str, Any], own: dict[str, Any], listed: list[Any], file: Path
) -> None:
    """One entry of special_tokens_map.json, over those of tokenizer_config.json."""
    if name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(token, dict):
            own |= mapping(_NAME).read(token, str(file), name, fault=TokenizerError)
        else:
            found = many(_NAME).read(token, str(file), name, fault=TokenizerError)
            listed += [t for t in found if t not in listed]
    elif token is not None:
        token = _NAME.read(token, str(file), name, fault=TokenizerError)
        (given if name in NAMED else own)[name] = token | {"special": True} if isinstance(token, dict) else token


def _legacy_tokens(file: Path, special: Iterable[Any]) -> dict[int, Any]:
    """added_tokens.json: text → id; special are those that another file calls so."""
    found = mapping(integer(least=0)).read(_object(file), str(file), fault=TokenizerError)
    names = set(map(_text, special))
    return {i: {"content": t, "special": t in names, "normalized": t not in names} for t, i in found.items()}


def _numbered(tokens: dict[str, Any] | None, where: str) -> dict[int, Any] | None:
    if tokens is None:
        return None
    if bad := [key for key in tokens if not key.isdecimal()]:
        raise TokenizerError(f"{where}: added_tokens_decoder has the key {bad[0]!r}, expected an id.")
    return {int(key): token for key, token in tokens.items()}


def _templates(folder: Path, own: Any, where: str) -> dict[str, tuple[str, str]]:
    """chat_template.jinja and chat_templates/*.jinja; where there are none, what tokenizer_config.json has."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in visible(folder / "chat_templates", "*.jinja")}
    found = {name: (_source(file), str(file)) for name, file in files.items() if file.is_file()}
    if found or own is None:
        return found
    if isinstance(own, str):
        return {"default": (own, f"chat_template of {where}")}
    return {entry["name"]: (entry["template"], f"chat_template {entry['name']!r} of {where}") for entry in own}


def _source(file: Path) -> str:
    return decoded(read_bytes(file, fault=TokenizerError), str(file), fault=TokenizerError)


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


# ----------------------------------------------------------------------------------------------------- tokenizer.json


def read_fast(folder: Path, beside: Beside) -> "Tokenizer":
    """tokenizer.json with what lies beside it. Errors: TokenizerError."""
    from tokenizers import Tokenizer

    file = folder / FILE
    try:
        fast = Tokenizer.from_file(str(file))
        before = dict(sorted(fast.get_added_tokens_decoder().items()))
        if not beside.generic:
            fast = _as_gemma(fast, file, beside, before)
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = beside.split_special
        fast.add_tokens(list(_missing(beside, before if beside.generic else {}, before)))
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exceptions for damaged files
        raise TokenizerError(f"{file}: the tokenizer cannot be read: {str(error)[:160]}.") from error
    return fast


def _missing(beside: Beside, present: dict[int, "AddedToken"], own: dict[int, "AddedToken"]) -> "Iterator[AddedToken]":
    """What transformers adds, in its order: numbered tokens, named ones, others. Ids follow from the order."""
    numbered = {i: _token(t) for i, t in beside.legacy.items()} | own
    if beside.numbered is not None:
        numbered = {i: _token(t) for i, t in beside.numbered.items()}
    yield from (token for _, token in sorted(numbered.items()))
    known = {token.content for token in (*present.values(), *numbered.values())}
    for name, token in (*beside.named.items(), *(("", token) for token in beside.extra)):
        if _text(token) not in known:
            known.add(_text(token))
            yield _token(token, special=bool(name) or isinstance(token, str))


def _token(token: Any, *, special: bool = False) -> "AddedToken":
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {key: value for key, value in token.items() if key not in ("content", "__type") and value is not None}
    return AddedToken(token["content"], **flags | ({"special": True} if special else {}))


def _as_gemma(fast: "Tokenizer", file: Path, beside: Beside, added: dict[int, "AddedToken"]) -> "Tokenizer":
    """The same vocabulary and merges in GemmaTokenizer's pipeline."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not isinstance(fast.model, models.BPE):
        raise TokenizerError(
            f"{file} has a {type(fast.model).__name__} model; GemmaTokenizer, which tokenizer_config.json asks for,"
            ' needs BPE.\nTo take the file as it is, write "tokenizer_class": "PreTrainedTokenizerFast" there.'
        )
    unknown = _text(beside.named["unk_token"])
    affixed = fast.model.continuing_subword_prefix or fast.model.end_of_word_suffix
    if affixed or beside.numbered is not None or any(token.normalized for token in added.values()):
        model = json.loads(file.read_bytes())["model"]
        merges: Any = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        options: dict[str, Any] = {"fuse_unk": True, "unk_token": unknown, "byte_fallback": True, "dropout": None}
        fast = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, **options))
    else:  # the same without building it anew, which takes a second for the released one
        fast.model.fuse_unk, fast.model.unk_token, fast.model.byte_fallback = True, unknown, True
        fast.model.dropout, fast.model.ignore_merges = None, False
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast
