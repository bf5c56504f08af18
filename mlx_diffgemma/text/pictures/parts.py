"""Pictures among the parts of messages, as people write them: Hugging Face's {"type": "image", "image": …}, OpenAI's
{"type": "image_url", "image_url": {"url": …, "detail": …}}, and {"type": "input_image", …} of its Responses. Videos,
{"type": "video", "video": …}, and PDFs, {"type": "pdf", "pdf": …}, are pictures too.

They are opened where they stand, and taken out before a conversation is checked and rendered: what is left of them is
{"type": "image"}, for which the chat template writes a placeholder, and of a video its place and its frames' labels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import PromptError
from ...values import shown
from ..gate import Message
from .images import Picture, PictureConfig, open_picture
from .pages import Pages, open_pages
from .sources import ANYWHERE, Access, decoded
from .video import FRAMES, Video, open_video

IMAGES = ("image", "image_url", "input_image")
MEDIA = ("video", "video_url", "pdf")  # of which each is several pictures
KINDS = (*IMAGES, *MEDIA)
Medium = Picture | Video | Pages
_CALLED = {"image": ("an image", "picture", "cat.png"), "video": ("a video", "video", "cat.mp4")}
_CALLED |= {"pdf": ("a PDF", "PDF", "report.pdf")}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a part says of its picture, video or PDF."""

    source: Any
    budget: int | str | None

    @classmethod
    def of(cls, part: Message, where: str) -> "Asked":
        """Errors: PromptError for a part without a source, or with several."""
        kind = _kind(part)
        called, what, example = _CALLED[kind]
        given = [key for key in (kind, "url", "path", "base64", f"{kind}_url") if part.get(key) is not None]
        if len(given) != 1:
            how = f'expected one of {kind}, url, path, base64, as in {{"type": "{kind}", "{kind}": "{example}"}}'
            told = f"has {' and '.join(given)}: give one" if given else f"has no {what} with it: {how}"
            raise PromptError(f"{where} is {called}, and {told}.")
        source, budget = part[given[0]], part.get("budget") or part.get("detail")
        if given[0] == f"{kind}_url" and isinstance(source, dict):
            source, budget = source.get("url"), source.get("detail") or budget
        if given[0] == kind:
            return cls(source=source, budget=budget)
        if not isinstance(source, str):
            raise PromptError(f"{where}.{given[0]} is {shown(source)}, expected text.")
        if given[0] == "base64":
            return cls(source=decoded(f"{where}.base64", source), budget=budget)
        return cls(source=source, budget=budget)


def has_pictures(messages: Any, kinds: Sequence[str] = KINDS) -> bool:
    """Whether a conversation, of the right kind or not, has a part that is a picture, or of one of these `kinds`."""
    return any(part["type"] in kinds for part, _ in _places(messages))


def opened(messages: Any, config: PictureConfig, *, access: Access = ANYWHERE) -> Any:
    """The same conversation; its pictures are opened and scaled, once: {"type": "image", "image": Picture}, and so are
    {"type": "video", "video": Video} and {"type": "pdf", "pdf": Pages}.

    Errors: PromptError for a part without a source, and for whatever is not a picture that can be read.
    """

    def change(part: Message, where: str) -> Message:
        kind = _kind(part)
        if isinstance(part.get(kind), Medium):
            return part
        asked = Asked.of(part, where)
        if kind == "image":
            made = open_picture(asked.source, config, budget=asked.budget, access=access)
        elif kind == "video":
            frames, rate = FRAMES if part.get("frames") is None else part["frames"], part.get("rate")
            made = open_video(asked.source, config, frames=frames, budget=asked.budget, rate=rate, access=access)
        else:
            made = open_pages(asked.source, config, pages=part.get("pages"), budget=asked.budget, access=access)
        return {"type": kind, kind: made}

    return _changed(messages, change)


def seen(messages: Any) -> list[Medium]:
    """The pictures, videos and PDFs of a conversation that was `opened`, in order."""
    return [part[_kind(part)] for part, _ in _places(messages)]


def bare(messages: Any) -> Any:
    """A conversation without its pictures, for those who check the rest of it."""
    return _changed(messages, _place)


def taken_out(messages: Any) -> tuple[Any, list[Picture]]:
    """A conversation that was `opened`, without its pictures, and these in order."""
    pictures = [p for shown in seen(messages) for p in ((shown,) if isinstance(shown, Picture) else shown.pictures)]
    return bare(messages), pictures


def _place(part: Message, where: str) -> Message | list[Message]:
    """What is left of a part: where its pictures are."""
    found = part.get(_kind(part))
    if isinstance(found, Pages):
        return [{"type": "image"} for _ in found.pictures]
    if _kind(part) == "video":
        return {"type": "video", "labels": list(found.labels)} if isinstance(found, Video) else {"type": "video"}
    return {"type": "image"}


def written(messages: Any) -> Any:
    """A conversation that was `opened` as plain data: pictures by their paths and URLs, with their budgets.

    Errors: PromptError for one that came from neither."""

    def change(part: Message, where: str) -> Message:
        kind = _kind(part)
        found = part[kind]
        if found.source is None:
            raise PromptError(f"{where} is {found.name}, which cannot be written: give pictures as files or URLs.")
        return {"type": kind, kind: found.source, **_options(found)}

    return _changed(messages, change)


def _options(found: Medium) -> Message:
    """How a picture, video or PDF was asked for, as a part says it."""
    if isinstance(found, Picture):
        return {"budget": found.budget}
    options: Message = {"budget": found.pictures[0].budget}
    if isinstance(found, Pages):
        return options | ({"pages": found.asked} if found.asked is not None else {})
    return options | {"frames": len(found.pictures)} | ({"rate": found.rate} if found.rate_from == "asked" else {})


def with_budget(messages: Any, budget: int | str) -> Any:
    """The same conversation; pictures that ask for no budget get this one."""

    def change(part: Message, where: str) -> Message:
        url = part.get(f"{_kind(part)}_url")
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


def _kind(part: Message) -> str:
    """image, video or pdf."""
    return "image" if part["type"] in IMAGES else part["type"].removesuffix("_url")


def _places(messages: Any) -> Iterator[tuple[Message, str]]:
    """Every part that is a picture, and what errors call it."""
    for i, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if isinstance(part, dict) and part.get("type") in KINDS:
                yield part, f"messages[{i}].content[{j}]"


def _changed(messages: Any, change: Callable[[Message, str], Message | list[Message]]) -> Any:
    """The same conversation with every picture's part changed, into several if need be."""
    if not has_pictures(messages):
        return messages
    made: dict[int, Message | list[Message]] = {id(part): change(part, where) for part, where in _places(messages)}

    def parts(part: Any) -> list[Any]:
        new = made.get(id(part), part)
        return new if isinstance(new, list) and id(part) in made else [new]

    return [
        message | {"content": [new for part in message["content"] for new in parts(part)]}
        if isinstance(message, dict) and isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]
