"""A conversation that encodes only what is new in each turn."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..generation.events import Event, Finished, Prefilled
from ..model.cache import PrefixCache
from ..model.network import Network
from ..text.gate import Message, check_text
from ..text.pictures import parts
from .results import Result

if TYPE_CHECKING:
    from .model import DiffusionGemma
    from .requests import Request


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the next prompt begins with, encoded."""

    key: tuple[int | str, ...]
    network: Network  # that encoded it
    cache: PrefixCache

    def begins(self, key: tuple[int | str, ...], network: Network) -> bool:
        """Whether a prompt for this network goes on from it."""
        return network is self.network and len(self.key) < len(key) and key[: len(self.key)] == self.key


class Chat:
    """A conversation. Thoughts of earlier turns are left out of its history, as the model's card asks."""

    def __init__(self, model: "DiffusionGemma", system: str | None, options: dict[str, Any]):
        self.model, self.options = model, options
        self.system = [] if system is None else [{"role": "system", "content": check_text(system, "the system prompt")}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[Message] = list(self.system)
        self._kept: Kept | None = None

    def send(self, said: str | list[Message], **options: Any) -> Result:
        """Say something: a text, or a list of parts, pictures among them, as in a message's content. Returns the
        answer. `options` are for this turn only."""
        return next(event.result for event in self.stream(said, **options) if isinstance(event, Finished))

    def stream(self, said: str | list[Message], **options: Any) -> Iterator[Event]:
        """`send`, as events. A turn that is not finished leaves no trace: neither in the history, nor in the prefix
        that is kept, since it is denoised behind a fork of it."""
        content = said if isinstance(said, list) else check_text(said, "the message")
        messages = self.model.opened([*self.messages, {"role": "user", "content": content}])
        options = {**self._own_options(messages), **options}
        own = ("enable_thinking", "tools", "template_options", "sanitize_control_tokens")
        template = {name: options.pop(name) for name in own if name in options}
        run = {k: options.pop(k, None) for k in ("seed", "noise")}
        request = self.model.prepare(messages, **template, **run, **options)
        lasting = self._lasting(messages, template, request)
        request.refuse_choosing()
        request.check_memory(forks=2)  # what the turn goes on from, and what the next one will
        return self._turn(messages, lasting, request)

    def _own_options(self, messages: list[Message]) -> dict[str, Any]:
        """The conversation's own; how pictures are masked says nothing as long as there is none."""
        seen = parts.has_pictures(messages)
        return {name: value for name, value in self.options.items() if seen or name != "picture_mask"}

    def _turn(self, messages: list[Message], lasting: int, request: "Request") -> Iterator[Event]:
        cache, kept = self._fork(request), None
        for event in request.events(cache, pauses=[lasting]):
            if isinstance(event, Prefilled) and event.tokens == lasting:
                kept = Kept(key=request.keys[0][:lasting], network=request.network, cache=cache.fork())
            elif isinstance(event, Finished):
                answer: Message = {"role": "assistant", "content": event.result.text}
                if event.result.tool_calls:
                    answer["tool_calls"] = [{"type": "function", "function": c} for c in event.result.tool_calls]
                self.messages, self._kept = [*messages, answer], kept or self._kept
            yield event

    def _lasting(self, messages: list[Message], template: dict[str, Any], request: "Request") -> int:
        """How much of the prompt the next turn's prompt will begin with, whatever the answer is.

        Nearly all; but a template may open the model's turn in another way than it writes down its history.
        """
        answered = self.model.read([*messages, {"role": "assistant", "content": "."}], **template)
        now, later = request.keys[0], answered.key(request.settings.picture_mask)
        pairs = enumerate(zip(now, later, strict=False))
        return next((i for i, (one, other) in pairs if one != other), min(len(now), len(later)))

    def _fork(self, request: "Request") -> PrefixCache:
        """A prefix to go on from: a fork of the kept one where the prompt begins with it, else an empty one."""
        kept, key = self._kept, request.keys[0]
        if kept is not None and kept.begins(key, request.network):
            return kept.cache.fork()
        return request.network.make_cache(canvas_length=request.room)
