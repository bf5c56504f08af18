"""Pictures among the parts of messages, as people write them: Hugging Face's {"type": "image", "image": …}, OpenAI's
{"type": "image_url", "image_url": {"url": …, "detail": …}}, and {"type": "input_image", …} of its Responses.

They are opened where they stand, and taken out before a conversation is checked and rendered: what is left of them is
{"type": "image"}, for which the chat template writes a placeholder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from ..values import shown
from .gate import Message
from .images import Picture, PictureConfig, open_picture
from .sources import ANYWHERE, Access, decoded

KINDS = ("image", "image_url", "input_image")
SOURCES = ("image", "url", "path", "base64", "image_url")  # keys of a part that say where its picture is
_HOW = 'expected one of image, url, path, base64, as in {"type": "image", "image": "cat.png"}'


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a part says of its picture."""

    source: Any
    budget: int | str | None

    @classmethod
    def of(cls, part: Message, where: str) -> "Asked":
        """Errors: PromptError for a part without a source, or with several."""
        given = [key for key in SOURCES if part.get(key) is not None]
        if len(given) != 1:
            told = f"has {' and '.join(given)}: give one" if given else f"has no picture with it: {_HOW}"
            raise PromptError(f"{where} is an image, and {told}.")
        source, budget = part[given[0]], part.get("budget") or part.get("detail")
        if given[0] == "image_url" and isinstance(source, dict):
            source, budget = source.get("url"), source.get("detail") or budget
        if given[0] == "image":
            return cls(source=source, budget=budget)
        if not isinstance(source, str):
            raise PromptError(f"{where}.{given[0]} is {shown(source)}, expected text.")
        if given[0] == "base64":
            return cls(source=decoded(f"{where}.base64", source), budget=budget)
        return cls(source=source, budget=budget)


def has_pictures(messages: Any) -> bool:
    """Whether a conversation, of the right kind or not, has a part that is a picture."""
    return any(True for _ in _places(messages))


def opened(messages: Any, config: PictureConfig, *, access: Access = ANYWHERE) -> Any:
    """The same conversation; its pictures are opened and scaled, once: {"type": "image", "image": Picture}.

    Errors: PromptError for a part without a source, and for whatever is not a picture that can be read.
    """

    def change(part: Message, where: str) -> Message:
        if isinstance(part.get("image"), Picture):
            return part
        asked = Asked.of(part, where)
        return {"type": "image", "image": open_picture(asked.source, config, budget=asked.budget, access=access)}

    return _changed(messages, change)


def bare(messages: Any) -> Any:
    """A conversation without its pictures, for those who check the rest of it."""
    return _changed(messages, lambda part, where: {"type": "image"})


def taken_out(messages: Any) -> tuple[Any, list[Picture]]:
    """A conversation that was `opened`, without its pictures, and these in order."""
    pictures = [part["image"] for part, _ in _places(messages)]
    return bare(messages), pictures


def written(messages: Any) -> Any:
    """A conversation that was `opened` as plain data: pictures by their paths and URLs, with their budgets.

    Errors: PromptError for one that came from neither."""

    def change(part: Message, where: str) -> Message:
        picture = part["image"]
        if picture.source is None:
            raise PromptError(f"{where} is {picture.name}, which cannot be written: give pictures as files or URLs.")
        return {"type": "image", "image": picture.source, "budget": picture.budget}

    return _changed(messages, change)


def with_budget(messages: Any, budget: int | str) -> Any:
    """The same conversation; pictures that ask for no budget get this one."""

    def change(part: Message, where: str) -> Message:
        url = part.get("image_url")
        own = part.get("budget") or part.get("detail") or (isinstance(url, dict) and url.get("detail"))
        return part if own else part | {"budget": budget}

    return _changed(messages, change)


def check_literals(value: Any, placeholder: str, where: str) -> None:
    """Errors: PromptError for a text that holds the placeholder of a picture: it would be one to the model."""
    level = [(value, where)]
    while level:
        node, place = level.pop()
        if isinstance(node, str) and placeholder in node:
            raise PromptError(
                f"{place} holds {placeholder}, which stands for a picture: there is none to it.\n"
                "Write it otherwise, or have control tokens be plain text (sanitize_control_tokens)."
            )
        if isinstance(node, dict):
            level += [(entry, f"{place}.{key}") for key, entry in node.items()]
        elif isinstance(node, list | tuple):
            level += [(entry, f"{place}[{i}]") for i, entry in enumerate(node)]


def _places(messages: Any) -> Iterator[tuple[Message, str]]:
    """Every part that is a picture, and what errors call it."""
    for i, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if isinstance(part, dict) and part.get("type") in KINDS:
                yield part, f"messages[{i}].content[{j}]"


def _changed(messages: Any, change: Callable[[Message, str], Message]) -> Any:
    """The same conversation with every picture's part changed."""
    if not has_pictures(messages):
        return messages
    made = {id(part): change(part, where) for part, where in _places(messages)}
    return [
        message | {"content": [made.get(id(part), part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]
