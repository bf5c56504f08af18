"""A conversation that encodes only what is new in each turn."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..generation.events import Event, Finished, Prefilled
from ..model.cache import PrefixCache
from ..text.gate import Message, check_text
from .results import Result

if TYPE_CHECKING:
    from .model import DiffusionGemma
    from .requests import Request


class Chat:
    """A conversation. Thoughts of earlier turns are left out of its history, as the model's card asks."""

    def __init__(self, model: "DiffusionGemma", system: str | None, options: dict[str, Any]):
        self.model, self.options = model, options
        self.system = [] if system is None else [{"role": "system", "content": check_text(system, "the system prompt")}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[Message] = list(self.system)
        self._kept: tuple[list[int], PrefixCache] | None = None  # ids that the next prompt begins with, encoded

    def send(self, text: str, **options: Any) -> Result:
        """Say something; returns the answer. `options` are for this turn only."""
        return next(event.result for event in self.stream(text, **options) if isinstance(event, Finished))

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """`send`, as events. A turn that is not finished leaves no trace: neither in the history, nor in the prefix
        that is kept, since it is denoised behind a fork of it."""
        messages = [*self.messages, {"role": "user", "content": check_text(text, "the message")}]
        options = {**self.options, **options}
        own = ("enable_thinking", "tools", "template_options", "sanitize_control_tokens")
        template = {name: options.pop(name) for name in own if name in options}
        run = {k: options.pop(k, None) for k in ("seed", "noise")}
        request = self.model.prepare(messages, **template, **run, **options)
        [ids] = request.prompts
        lasting = self._lasting(ids, messages, template)
        request.refuse_choosing()
        request.check_memory(forks=2)  # what the turn goes on from, and what the next one will
        return self._turn(messages, ids, lasting, request)

    def _turn(self, messages: list[Message], ids: list[int], lasting: int, request: "Request") -> Iterator[Event]:
        cache, kept = self._fork(ids, request), None
        for event in request.events(cache, pauses=[lasting]):
            if isinstance(event, Prefilled) and event.tokens == lasting:
                kept = ids[:lasting], cache.fork()
            elif isinstance(event, Finished):
                answer: Message = {"role": "assistant", "content": event.result.text}
                if event.result.tool_calls:
                    answer["tool_calls"] = [{"type": "function", "function": c} for c in event.result.tool_calls]
                self.messages, self._kept = [*messages, answer], kept or self._kept
            yield event

    def _lasting(self, ids: list[int], messages: list[Message], template: dict[str, Any]) -> int:
        """How many of the prompt's ids the next turn's prompt will begin with, whatever the answer is.

        Nearly all; but a template may open the model's turn in another way than it writes down its history.
        """
        later = self.model.ids([*messages, {"role": "assistant", "content": "."}], **template)
        pairs = enumerate(zip(ids, later, strict=False))
        return next((i for i, (now, then) in pairs if now != then), min(len(ids), len(later)))

    def _fork(self, ids: list[int], request: "Request") -> PrefixCache:
        """A prefix to go on from: a fork of the kept one where the prompt begins with it, else an empty one."""
        if self._kept is not None:
            known, cache = self._kept
            if len(known) < len(ids) and ids[: len(known)] == known:
                return cache.fork()
        return self.model.network.make_cache(canvas_length=request.room)
