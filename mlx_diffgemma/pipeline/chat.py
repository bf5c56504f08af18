"""A conversation that encodes only what is new in each turn."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..generation.events import Event, Finished, Prefilled
from ..model.cache import PrefixCache, Snapshot
from ..text.tokenizer import Message
from .results import Result

if TYPE_CHECKING:
    from .model import DiffusionGemma


class Chat:
    """A conversation. Thoughts of earlier turns are left out of its history, as the model's card asks."""

    def __init__(self, model: "DiffusionGemma", system: str | None, options: dict[str, Any]):
        self.model, self.options = model, options
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[Message] = list(self.system)
        self._cache: PrefixCache | None = None
        self._known: list[int] = []  # the ids the snapshot holds
        self._snapshot: Snapshot | None = None

    def send(self, text: str, **options: Any) -> Result:
        """Say something; returns the answer. `options` are for this turn only."""
        result = None
        for event in self.stream(text, **options):
            if isinstance(event, Finished):
                result = event.result
        assert result is not None  # the engine's last event is Finished
        return result

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """`send`, as events. A turn that is not finished leaves no trace in the history."""
        messages = [*self.messages, {"role": "user", "content": text}]
        options = {**self.options, **options}
        template = {k: options.pop(k, None) for k in ("enable_thinking", "tools")}
        run = {k: options.pop(k, None) for k in ("seed", "noise")}
        ids = self.model.ids(messages, **template)
        lasting = self._lasting(ids, messages, template)
        cache = self._rewind(ids, options)
        for event in self.model._events([ids], options=options, cache=cache, pause_at=lasting, **run):
            if isinstance(event, Prefilled) and event.tokens == lasting:
                self._known, self._snapshot = ids[:lasting], cache.snapshot()
            elif isinstance(event, Finished):
                event = dataclasses.replace(event, result=event.result[0])
                answer: Message = {"role": "assistant", "content": event.result.text}
                if event.result.tool_calls:
                    answer["tool_calls"] = [{"type": "function", "function": c} for c in event.result.tool_calls]
                self.messages = [*messages, answer]
            yield event

    def _lasting(self, ids: list[int], messages: list[Message], template: dict[str, Any]) -> int:
        """How many of the prompt's ids the next turn's prompt will begin with, whatever the answer is.

        Nearly all; but a template may open the model's turn in another way than it writes down its history.
        """
        later = self.model.ids([*messages, {"role": "assistant", "content": "."}], **template)
        pairs = enumerate(zip(ids, later, strict=False))
        return next((i for i, (now, then) in pairs if now != then), min(len(ids), len(later)))

    def _rewind(self, ids: list[int], options: dict[str, Any]) -> PrefixCache:
        """The cache, back where the last prompt and this one part, or a new one if that is not known."""
        known = len(self._known)
        if self._cache is not None and self._snapshot is not None and known < len(ids) and ids[:known] == self._known:
            self._cache.restore(self._snapshot)
        else:
            self._cache = self.model.network.make_cache(canvas_length=options.get("canvas_length"))
            self._known, self._snapshot = [], None
        return self._cache
