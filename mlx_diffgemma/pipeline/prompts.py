"""Prompts of any kind → ids, and the pictures among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..config import PictureMask
from ..errors import PromptError, TokenizerError
from ..text.gate import PICTURES, Message, check_messages, check_text, check_tools
from ..text.pictures import parts
from ..text.pictures.images import Picture
from ..text.placing import IMAGE, VIDEO, labels
from ..text.tokenizer import Tokenizer
from ..values import flag, optional, shown

if TYPE_CHECKING:
    from .model import DiffusionGemma


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A picture of a prompt: its soft tokens are the ids `start` … `stop` − 1."""

    start: int
    stop: int
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class PromptIds:
    """A prompt as ids, and the pictures in it."""

    ids: list[int]
    pictures: tuple[Placed, ...] = ()

    def key(self, picture_mask: PictureMask) -> tuple[int | str, ...]:
        """What a prefix of it is known by: ids, and in the place of a picture, all of which have the same ids, what it
        shows, to which budget, and who sees whom in it."""
        marks: list[int | str] = list(self.ids)
        for placed in self.pictures:
            marks[placed.start : placed.stop] = [f"{picture_mask} {placed.picture.key}"] * (placed.stop - placed.start)
        return tuple(marks)


Prompt = str | list[Message] | list[int] | PromptIds


def is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """How a model's prompts are to be read; the options are those of `DiffusionGemma.read`."""

    model: "DiffusionGemma"
    enable_thinking: bool | None
    tools: list[dict[str, Any]] | None
    template_options: dict[str, Any] | None
    sanitize_control_tokens: bool

    def of(self, prompt: Prompt) -> PromptIds:
        """Errors: as `DiffusionGemma.read`."""
        if isinstance(prompt, PromptIds) or is_ids(prompt):
            if self._is_for_a_template:
                raise PromptError(
                    "enable_thinking, tools, template_options and sanitize_control_tokens go to the chat template;"
                    " a prompt of ids has none."
                )
            return prompt if isinstance(prompt, PromptIds) else PromptIds(ids=cast(list[int], list(prompt)))
        if not isinstance(prompt, str) and not (isinstance(prompt, list | tuple) and prompt and _are_messages(prompt)):
            raise PromptError(
                "a prompt is text, a list of messages {'role': …, 'content': …}, or a list of ids;"
                f" got {shown(prompt)}."
            )
        for name in ("enable_thinking", "sanitize_control_tokens"):
            optional(flag).read(getattr(self, name), name, fault=PromptError)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": check_text(prompt, "the prompt")}]
        messages, pictures = parts.taken_out(self.model.opened(prompt))
        return self._seen(messages, pictures) if pictures else self._text(messages)

    @property
    def _is_for_a_template(self) -> bool:
        told = self.enable_thinking is not None or self.tools is not None
        return told or bool(self.template_options) or bool(self.sanitize_control_tokens)

    def _text(self, messages: list[Message]) -> PromptIds:
        words = self.model.tokenizer
        self._check(words)
        messages = check_messages(messages)
        ids = words.apply_chat_template(messages, **self._template)
        if (image := words.id_of(IMAGE)) is not None and image in ids:
            self._check_literals(messages, IMAGE)
        return PromptIds(ids=ids)

    def _seen(self, messages: list[Message], pictures: list[Picture]) -> PromptIds:
        sight = self.model.seeing
        self._check(sight.tokenizer)
        messages = check_messages(messages, reads=PICTURES)
        if not self.sanitize_control_tokens:
            self._check_literals(messages, sight.frame.placeholder)
            if labels(messages):
                self._check_literals(messages, VIDEO)
        tokens = [picture.tokens for picture in pictures]
        ids, spans = sight.tokenizer.place(messages, sight.frame, tokens, **self._template)
        placed = (Placed(start=a, stop=b, picture=p) for (a, b), p in zip(spans, pictures, strict=True))
        return PromptIds(ids=ids, pictures=tuple(placed))

    def _check(self, words: Tokenizer) -> None:
        check_tools(self.tools)
        for name in ("enable_thinking", "tools"):
            if getattr(self, name) and not words.reads(name):
                raise TokenizerError(f"{name} would do nothing: {words.template()[1]} does not read it.")

    def _check_literals(self, messages: list[Message], placeholder: str) -> None:
        parts.check_literals(messages, placeholder, "messages")
        parts.check_literals(self.tools, placeholder, "tools")

    @property
    def _template(self) -> dict[str, Any]:
        """The options that the chat template is told."""
        return {
            "enable_thinking": self.enable_thinking,
            "tools": self.tools,
            "template_options": self.template_options,
            "sanitize_control_tokens": self.sanitize_control_tokens,
        }


def _are_messages(prompt: Sequence[Any]) -> bool:
    return all(isinstance(message, dict) and "role" in message for message in prompt)
