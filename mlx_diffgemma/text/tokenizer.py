"""A checkpoint's tokenizer: text ↔ ids, conversations as the model reads them, answers taken apart."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..readers import check_tree
from ..values import anything, mapping
from . import control, template
from .channels import CHANNEL, OPEN, TOOL_CALL, Markers, Parts, parse_calls
from .dialects import FILE, Beside, read_beside, read_fast
from .gate import PICTURES, READS, Message, check_messages, check_text, check_tools
from .placing import VIDEO, Frame, Span, labels
from .vocabularies import FastVocabulary, SentencePieceVocabulary, Vocabulary


class Tokenizer:
    """A checkpoint's tokenizer: `encode` and `decode`, the chat template, `stop_ids`, the channels of an answer."""

    def __init__(self, vocabulary: Vocabulary, beside: Beside):
        self.vocabulary, self.beside = vocabulary, beside
        self.special_ids = vocabulary.special_ids
        self.markers = Markers.of(vocabulary.id_of)
        eos = vocabulary.id_of(beside.texts.get("eos_token", "<eos>"))
        self.stop_ids: tuple[int, ...] = () if eos is None else (eos,)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a checkpoint folder's tokenizer. Errors: TokenizerError when it has none, or a broken one."""
        folder = Path(folder)
        model = folder / "tokenizer.model"
        if not (folder / FILE).is_file() and not model.is_file():
            raise TokenizerError(
                f"{folder}: no tokenizer.json and no tokenizer.model, so text cannot be turned into ids.\n"
                "Copy them from the checkpoint this one was made of; prompts of ids work without."
            )
        beside = read_beside(folder)
        if (folder / FILE).is_file():
            return cls(FastVocabulary(read_fast(folder, beside)), beside)
        try:
            vocabulary = SentencePieceVocabulary(model, beside.special)
        except Exception as error:  # the library raises bare Exceptions for damaged files
            raise TokenizerError(f"{model}: the tokenizer cannot be read: {str(error)[:160]}.") from error
        return cls(vocabulary, beside)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact name, or None."""
        return self.vocabulary.id_of(token)

    @property
    def bos_id(self) -> int | None:
        """The id that texts begin with."""
        return self.id_of(self.beside.texts.get("bos_token") or "<bos>")

    def encode(self, text: str) -> list[int]:
        """Text → ids, nothing added. Errors: TokenizerError for half characters."""
        return self.vocabulary.encode(check_text(text, "the text", fault=TokenizerError))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids → text. Bytes that are no UTF-8 become U+FFFD; special tokens are left out unless asked for."""
        kept = [i for i in ids if i not in self.special_ids] if skip_special else list(ids)
        return self.vocabulary.decode(kept)

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """What every id adds to a text, in bytes; None for special tokens, which are no text. Errors: TokenizerError
        for a tokenizer that does not say."""
        return [None if i in self.special_ids else b for i, b in enumerate(self.vocabulary.token_bytes())]

    def piece(self, token: int) -> str:
        """One token as it looks inside text, special ones by name: for showing a canvas."""
        return self.vocabulary.decode([token])

    # -------------------------------------------------------------------------------------------------- conversations

    def template(self, tools: list[dict[str, Any]] | None = None) -> tuple[str, str]:
        """The chat template's source and where it stands; of several the one for tools, if there are any.

        Errors: TokenizerError when there is none.
        """
        found = self.beside.templates
        name = "tool_use" if tools is not None and "tool_use" in found else "default"
        if name not in found:
            named = f", only {', '.join(sorted(found))}; one must be called 'default'" if found else ""
            raise TokenizerError(f"this checkpoint has no chat template{named}: give the prompt as ids, or add one.")
        return found[name]

    def reads(self, variable: str) -> bool:
        """Whether the chat template reads a variable: one that it does not know would do nothing."""
        return template.mentions(*self.template(), variable)

    def render(
        self,
        messages: list[Message],
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as the model reads it, with the model's turn opened.

        Errors: TokenizerError when there is no template, the messages are of the wrong kind, or it refuses them.
        """
        return self._render(messages, enable_thinking, tools, template_options, ())

    def apply_chat_template(
        self,
        messages: list[Message],
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
    ) -> list[int]:
        """`render`, then `encode`; with `sanitize_control_tokens` the control tokens in messages and tools are text."""
        marked = self._control_tokens(tools) if sanitize_control_tokens else ()
        text = self._render(messages, enable_thinking, tools, template_options, marked)
        return self._plainly(text) if sanitize_control_tokens else self.vocabulary.encode(text)

    def place(
        self,
        messages: list[Message],
        frame: Frame,
        tokens: Sequence[int],
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
    ) -> tuple[list[int], list[Span]]:
        """`apply_chat_template` of messages with parts {"type": "image"} that stand for pictures of so many soft
        `tokens` each; and which ids those are. A part {"type": "video", "labels": …} stands for a picture with each
        label. Errors: TokenizerError, also where the template does not write one placeholder for each picture."""
        marked = (*self._control_tokens(tools), frame.placeholder, VIDEO) if sanitize_control_tokens else ()
        text = self._render(messages, enable_thinking, tools, template_options, marked, PICTURES)
        if videos := labels(messages):
            text = frame.filmed(text, videos, self.template(tools)[1])
        if (found := frame.count(text)) != len(tokens):
            raise TokenizerError(
                f"{self.template(tools)[1]} writes {found} placeholders {frame.placeholder} for {len(tokens)} pictures."
                "\nPut them into messages of the user; or take the chat template of the original checkpoint."
            )
        encode = self._plainly if sanitize_control_tokens else self.vocabulary.encode
        return frame.encoded(text, tokens, encode, lambda i: self.piece(i) if i < self.vocab_size else "")

    def _control_tokens(self, tools: list[dict[str, Any]] | None) -> tuple[str, ...]:
        literals = template.literals(*self.template(tools))
        return control.control_tokens(self.vocabulary.added(), self.beside.control, literals)

    def _plainly(self, text: str) -> list[int]:
        """Encode a conversation whose control tokens are marked."""
        words = self.vocabulary
        return control.encode(
            text, [token for token, _ in words.added()], words.encode, words.encode_plainly, words.id_of
        )

    def _render(
        self,
        messages: list[Message],
        enable_thinking: bool | None,
        tools: list[dict[str, Any]] | None,
        template_options: dict[str, Any] | None,
        marked: tuple[str, ...],
        reads: frozenset[str] = READS,
    ) -> str:
        messages = check_messages(messages, reads=reads, fault=TokenizerError)
        tools = check_tools(tools, fault=TokenizerError)
        variables: dict[str, Any] = {"bos_token": "<bos>", **self.beside.texts, "add_generation_prompt": True}
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        source, name = self.template(tools)
        variables |= {"tools": control.mark(tools, marked) if marked else tools, "documents": None}
        if template_options:
            variables |= self._options(template_options, variables.keys() | {"messages"})
        return template.render(source, name, control.mark(messages, marked) if marked else messages, **variables)

    def _options(self, given: dict[str, Any], taken: set[str]) -> dict[str, Any]:
        """Errors: TokenizerError for an option that has a place of its own, or that the template never reads."""
        mapping(anything).read(given, "template_options", fault=TokenizerError)
        check_tree(given, "template_options", fault=TokenizerError)
        if both := sorted(given.keys() & taken):
            raise TokenizerError(f"the template option {both[0]!r} is given elsewhere already: leave it out here.")
        if unread := [name for name in given if not self.reads(name)]:
            raise TokenizerError(f"the chat template does not read the option {unread[0]!r}: it would do nothing.")
        return given

    # -------------------------------------------------------------------------------------------------------- answers

    def split(self, ids: Sequence[int], *, open_channel: bool = False, growing: "Growing | None" = None) -> Parts:
        """Take an answer apart: `<|channel>thought … <channel|>` is thinking, `<|tool_call>…` a tool call, the
        rest text. `open_channel`: the prompt ended inside a thought, whose header it has written already. `growing`
        remembers an answer's texts from call to call."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        growing = growing or Growing(self.decode)
        for number, (kind, part) in enumerate(self.markers.spans(ids, open_channel=open_channel)):
            if kind == OPEN:
                thoughts.append(growing.text(number, part))
            elif kind == CHANNEL:
                header, newline, body = growing.text(number, part).partition("\n")
                is_thought = header.strip() in ("thought", "") or not newline
                (thoughts if is_thought else texts).append(body)
            elif kind == TOOL_CALL:
                calls += parse_calls(self.call_text(part))
            else:
                texts.append(growing.text(number, part))
        thinking = "".join(thoughts).strip()
        return Parts(text="".join(texts), thinking=thinking or None, tool_calls=calls)

    def opens_channel(self, prompt: list[int]) -> bool:
        """Whether a prompt ends inside a channel: its last channel marker is an opening one."""
        markers = (self.markers.channel, self.markers.end_channel)
        last = next((i for i in reversed(prompt) if i in markers and i is not None), None)
        return last is not None and last == markers[0]

    def call_text(self, ids: Sequence[int]) -> str:
        """Decode a tool call's inside: its quotes are special tokens, and needed; between two stands an argument."""
        kept, quoted = [], False
        for i in ids:
            quoted ^= i == self.markers.quote
            if quoted or i == self.markers.quote or i not in self.special_ids:
                kept.append(i)
        return self.vocabulary.decode(kept)


class Growing:
    """Texts of ids that are asked for again and again, longer each time: their beginnings are decoded once.

    A token says more behind the one before it than alone (a space, the rest of a character), so what is new is decoded
    together with the last known token, which is a text by itself.
    """

    NEW = 64  # tokens at least between two beginnings

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._known: dict[int, tuple[list[int], str, str]] = {}  # beginnings, their texts, and their last tokens'

    def text(self, number: int, ids: list[int]) -> str:
        """The text of the `number`-th list of ids."""
        known, text, last = self._known.get(number, ([], "", ""))
        if not known or ids[: len(known)] != known:
            known, text = [], self._decode(ids)
        else:
            text += self._decode(ids[len(known) - 1 :])[len(last) :]
        if len(ids) >= len(known) + self.NEW and "\ufffd" not in (last := self._decode(ids[-1:])):
            self._known[number] = (ids, text, last)
        return text
