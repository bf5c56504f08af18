"""Text ↔ ids, the chat template, and the channels inside an answer: thinking, tool calls, text.

`tokenizer.json` is read by `tokenizers`, `tokenizer.model` by `sentencepiece`; templates are rendered by
transformers' own function, so they come out as everywhere else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import TokenizerError

Message = dict[str, Any]


class Vocabulary(Protocol):
    """What the two libraries have in common here."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def id_of(self, token: str) -> int | None: ...
    def size(self) -> int: ...


class _FastVocabulary:
    """tokenizer.json through `tokenizers`."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        self._fast = Fast.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def size(self) -> int:
        return self._fast.get_vocab_size()


class _SentencePieceVocabulary:
    """tokenizer.model through `sentencepiece`; template markers must be user-defined symbols there."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor(model_file=str(path))
        self._ids = {self._pieces.id_to_piece(i): i for i in range(self._pieces.get_piece_size())}

    def encode(self, text: str) -> list[int]:
        # Control symbols are not recognised inside text, so the template's <bos> is split off by hand.
        ids: list[int] = []
        bos = self._pieces.id_to_piece(self._pieces.bos_id())
        for number, part in enumerate(text.split(bos)):
            ids += [self._pieces.bos_id()] * (number > 0) + self._pieces.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def size(self) -> int:
        return len(self._ids)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An answer taken apart."""

    text: str
    thinking: str | None
    tool_calls: list[dict[str, Any]]


# The markers of the Gemma 4 family; a vocabulary without them has no channels and no tools.
CHANNEL, END_CHANNEL = "<|channel>", "<channel|>"
TOOL_CALL, END_TOOL_CALL = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
_TEMPLATE_OWN = {"messages", "add_generation_prompt"}  # what `render` itself says, besides tools and tokens
_TEMPLATE_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict", "cycler", "joiner"}
OPEN = "open"  # a channel that the prompt opened


class Tokenizer:
    """A checkpoint's tokenizer: `encode` and `decode`, the chat template, `stop_ids`."""

    def __init__(self, vocabulary: Vocabulary, *, config: dict[str, Any], chat_template: str | None):
        self.vocabulary, self.config, self.chat_template = vocabulary, config, chat_template
        names = {value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
        names |= {v for v in (config.get("model_specific_special_tokens") or {}).values() if isinstance(v, str)}
        names |= {v for v in config.get("extra_special_tokens") or [] if isinstance(v, str)}
        self.special_ids = frozenset(i for i in map(vocabulary.id_of, names) if i is not None)
        eos = vocabulary.id_of(config.get("eos_token") or "<eos>")
        self.stop_ids: tuple[int, ...] = () if eos is None else (eos,)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a checkpoint folder's tokenizer. Errors: TokenizerError when it has none, or a broken one."""
        folder = Path(folder)
        path = next((p for p in (folder / "tokenizer.json", folder / "tokenizer.model") if p.is_file()), None)
        if path is None:
            raise TokenizerError(
                f"{folder}: no tokenizer.json and no tokenizer.model, so text cannot be turned into ids.\n"
                "Copy them from the checkpoint this one was made of; prompts of ids work without."
            )
        try:
            config_path = folder / "tokenizer_config.json"
            config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
            vocabulary = _FastVocabulary(path) if path.suffix == ".json" else _SentencePieceVocabulary(path)
        except Exception as error:  # both libraries raise bare Exceptions for damaged files
            raise TokenizerError(f"{path}: the tokenizer cannot be read: {error}.") from error
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text("utf-8") if template_path.is_file() else config.get("chat_template")
        return cls(vocabulary, config=config, chat_template=template)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact name, or None."""
        return self.vocabulary.id_of(token)

    @property
    def bos_id(self) -> int | None:
        """The id that texts begin with."""
        return self.id_of(self.config.get("bos_token") or "<bos>")

    def encode(self, text: str) -> list[int]:
        """Text → ids, nothing added."""
        return self.vocabulary.encode(text)

    def decode(self, ids: list[int] | tuple[int, ...], *, skip_special: bool = True) -> str:
        """Ids → text. Bytes that are no UTF-8 become U+FFFD; special tokens are left out unless asked for."""
        kept = [i for i in ids if i not in self.special_ids] if skip_special else list(ids)
        return self.vocabulary.decode(kept)

    def piece(self, token: int) -> str:
        """One token as it looks inside text, special ones by name: for showing a canvas."""
        return self.vocabulary.decode([token])

    def render(
        self,
        messages: list[Message],
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as the model reads it, with the model's turn opened.

        Errors: TokenizerError when there is no template, it refuses the messages, or it does not know an option.
        """
        if self.chat_template is None:
            raise TokenizerError("this checkpoint has no chat template: give the prompt as ids, or add one.")
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {k: v for k, v in self.config.items() if k.endswith("_token") and isinstance(v, str)}
        options["tools"] = tools
        options.setdefault("bos_token", "<bos>")
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        if template_options:
            self._check_options(template_options, options.keys() | _TEMPLATE_OWN)
            options |= template_options
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=self.chat_template, add_generation_prompt=True, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(f"the chat template does not accept these messages: {error}") from error
        return rendered[0]

    def apply_chat_template(
        self,
        messages: list[Message],
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> list[int]:
        """`render`, then `encode`."""
        text = self.render(messages, enable_thinking=enable_thinking, tools=tools, template_options=template_options)
        return self.encode(text)

    def _check_options(self, given: dict[str, Any], taken: set[str]) -> None:
        """Errors: TokenizerError for an option that has a place of its own, or that the template never reads."""
        from jinja2 import Environment, TemplateError, meta

        if both := sorted(given.keys() & taken):
            raise TokenizerError(f"template option {both[0]!r} is given elsewhere already: leave it out here.")
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(self.chat_template or "")
        except TemplateError:
            return  # rendering says what is wrong with it
        read = meta.find_undeclared_variables(parsed)
        if unread := sorted(given.keys() - read):
            raise TokenizerError(
                f"the chat template does not read the option {unread[0]!r}: it would do nothing.\n"
                f"It reads {', '.join(sorted(read - taken - _TEMPLATE_FUNCTIONS)) or 'no options'}."
            )

    def split(self, ids: list[int] | tuple[int, ...], *, open_channel: bool = False) -> Parts:
        """Take an answer apart: `<|channel>thought … <channel|>` is thinking, `<|tool_call>…` a tool call, the
        rest text. `open_channel`: the prompt ended inside a thought, whose header it has written already."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for kind, part in self._spans(list(ids), open_channel):
            if kind == OPEN:
                thoughts.append(self.decode(part))
            elif kind == CHANNEL:
                header, newline, body = self.decode(part).partition("\n")
                is_thought = header.strip() in ("thought", "") or not newline
                (thoughts if is_thought else texts).append(body)
            elif kind == TOOL_CALL:
                calls += _tool_calls(self.decode_with_quotes(part))
            else:
                texts.append(self.decode(part))
        thinking = "".join(thoughts).strip()
        return Parts(text="".join(texts), thinking=thinking or None, tool_calls=calls)

    def opens_channel(self, prompt: list[int]) -> bool:
        """Whether a prompt ends inside a channel: its last channel marker is an opening one."""
        markers = (self.id_of(CHANNEL), self.id_of(END_CHANNEL))
        last = next((i for i in reversed(prompt) if i in markers and i is not None), None)
        return last is not None and last == markers[0]

    def decode_with_quotes(self, ids: list[int]) -> str:
        """Decode a tool call: its string delimiters are special tokens, and needed."""
        keep = self.id_of(QUOTE)
        return self.vocabulary.decode([i for i in ids if i == keep or i not in self.special_ids])

    def _spans(self, ids: list[int], open_channel: bool) -> list[tuple[str, list[int]]]:
        """Cut ids at the markers: (OPEN, CHANNEL, TOOL_CALL or "", ids between)."""
        opening = {self.id_of(CHANNEL): CHANNEL, self.id_of(TOOL_CALL): TOOL_CALL}
        closing = {self.id_of(END_CHANNEL), self.id_of(END_TOOL_CALL)}
        spans: list[tuple[str, list[int]]] = [(OPEN if open_channel else "", [])]
        for i in ids:
            if i is not None and i in opening:
                spans.append((opening[i], []))
            elif i in closing:
                spans.append(("", []))
            else:
                spans[-1][1].append(i)
        return [span for span in spans if span[1]]


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """A tool call's inside, parsed by mlx-lm; one that does not parse is given as it is."""
    from mlx_lm.tool_parsers import gemma4

    try:
        calls = gemma4.parse_tool_call(text)
    except ValueError:
        return [{"name": None, "arguments": None, "text": text}]
    return calls if isinstance(calls, list) else [calls]
